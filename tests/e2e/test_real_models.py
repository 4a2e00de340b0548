"""The three steps on real pretrained models: another vocabulary for the judge, several stop ids, real text."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.tiny import pair_rows, read_metrics, same_weights, tiny_recipe, train, write_recipe, write_rows

pytestmark = pytest.mark.real

SMALL = ("--model.chat_template=dialogue", "--data.max_prompt_length=60", "--ppo.sampling.max_new_tokens=8")


def test_a_judge_with_another_vocabulary(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused in one line; allowed through text, and then the critic starts from the actor, in the actor's tokens."""
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(400))
    models = (f"--model.actor={shared / 'models/stories260K'}", f"--model.reward={shared / 'models/babyllama-char-1M'}")
    recipe = write_recipe(tmp_path / "real.toml", *models, *SMALL, f"--data.sources={rows}", "--data.max_length=100")
    output = tmp_path / "run"
    assert train(recipe, output) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert "vocabular" in line
    assert "--model.retokenise_for_reward true" in line
    assert train(recipe, output, "--model.retokenise_for_reward", "true") == 0
    critic = AutoModelForSequenceClassification.from_pretrained(output / "ppo/critic")
    reward = AutoModelForSequenceClassification.from_pretrained(output / "reward")
    assert (critic.config.vocab_size, reward.config.vocab_size) == (512, 105)
    assert (critic.config.threefold_score_mean, critic.config.threefold_score_scale) == (0.0, 1.0)
    assert reward.config.threefold_score_scale != 1.0
    metrics = [record for record in read_metrics(output) if "val/first_ratio_error" in record]
    assert max(record["val/first_ratio_error"] for record in metrics) <= 1e-4


def test_real_dialogues_and_real_text(shared: Path, tmp_path: Path) -> None:
    """The first 200 rows of hh_rlhf and the first stories of tinystories, both as they are."""
    with gzip.open(shared / "data/hh_rlhf/harmless_1600.jsonl.gz", "rt", encoding="utf-8") as file:
        (tmp_path / "dialogues.jsonl").write_text("".join(islice(file, 200)), encoding="utf-8")
    (tmp_path / "stories.txt").write_text((shared / "data/tinystories/val.txt").read_text("utf-8")[:40_000], "utf-8")
    data = (f"--data.sources={tmp_path / 'dialogues.jsonl'}", "--data.max_length=320")
    text = (f"--ppo.mixture.source={tmp_path / 'stories.txt'}", "--ppo.mixture.eval_documents=8")
    chunks = ("--ppo.mixture.chunk_length=64", "--ppo.mixture.batch_size=2", "--sft.max_eval_examples=32")
    model = (f"--model.actor={shared / 'models/stories260K'}", "--model.chat_template=dialogue")
    overrides = (*data, *text, *chunks, *model, "--reward.max_eval_examples=32", "--ppo.iterations=1")
    recipe = write_recipe(tmp_path / "real.toml", *overrides, "--data.bad_rows=drop")
    output = tmp_path / "run"
    assert train(recipe, output) == 0
    actor = AutoModelForCausalLM.from_pretrained(output / "ppo/actor")
    assert actor.generation_config.eos_token_id == [1, 2], "both of the checkpoint's stop ids"
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert "gold" not in evaluation["models"]["ppo"], "no gold score but for the embedded data"
    assert "reward_clean_accuracy" not in evaluation
    (before, *_) = [r["ppo/eval_text_perplexity"] for r in read_metrics(output) if "ppo/eval_text_perplexity" in r]
    assert 2 < before < 60, "a model of stories still knows stories"


def test_the_reward_model_may_start_from_the_pretrained_actor(shared: Path, tmp_path: Path) -> None:
    """Step 2 alone, without step 1; grouped-query attention and tied pad and unk ids are no trouble."""
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(400))
    source = shared / "models/stories260K"
    models = (f"--model.actor={source}", f"--model.reward={source}", f"--data.sources={rows}")
    recipe = write_recipe(tmp_path / "real.toml", *models, *SMALL)
    assert train(recipe, tmp_path / "run", "--step", "2") == 0
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/reward")
    assert reward.config.num_labels == 1
    assert torch.isfinite(reward.score.weight).all()
    assert not same_weights(tmp_path / "run/reward", source)
    assert tiny_recipe().model.reward == ""
