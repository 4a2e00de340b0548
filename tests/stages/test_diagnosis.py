"""Numbers that are not finite in step 3: one line that names place and weight, and the models left on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import finished, stage_context, tiny_recipe
from threefold.errors import TrainingError
from threefold.stages import ppo
from threefold.stages.ppo_setup import Setup

BROKEN = "model.decoder.layers.1.fc1.weight"
Damage = Callable[[Setup], None]


def damaged_run(
    tiny_run: Path, output: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage, *overrides: str
) -> tuple[str, Path]:
    """Step 3 with `damage` done to its models before the first iteration; the message, and where failures lie."""
    context = stage_context("ppo", tiny_recipe(*overrides), output, finished(tiny_run))
    set_up = ppo.set_up

    def damaged_set_up(given: object) -> Setup:
        setup = set_up(given)  # type: ignore[arg-type]
        with torch.no_grad():
            damage(setup)
        return setup

    monkeypatch.setattr(ppo, "set_up", damaged_set_up)
    with pytest.raises(TrainingError) as stopped:
        ppo.run(context)
    context.log.close()
    assert "\n" not in str(stopped.value)
    return str(stopped.value), context.output.parent / "failed"


def test_logits_that_are_not_finite(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(setup: Setup) -> None:
        setup.learners.actor_forward.model.get_parameter(BROKEN)[0, 0] = torch.nan

    message, failed = damaged_run(tiny_run, tmp_path, monkeypatch, damage)
    saved = failed / "ppo-0-steps"
    for part in ("after 0 optimizer steps", "token 1 of an answer", f"the first is {BROKEN} (norm nan)", str(saved)):
        assert part in message, part
    state = AutoModelForCausalLM.from_pretrained(saved / "actor").state_dict()
    assert bool(torch.isnan(state[BROKEN]).any())
    assert (saved / "critic" / "model.safetensors").is_file()
    norms = json.loads((saved / "weight_norms.json").read_text())
    assert norms[BROKEN] == "nan"
    assert sum(norm == "nan" for norm in norms.values()) == 1
    monkeypatch.undo()
    again, _ = damaged_run(tiny_run, tmp_path / "..", monkeypatch, damage)
    assert str(failed / "ppo-0-steps") in message
    assert "ppo-0-steps" in again


def test_a_tied_weight_is_counted_once(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(setup: Setup) -> None:
        setup.learners.actor_forward.model.get_input_embeddings().weight[:, 0] = torch.nan

    message, failed = damaged_run(tiny_run, tmp_path, monkeypatch, damage)
    embeddings = "model.decoder.embed_tokens.weight"
    assert f"1 weights of the actor are not finite, the first is {embeddings} (norm nan)" in message
    assert "lm_head.weight" not in json.loads((failed / "ppo-0-steps" / "weight_norms.json").read_text())


def test_a_second_failure_keeps_what_the_first_left(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(setup: Setup) -> None:
        setup.learners.actor_forward.model.get_parameter(BROKEN)[0, 0] = torch.inf

    (tmp_path / "failed" / "ppo-0-steps").mkdir(parents=True)
    message, failed = damaged_run(tiny_run, tmp_path, monkeypatch, damage)
    assert str(failed / "ppo-0-steps-2") in message
    assert not any((failed / "ppo-0-steps").iterdir())


def test_weights_that_are_finite_but_too_large_are_named_by_their_norm(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(setup: Setup) -> None:
        setup.learners.actor_forward.model.get_parameter(BROKEN).fill_(1e38)
        setup.learners.actor_forward.model.get_parameter("model.decoder.layers.1.fc2.weight").fill_(1e37)

    message, _ = damaged_run(tiny_run, tmp_path, monkeypatch, damage)
    assert f"all weights of the actor are finite, the largest norm is that of {BROKEN}" in message


@pytest.mark.parametrize("which", ["actor", "critic"])
def test_an_update_that_explodes_leaves_its_models_too(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """Found by the loss, by an evaluation or by the next rollout: each names its place and saves."""
    message, failed = damaged_run(
        tiny_run,
        tmp_path,
        monkeypatch,
        lambda _: None,
        f"--ppo.{which}_learning_rate=1e30",
        "--ppo.eval_every=1",
        "--ppo.ppo_epochs=1",
        "--ppo.minibatches=1",
        "--ppo.iterations=3",
    )
    assert "step 3, ppo, after " in message
    (saved,) = failed.iterdir()
    assert str(saved) in message
    assert (saved / "actor" / "model.safetensors").is_file()
