"""Broken weights in step 3: the run stops in one line that names the place and the weight, and leaves its state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import finished, stage_context, tiny_recipe
from threefold.errors import TrainingError
from threefold.stages import ppo
from threefold.stages.ppo import prompt_batches

BROKEN = "model.decoder.layers.1.fc1.weight"


def test_logits_that_are_not_finite(tiny_run: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    context = stage_context("ppo", recipe, tmp_path, finished(tiny_run))
    setup = ppo._set_up(context)
    actor = setup.learners.actor_forward.model
    with torch.no_grad():
        actor.get_parameter(BROKEN)[0, 0] = torch.nan
    prompts = next(prompt_batches(setup.prompts, recipe.ppo, recipe.run.seed))
    with pytest.raises(TrainingError) as stopped:
        ppo._sample_or_explain(context, setup, prompts, iteration=4)
    context.log.close()
    message = str(stopped.value)
    saved = context.output.parent / "failed" / "ppo-iteration-5"
    for part in ("iteration 5", "token 1 of an answer", f"the first is {BROKEN} (norm nan)", str(saved)):
        assert part in message, part
    assert "\n" not in message
    state = AutoModelForCausalLM.from_pretrained(saved / "actor").state_dict()
    assert bool(torch.isnan(state[BROKEN]).any())
    assert (saved / "critic" / "model.safetensors").is_file()
    norms = json.loads((saved / "weight_norms.json").read_text())
    assert norms[BROKEN] == "nan"
    assert set(norms) == {name for name, _ in actor.named_parameters()}
    assert [tuple(ids) for ids in json.loads((saved / "prompts.json").read_text())] == [tuple(p.ids) for p in prompts]


def test_weights_that_are_finite_but_too_large_are_named_by_their_norm(tiny_run: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe()
    context = stage_context("ppo", recipe, tmp_path, finished(tiny_run))
    setup = ppo._set_up(context)
    with torch.no_grad():
        setup.learners.actor_forward.model.get_parameter(BROKEN).fill_(1e38)
        setup.learners.actor_forward.model.get_parameter("model.decoder.layers.1.fc2.weight").fill_(1e37)
    prompts = next(prompt_batches(setup.prompts, recipe.ppo, recipe.run.seed))
    with pytest.raises(TrainingError, match=f"all weights are finite, the largest norm is that of {BROKEN}"):
        ppo._sample_or_explain(context, setup, prompts, iteration=0)
    context.log.close()
