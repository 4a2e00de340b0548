"""Step 1 against transformers' own loss, and which checkpoint it keeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import StageRun, conversation_rows, run_stage, tiny_recipe, weights, write_rows
from threefold.config.recipe import Recipe
from threefold.data.library import open_library
from threefold.errors import TrainingError
from threefold.types import Example

IGNORED = -100
STEP_1_ONLY = ("--data.split=1,0,0", "--data.eval_fraction=0.3", "--run.seed=1201")
"""Of 24 rows this seed holds out 7, of different lengths."""


@pytest.fixture
def recipe_of(tiny_run: Path, tmp_path: Path) -> Any:
    """A recipe that fine-tunes the tiny run's own model on ragged conversations of one to three turns."""
    rows = write_rows(tmp_path / "rows.jsonl", conversation_rows(24))

    def make(*overrides: str) -> Recipe:
        start = (f"--data.sources={rows}", f"--model.actor={tiny_run / 'sft'}", *STEP_1_ONLY)
        return tiny_recipe(*start, "--sft.batch_size=1000", "--sft.max_steps=1", "--sft.epochs=50", *overrides)

    return make


def shares(recipe: Recipe) -> tuple[list[Example], list[Example]]:
    library = open_library(recipe)
    return list(library.examples("sft", "train")), list(library.examples("sft", "eval"))


def transformers_loss(directory: Path, examples: list[Example], loss_on: str) -> float:
    """Mean cross-entropy per target as transformers computes it, labels set by walking through the rendered tokens.

    A turn of the assistant begins after "<|assistant|>" and ends with "<|end|>", which is its last token.
    """
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    opens, ends = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
    rows = []
    for example in examples:
        messages = [{"role": m.role, "content": m.content} for m in example.prompt.messages]
        messages.append({"role": "assistant", "content": example.demonstration})
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        labels, inside = [], False
        for token in ids:
            labels.append(token if inside or loss_on == "all" else IGNORED)
            inside = (inside or token == opens) and token != ends
        rows.append((ids, labels))
    width = max(len(ids) for ids, _ in rows)
    assert len({len(ids) for ids, _ in rows}) > 3, "a ragged batch"
    batch = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    targets = torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])
    with torch.no_grad():
        return float(model(input_ids=batch, attention_mask=mask, labels=targets).loss)


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_the_loss_is_that_of_transformers(recipe_of: Any, tiny_run: Path, tmp_path: Path, loss_on: str) -> None:
    """In training and on held-out rows, before the first update; tolerance 1e-5."""
    recipe = recipe_of(f"--sft.loss_on={loss_on}")
    train, held_out = shares(recipe)
    assert max(len(example.prompt.messages) for example in train) == 5
    stage = run_stage("sft", recipe, tmp_path / "run")
    ours = stage.series("sft/loss")[0], stage.series("sft/eval_loss")[0]
    theirs = [transformers_loss(tiny_run / "sft", examples, loss_on) for examples in (train, held_out)]
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert stage.series("sft/eval_perplexity")[0] == pytest.approx(math.exp(theirs[1]), rel=1e-5)


def test_what_is_saved_has_the_loss_that_is_reported(recipe_of: Any, tmp_path: Path) -> None:
    recipe = recipe_of("--sft.max_steps=3", "--sft.learning_rate=1e-3")
    stage = run_stage("sft", recipe, tmp_path / "run")
    assert stage.summary["best_step"] == stage.summary["num_steps"] == 3
    assert stage.summary["sft/eval_loss"] < stage.summary["initial/sft/eval_loss"]
    saved = transformers_loss(stage.directory, shares(recipe)[1], "assistant")
    assert stage.summary["sft/eval_loss"] == pytest.approx(saved, abs=1e-5)


def test_the_best_checkpoint_is_kept_and_not_the_last(recipe_of: Any, tmp_path: Path) -> None:
    """A learning rate that grows with every step: the loss falls at first, and then the model is wrecked."""
    rising = ("--sft.scheduler=constant_with_warmup", "--sft.warmup_steps=1000", "--sft.learning_rate=2")
    recipe = recipe_of("--sft.max_steps=0", "--sft.epochs=16", "--sft.grad_clip=0", "--sft.eval_every=1", *rising)
    stage = run_stage("sft", recipe, tmp_path / "run")
    losses = stage.series("sft/eval_loss")
    best = min(range(len(losses)), key=losses.__getitem__)
    assert 0 < best < len(losses) - 1, losses
    assert losses[-1] > losses[best] + 0.1, losses
    assert (stage.summary["best_step"], stage.summary["sft/eval_loss"]) == (best, losses[best])
    saved = transformers_loss(stage.directory, shares(recipe)[1], "assistant")
    assert saved == pytest.approx(losses[best], abs=1e-5)


def test_training_that_only_harms_keeps_the_least_harmed_checkpoint(recipe_of: Any, tmp_path: Path) -> None:
    """The model before training is no result of it, however much better it was."""
    recipe = recipe_of("--sft.learning_rate=1e3", "--sft.max_steps=2", "--sft.eval_every=1")
    stage = run_stage("sft", recipe, tmp_path / "run")
    before, *after = stage.series("sft/eval_loss")
    assert before < min(after)
    assert stage.summary["sft/eval_loss"] == min(after)
    assert stage.summary["initial/sft/eval_loss"] == before


def test_a_held_out_loss_that_is_not_finite_stops_the_stage(recipe_of: Any, tmp_path: Path) -> None:
    """The last step's loss was finite; only the evaluation after it can see what the step did."""
    with pytest.raises(TrainingError, match=r"lower sft\.learning_rate"):
        run_stage("sft", recipe_of("--sft.learning_rate=1e30"), tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_step(recipe_of: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="step 1, sft, optimizer step 2"):
        run_stage(
            "sft", recipe_of("--sft.learning_rate=1e30", "--sft.max_steps=3", "--sft.eval_every=3"), tmp_path / "run"
        )


def test_micro_batches_do_not_change_the_result(recipe_of: Any, tmp_path: Path) -> None:
    """17 rows in pieces of 3, several steps; losses to 1e-5, weights to 1e-4 (Adam magnifies rounding)."""
    runs: list[StageRun] = []
    for size in (0, 3):
        recipe = recipe_of("--sft.batch_size=17", "--sft.max_steps=4", f"--sft.micro_batch_size={size}")
        runs.append(run_stage("sft", recipe, tmp_path / str(size)))
    for name in ("sft/loss", "sft/eval_loss", "sft/grad_norm"):
        assert runs[0].series(name) == pytest.approx(runs[1].series(name), abs=1e-5), name
    whole, pieces = (weights(run.directory) for run in runs)
    for name, weight in whole.items():
        if not name.endswith("k_proj.bias"):  # adds a constant to all scores of a softmax: its gradient is rounding
            torch.testing.assert_close(weight, pieces[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (("--sft.epochs=2", "--sft.max_steps=0", "--sft.batch_size=5"), 2 * 4),  # 17 rows: the last batch has 2
        (("--sft.epochs=9", "--sft.max_steps=3", "--sft.batch_size=5"), 3),
        (("--sft.epochs=1", "--sft.max_steps=9", "--sft.batch_size=5"), 4),
    ],
)
def test_number_of_optimizer_steps(recipe_of: Any, tmp_path: Path, overrides: tuple[str, ...], steps: int) -> None:
    recipe = recipe_of("--sft.eval_every=0", *overrides)
    assert len(shares(recipe)[0]) == 17
    stage = run_stage("sft", recipe, tmp_path / "run")
    assert len(stage.series("sft/loss")) == stage.summary["num_steps"] == steps
    rates = stage.series("sft/learning_rate")
    assert rates == pytest.approx([3e-3 * 0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)])


def test_dropout_is_off_in_evaluation_and_on_in_training(recipe_of: Any, tmp_path: Path) -> None:
    without = run_stage("sft", recipe_of(), tmp_path / "without")
    with_dropout = run_stage("sft", recipe_of("--sft.dropout=0.3"), tmp_path / "with")
    assert without.series("sft/eval_loss")[0] == with_dropout.series("sft/eval_loss")[0]
    assert abs(without.series("sft/loss")[0] - with_dropout.series("sft/loss")[0]) > 1e-4


def test_a_new_pad_token_makes_the_embeddings_grow_and_is_saved(recipe_of: Any, tiny_run: Path, tmp_path: Path) -> None:
    stage = run_stage("sft", recipe_of("--model.pad_token=<|fill|>"), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(stage.directory)
    model = AutoModelForCausalLM.from_pretrained(stage.directory)
    before = weights(tiny_run / "sft")["model.decoder.embed_tokens.weight"]
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|fill|>", len(before))
    assert model.get_input_embeddings().num_embeddings == len(before) + 1 == len(tokenizer)
    assert model.generation_config.pad_token_id == len(before)
