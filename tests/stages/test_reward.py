"""Step 2 against plain transformers and hand-worked numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.oracles import proportions
from tests.tiny import EXAMPLE_TEXTS, StageRun, run_stage, tiny_recipe, weights, write_rows
from threefold.config.recipe import Recipe
from threefold.data.prepare import load_examples
from threefold.data.split import split_examples
from threefold.stages.reward import score_metrics
from threefold.types import Example


@pytest.fixture
def recipe_of(tmp_path: Path) -> Any:
    """A recipe for step 2 alone, on pairs of answers of different lengths."""
    rows = [
        {"prompt": f"{text} {n}", "chosen": f"{text} " * (n % 3 + 1), "rejected": "No" if n % 2 else f"never {n} " * 4}
        for n in range(8)
        for text in EXAMPLE_TEXTS
    ]
    file = write_rows(tmp_path / "pairs.jsonl", rows)

    def make(*overrides: str) -> Recipe:
        split = (f"--data.sources={file}", "--data.split=0,1,0", "--data.eval_fraction=0.3")
        return tiny_recipe(*split, "--reward.batch_size=1000", "--reward.max_steps=1", "--reward.epochs=50", *overrides)

    return make


def shares(recipe: Recipe) -> tuple[list[Example], list[Example]]:
    data = recipe.data
    share = split_examples(load_examples(recipe).examples, data.split, data.eval_fraction, recipe.run.seed)["reward"]
    return share.train, share.eval


def transformers_scores(directory: Path, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Scores of preferred and other answers, one conversation at a time: no padding anywhere."""
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    sides: list[list[float]] = [[], []]
    for example in examples:
        for side, answer in zip(sides, example.answers, strict=True):
            messages = [{"role": m.role, "content": m.content} for m in example.prompt.messages]
            messages.append({"role": "assistant", "content": answer})
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
            with torch.no_grad():
                side.append(float(model(input_ids=ids).logits))
    return torch.tensor(sides[0]), torch.tensor(sides[1])


def test_score_metrics_by_hand() -> None:
    """Two right, one tie, one wrong: 2.5 of 4."""
    metrics = score_metrics(torch.tensor([1.0, 3.0, 0.5, 0.0]), torch.tensor([0.0, 1.0, 0.5, 2.0]))
    assert metrics["reward/eval_accuracy"] == 2.5 / 4
    assert metrics["reward/eval_margin"] == pytest.approx((1 + 2 + 0 - 2) / 4)
    losses = [math.log1p(math.exp(-margin)) for margin in (1, 2, 0, -2)]
    assert metrics["reward/eval_loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert metrics["reward/score_mean"] == 1.0
    assert metrics["reward/score_scale"] == pytest.approx(math.sqrt((0 + 4 + 0.25 + 1 + 1 + 0 + 0.25 + 1) / 8))


@pytest.mark.parametrize(("right", "ties", "wrong"), [(2, 1, 1), (10, 0, 0), (0, 0, 7), (30, 4, 6), (0, 5, 0)])
def test_the_interval_is_that_of_wilson_with_ties_as_one_half(right: int, ties: int, wrong: int) -> None:
    better = torch.tensor([1.0] * right + [0.0] * ties + [-1.0] * wrong)
    metrics = score_metrics(better, torch.zeros(len(better)))
    share, count = (right + ties / 2) / len(better), len(better)
    low, high = proportions.wilson_by_bisection(share * count, count, 1.959964)
    assert metrics["reward/eval_accuracy"] == pytest.approx(share)
    assert (metrics["reward/eval_accuracy_low"], metrics["reward/eval_accuracy_high"]) == pytest.approx(
        (low, high), abs=1e-6
    )


def test_scores_that_are_all_alike_keep_a_scale_of_one() -> None:
    metrics = score_metrics(torch.full((3,), 0.7), torch.full((3,), 0.7))
    assert (metrics["reward/eval_accuracy"], metrics["reward/score_scale"]) == (0.5, 1.0)
    assert metrics["reward/eval_loss"] == pytest.approx(math.log(2))


def test_what_is_saved_is_what_is_reported(recipe_of: Any, tiny_run: Path, tmp_path: Path) -> None:
    """Accuracy, margin, loss, mean and scale of the saved model, scored anew by transformers; tolerance 1e-5."""
    recipe = recipe_of("--reward.max_steps=12", "--reward.batch_size=8", "--reward.learning_rate=3e-3")
    stage = run_stage("reward", recipe, tmp_path / "run", {"sft": tiny_run / "sft"})
    assert stage.summary["best_step"] > 0
    better, worse = transformers_scores(stage.directory, shares(recipe)[1])
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(better, worse, strict=True)]
    both = [*better.tolist(), *worse.tolist()]
    mean = math.fsum(both) / len(both)
    expected = {
        "reward/eval_accuracy": sum(wins) / len(wins),
        "reward/eval_margin": float((better - worse).mean()),
        "reward/eval_loss": math.fsum(math.log1p(math.exp(float(w - b))) for b, w in zip(better, worse, strict=True))
        / len(wins),
        "reward/score_mean": mean,
        "reward/score_scale": math.sqrt(math.fsum((score - mean) ** 2 for score in both) / len(both)),
    }
    assert {name: stage.summary[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    config = json.loads((stage.directory / "config.json").read_text())
    assert config["threefold_score_mean"] == pytest.approx(expected["reward/score_mean"], abs=1e-5)
    assert config["threefold_score_scale"] == pytest.approx(expected["reward/score_scale"], abs=1e-5)
    assert config["pad_token_id"] is not None


def test_the_training_loss_is_bradley_and_terrys(recipe_of: Any, tiny_run: Path, tmp_path: Path) -> None:
    """The first update's loss, against scores of a model that one harmless step has saved; tolerance 1e-4."""
    recipe = recipe_of("--reward.learning_rate=1e-12")
    stage = run_stage("reward", recipe, tmp_path / "run", {"sft": tiny_run / "sft"})
    better, worse = transformers_scores(stage.directory, shares(recipe)[0])
    loss = math.fsum(math.log1p(math.exp(float(w - b))) for b, w in zip(better, worse, strict=True)) / len(better)
    assert stage.series("reward/loss")[0] == pytest.approx(loss, abs=1e-4)


def test_the_best_checkpoint_is_kept_with_its_own_statistics(recipe_of: Any, tiny_run: Path, tmp_path: Path) -> None:
    """A first step of rate 0, then a wreck: the saved weights and the saved mean are those of the first."""
    rates = ("--reward.scheduler=constant_with_warmup", "--reward.warmup_steps=1", "--reward.learning_rate=100")
    recipe = recipe_of("--reward.max_steps=2", "--reward.eval_every=1", *rates)
    stage = run_stage("reward", recipe, tmp_path / "run", {"sft": tiny_run / "sft"})
    losses, means = stage.series("reward/eval_loss")[1:], stage.series("reward/score_mean")[1:]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert (best, stage.summary["best_step"]) == (0, 1), losses
    assert abs(means[best] - means[-1]) > 1e-2
    saved = torch.cat(transformers_scores(stage.directory, shares(recipe)[1]))
    assert float(saved.mean()) == pytest.approx(means[best], rel=1e-5, abs=1e-5)
    config = json.loads((stage.directory / "config.json").read_text())
    assert config["threefold_score_mean"] == means[best]


def test_training_learns_to_tell_answers_apart(recipe_of: Any, tiny_run: Path, tmp_path: Path) -> None:
    recipe = recipe_of("--reward.max_steps=60", "--reward.batch_size=14", "--reward.learning_rate=3e-3")
    stage = run_stage("reward", recipe, tmp_path / "run", {"sft": tiny_run / "sft"})
    assert stage.summary["reward/eval_accuracy"] > 0.75
    assert stage.summary["reward/eval_loss"] < 0.8 * stage.summary["initial/reward/eval_loss"]


def test_micro_batches_do_not_change_the_result(recipe_of: Any, tiny_run: Path, tmp_path: Path) -> None:
    """28 pairs in pieces of 3; losses to 1e-5, weights to 1e-4."""
    runs: list[StageRun] = []
    for size in (0, 3):
        recipe = recipe_of("--reward.batch_size=10", "--reward.max_steps=4", f"--reward.micro_batch_size={size}")
        runs.append(run_stage("reward", recipe, tmp_path / str(size), {"sft": tiny_run / "sft"}))
    for name in ("reward/loss", "reward/eval_loss", "reward/grad_norm", "reward/score_scale"):
        assert runs[0].series(name) == pytest.approx(runs[1].series(name), abs=1e-5), name
    whole, pieces = (weights(run.directory) for run in runs)
    for name, weight in whole.items():
        # Their gradients are nothing but rounding: they add a constant to what a softmax, or a pair's margin, is of.
        if not name.endswith(("k_proj.bias", "decoder.final_layer_norm.bias")):
            torch.testing.assert_close(weight, pieces[name], rtol=0, atol=1e-4)


def test_the_body_starts_from_step_1_and_the_head_from_the_seed(recipe_of: Any, tiny_run: Path, tmp_path: Path) -> None:
    """With steps too small to matter the body is that of sft/; the head is normal, 1 / sqrt(D + 1) wide."""
    heads = []
    for seed in (1, 1, 2):
        recipe = recipe_of("--reward.learning_rate=1e-30", "--reward.weight_decay=0", f"--run.seed={seed}")
        directory = tmp_path / f"{seed}-{len(heads)}"
        saved = weights(run_stage("reward", recipe, directory, {"sft": tiny_run / "sft"}).directory)
        heads.append(saved["score.weight"])
        start = weights(tiny_run / "sft")
        assert all(torch.equal(weight, start[name]) for name, weight in saved.items() if name in start)
        assert set(saved) - set(start) == {"score.weight"}
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.5 < float(heads[0].std()) * math.sqrt(32 + 1) < 1.5
