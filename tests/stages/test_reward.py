"""Step 2 against plain transformers and hand-worked numbers."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.oracles import proportions, rankings
from tests.tiny import EXAMPLE_TEXTS, StageRun, run_stage, tiny_recipe, weights, write_rows
from threefold.config.recipe import Recipe
from threefold.data.chat import build_chat_format
from threefold.data.library import open_library
from threefold.data.prepare import reward_items
from threefold.data.split import prompt_digest
from threefold.models.loading import load_tokenizer
from threefold.stages.reward import RewardLoss, answers_length, ranking_loss_sum, score_metrics
from threefold.types import Example, Prompt, RankedAnswers, TokenSequence

PAIR = ((0,), (1,))
LOSSES: tuple[RewardLoss, ...] = ("pairwise", "plackett_luce")
Scored = tuple[list[float], list[rankings.Ranking]]


@pytest.fixture
def recipe_of(tmp_path: Path) -> Any:
    """A recipe for step 2 alone, on pairs of answers of different lengths."""
    rows = [
        {"prompt": f"{text} {n}", "chosen": f"{text} " * (n % 3 + 1), "rejected": "No" if n % 2 else f"never {n} " * 4}
        for n in range(8)
        for text in EXAMPLE_TEXTS
    ]
    return recipe_maker(write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "cache")


@pytest.fixture
def ranked_recipe_of(tmp_path: Path) -> Any:
    """The same on lists of two to five answers, some prompts in two rows that share an answer."""
    rows = [
        {
            "instruction": f"{text} {n % 6}",
            "input": "",
            "output": [f"{text} " * (5 - k) + str(n % 4 + k) for k in range(n % 4 + 2)],
        }
        for n in range(8)
        for text in EXAMPLE_TEXTS
    ]
    return recipe_maker(write_rows(tmp_path / "ranked.jsonl", rows), tmp_path / "cache")


def recipe_maker(file: Path, cache: Path) -> Any:
    def make(*overrides: str) -> Recipe:
        split = (
            f"--data.sources={file}",
            "--data.split=0,1,0",
            "--data.eval_fraction=0.3",
            f"--data.cache_dir={cache}",
        )
        return tiny_recipe(*split, "--reward.batch_size=1000", "--reward.max_steps=1", "--reward.epochs=50", *overrides)

    return make


def shares(recipe: Recipe) -> tuple[list[Example], list[Example]]:
    library = open_library(recipe)
    return list(library.examples("reward", "train")), list(library.examples("reward", "eval"))


def score_by_transformers(directory: Path, examples: Sequence[Example]) -> list[Scored]:
    """Of each prompt the scores of its different answers, one conversation at a time (no padding anywhere), and its
    rankings of their places."""
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows_of_prompt: dict[Prompt, list[Example]] = defaultdict(list)
    for example in examples:
        rows_of_prompt[example.prompt].append(example)
    scored = []
    for prompt, rows in rows_of_prompt.items():
        answers = list(dict.fromkeys(answer for row in rows for answer in row.answers))
        scores = []
        for answer in answers:
            messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
            messages.append({"role": "assistant", "content": answer})
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
            with torch.no_grad():
                scores.append(float(model(input_ids=ids).logits))
        scored.append((scores, [ranking_of(row, row.answers, answers) for row in rows]))
    return scored


def ranking_of(example: Example, answers: Sequence[object], places: Sequence[object]) -> rankings.Ranking:
    """Tiers of places of the example's answers in `places`; an answer that occurs twice has its better rank."""
    rank_of: dict[object, int] = {}
    for answer, rank in zip(answers, example.ranks or range(len(answers)), strict=True):
        rank_of.setdefault(answer, rank)
    return [[places.index(a) for a in rank_of if rank_of[a] == rank] for rank in sorted(set(rank_of.values()))]


def mean_of_prompts(of: Any, scored: Sequence[Scored]) -> float:
    return math.fsum(of(scores, ranked) for scores, ranked in scored) / len(scored)


def naive_metrics(scored: Sequence[Scored], loss: RewardLoss) -> dict[str, float]:
    """All held-out metrics but the interval."""
    naive_loss = rankings.pairwise_loss if loss == "pairwise" else rankings.plackett_luce_loss
    every = [score for scores, _ in scored for score in scores]
    mean = math.fsum(every) / len(every)
    return {
        "reward/eval_loss": mean_of_prompts(naive_loss, scored),
        "reward/eval_accuracy": mean_of_prompts(rankings.accuracy, scored),
        "reward/eval_margin": mean_of_prompts(rankings.margin, scored),
        "reward/score_mean": mean,
        "reward/score_scale": math.sqrt(math.fsum((score - mean) ** 2 for score in every) / len(every)),
    }


def prompt_of(num_answers: int, *ranked: tuple[tuple[int, ...], ...]) -> RankedAnswers:
    """A prompt whose answers differ in length and nothing else."""
    sequences = (TokenSequence((1,) * (2 + n), (False,) + (True,) * (1 + n), 1) for n in range(num_answers))
    return RankedAnswers(tuple(sequences), ranked)


def pairs_of(better: Sequence[float], worse: Sequence[float]) -> tuple[list[RankedAnswers], Tensor]:
    """Prompts of one pair each, with these scores."""
    scores = torch.tensor([score for both in zip(better, worse, strict=True) for score in both])
    return [prompt_of(2, PAIR)] * len(better), scores


# ---------------------------------------------------------------------------------------------------- losses, metrics


@pytest.mark.parametrize("loss", LOSSES)
def test_score_metrics_of_pairs_by_hand(loss: RewardLoss) -> None:
    """Two right, one tie, one wrong: 2.5 of 4."""
    metrics = score_metrics(*pairs_of([1.0, 3.0, 0.5, 0.0], [0.0, 1.0, 0.5, 2.0]), loss)
    assert metrics["reward/eval_accuracy"] == 2.5 / 4
    assert metrics["reward/eval_margin"] == pytest.approx((1 + 2 + 0 - 2) / 4)
    losses = [math.log1p(math.exp(-margin)) for margin in (1, 2, 0, -2)]
    assert metrics["reward/eval_loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert metrics["reward/score_mean"] == 1.0
    assert metrics["reward/score_scale"] == pytest.approx(math.sqrt((0 + 4 + 0.25 + 1 + 1 + 0 + 0.25 + 1) / 8))


def test_a_prompt_of_many_pairs_weighs_as_much_as_one_of_one() -> None:
    """Three answers of which one of three pairs is wrong, and a pair that is right: (2/3 + 1) / 2."""
    items = [prompt_of(3, ((0,), (1,), (2,))), prompt_of(2, PAIR)]
    scores = torch.tensor([2.0, 0.0, 1.0, 5.0, 4.0])
    metrics = score_metrics(items, scores, "pairwise")
    assert metrics["reward/eval_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["reward/eval_margin"] == pytest.approx(((2 + 1 - 1) / 3 + 1) / 2)
    low, high = proportions.wilson_by_bisection(2 / 3 + 1, 2, 1.959964)
    assert (metrics["reward/eval_accuracy_low"], metrics["reward/eval_accuracy_high"]) == pytest.approx(
        (low, high), abs=1e-6
    )
    of_three = [math.log1p(math.exp(-margin)) for margin in (2, 1, -1)]
    expected = (sum(of_three) / 3 + math.log1p(math.exp(-1))) / 2
    assert metrics["reward/eval_loss"] == pytest.approx(expected, rel=1e-6)
    # First of three by its softmax, then 0.0 against 1.0: the mean of two choices.
    first = math.log(math.exp(2) + math.exp(0) + math.exp(1)) - 2
    listwise = ((first + math.log1p(math.exp(1))) / 2 + math.log1p(math.exp(-1))) / 2
    assert score_metrics(items, scores, "plackett_luce")["reward/eval_loss"] == pytest.approx(listwise, rel=1e-6)


@st.composite
def ranked_prompts(draw: st.DrawFn) -> list[RankedAnswers]:
    """One to four prompts of two to six answers, each with one to three rankings of some of them, with ties."""
    items = []
    for _ in range(draw(st.integers(1, 4))):
        num_answers = draw(st.integers(2, 6))
        ranked = []
        for _ in range(draw(st.integers(1, 3))):
            places = draw(st.permutations(range(num_answers)))[: draw(st.integers(2, num_answers))]
            cuts = draw(st.lists(st.booleans(), min_size=len(places) - 1, max_size=len(places) - 1).filter(any))
            tiers = [[places[0]]]
            for place, cut in zip(places[1:], cuts, strict=True):
                if cut:
                    tiers.append([])
                tiers[-1].append(place)
            ranked.append(tuple(map(tuple, tiers)))
        items.append(prompt_of(num_answers, *ranked))
    return items


@given(items=ranked_prompts(), loss=st.sampled_from(LOSSES), seed=st.integers(0, 99))
@settings(deadline=None)
def test_losses_and_metrics_of_rankings_are_the_naive_ones(
    items: list[RankedAnswers], loss: RewardLoss, seed: int
) -> None:
    """All pairs, and all choices, by loops; float32, to 1e-5."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-6, 7, (sum(len(item.sequences) for item in items),), generator=generator) / 2
    scored: list[Scored] = []
    start = 0
    for item in items:
        scored.append((scores[start : start + len(item.sequences)].tolist(), list(item.rankings)))
        start += len(item.sequences)
    naive = naive_metrics(scored, loss)
    metrics = score_metrics(items, scores, loss)
    naive["reward/score_scale"] = naive["reward/score_scale"] or 1.0
    assert {name: metrics[name] for name in naive} == pytest.approx(naive, rel=1e-5, abs=1e-5)
    assert float(ranking_loss_sum(items, scores, loss)) == pytest.approx(
        len(items) * naive["reward/eval_loss"], rel=1e-5, abs=1e-5
    )
    # Pieces of a batch add up to it.
    parts = [
        ranking_loss_sum([item], torch.tensor(of_item), loss) for item, (of_item, _) in zip(items, scored, strict=True)
    ]
    assert float(sum(parts)) == pytest.approx(len(items) * naive["reward/eval_loss"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_pairs_is_bit_for_bit_the_plain_sum(loss: RewardLoss) -> None:
    better, worse = torch.randn(64, generator=torch.Generator().manual_seed(1)).split(32)
    items, scores = pairs_of(better.tolist(), worse.tolist())
    plain = -torch.nn.functional.logsigmoid(better - worse).sum()
    found = ranking_loss_sum(items, scores, loss)
    assert torch.equal(found, plain) if loss == "pairwise" else torch.allclose(found, plain, rtol=1e-6, atol=0)


def test_a_prompt_fills_its_answers_at_one_length() -> None:
    assert answers_length(prompt_of(4, PAIR)) == 4 * 5


@pytest.mark.parametrize(("right", "ties", "wrong"), [(2, 1, 1), (10, 0, 0), (0, 0, 7), (30, 4, 6), (0, 5, 0)])
def test_the_interval_is_that_of_wilson_with_ties_as_one_half(right: int, ties: int, wrong: int) -> None:
    better = [1.0] * right + [0.0] * ties + [-1.0] * wrong
    metrics = score_metrics(*pairs_of(better, [0.0] * len(better)), "pairwise")
    share, count = (right + ties / 2) / len(better), len(better)
    low, high = proportions.wilson_by_bisection(share * count, count, 1.959964)
    assert metrics["reward/eval_accuracy"] == pytest.approx(share)
    assert (metrics["reward/eval_accuracy_low"], metrics["reward/eval_accuracy_high"]) == pytest.approx(
        (low, high), abs=1e-6
    )


def test_scores_that_are_all_alike_keep_a_scale_of_one() -> None:
    metrics = score_metrics(*pairs_of([0.7] * 3, [0.7] * 3), "pairwise")
    assert (metrics["reward/eval_accuracy"], metrics["reward/score_scale"]) == (0.5, 1.0)
    assert metrics["reward/eval_loss"] == pytest.approx(math.log(2))


# ---------------------------------------------------------------------------------------------------------- the stage


def check_saved(stage: StageRun, scored: Sequence[Scored], loss: RewardLoss) -> None:
    """Metrics of the saved model, scored anew; tolerance 1e-5."""
    expected = naive_metrics(scored, loss)
    assert {name: stage.summary[name] for name in expected} == pytest.approx(expected, abs=1e-5)
    config = json.loads((stage.directory / "config.json").read_text())
    assert config["threefold_score_mean"] == pytest.approx(expected["reward/score_mean"], abs=1e-5)
    assert config["threefold_score_scale"] == pytest.approx(expected["reward/score_scale"], abs=1e-5)
    assert config["pad_token_id"] is not None


def test_what_is_saved_is_what_is_reported(recipe_of: Any, tiny_run: Path, tmp_path: Path) -> None:
    recipe = recipe_of("--reward.max_steps=12", "--reward.batch_size=8", "--reward.learning_rate=3e-3")
    stage = run_stage("reward", recipe, tmp_path / "run", {"sft": tiny_run / "sft"})
    assert stage.summary["best_step"] > 0
    scored = score_by_transformers(stage.directory, shares(recipe)[1])
    assert all(len(scores) == 2 for scores, _ in scored)
    check_saved(stage, scored, "pairwise")


@pytest.mark.parametrize("loss", LOSSES)
def test_rankings_are_trained_and_measured_whole(
    ranked_recipe_of: Any, tiny_run: Path, tmp_path: Path, loss: RewardLoss
) -> None:
    """The first update's loss (to 1e-4) and the metrics, over all answers to a prompt, whatever rows rank them."""
    recipe = ranked_recipe_of("--reward.learning_rate=1e-12", f"--reward.loss={loss}")
    stage = run_stage("reward", recipe, tmp_path / "run", {"sft": tiny_run / "sft"})
    train, held_out = (score_by_transformers(stage.directory, share) for share in shares(recipe))
    assert {len(scores) for scores, _ in train} > {2}
    assert {len(ranked) for _, ranked in train} == {1, 2}
    assert stage.series("reward/loss")[0] == pytest.approx(naive_metrics(train, loss)["reward/eval_loss"], abs=1e-4)
    check_saved(stage, held_out, loss)
    share = stage.summary["reward/eval_accuracy"]
    low, high = proportions.wilson_by_bisection(share * len(held_out), len(held_out), 1.959964)
    found = (stage.summary["reward/eval_accuracy_low"], stage.summary["reward/eval_accuracy_high"])
    assert found == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_do_not_change_rankings(
    ranked_recipe_of: Any, tiny_run: Path, tmp_path: Path, loss: RewardLoss
) -> None:
    runs: list[StageRun] = []
    for size in (0, 2):
        overrides = ("--reward.batch_size=10", "--reward.max_steps=3", f"--reward.micro_batch_size={size}")
        recipe = ranked_recipe_of(*overrides, f"--reward.loss={loss}")
        runs.append(run_stage("reward", recipe, tmp_path / str(size), {"sft": tiny_run / "sft"}))
    for name in ("reward/loss", "reward/eval_loss", "reward/grad_norm", "reward/score_scale"):
        assert runs[0].series(name) == pytest.approx(runs[1].series(name), abs=1e-5), name


@pytest.mark.parametrize("loss", LOSSES)
def test_training_learns_rankings(ranked_recipe_of: Any, tiny_run: Path, tmp_path: Path, loss: RewardLoss) -> None:
    overrides = ("--reward.max_steps=40", "--reward.batch_size=12", "--reward.learning_rate=3e-3")
    stage = run_stage(
        "reward", ranked_recipe_of(*overrides, f"--reward.loss={loss}"), tmp_path / "run", {"sft": tiny_run / "sft"}
    )
    assert stage.summary["reward/eval_accuracy"] > 0.75
    assert stage.summary["reward/eval_loss"] < 0.8 * stage.summary["initial/reward/eval_loss"]


@pytest.mark.real
@pytest.mark.parametrize("name", ["oasst/en_100_tree.jsonl", "llama_factory/oaast_rm_zh.json"])
@pytest.mark.parametrize("loss", LOSSES)
def test_real_rankings_have_the_naive_loss(shared: Path, tmp_path: Path, name: str, loss: RewardLoss) -> None:
    """Scores drawn at random for each answer's text; the mean per prompt over all its pairs, to 1e-5."""
    source = shared / "models" / "stories260K"
    limits = ("--data.max_length=100000", "--model.chat_template=dialogue")
    recipe = recipe_maker(shared / "data" / name, tmp_path / "cache")(*limits)
    tokenizer = load_tokenizer(str(source))
    chat = build_chat_format(tokenizer, "dialogue", (), "stories260K")
    items = reward_items(open_library(recipe), chat, recipe)
    drawn: dict[tuple[int, ...], float] = {}
    generator = torch.Generator().manual_seed(3)

    def score(ids: tuple[int, ...]) -> float:
        return drawn.setdefault(ids, float(torch.randn((), generator=generator)))

    for part, examples in zip((list(items.train), list(items.eval)), shares(recipe), strict=True):
        rows_of_prompt: dict[bytes, list[Example]] = defaultdict(list)  # two prompts that differ in a blank are one
        for row in examples:
            if len(set(row.ranks or range(len(row.answers)))) > 1:
                rows_of_prompt[prompt_digest(row.prompt)].append(row)
        scored: list[Scored] = []
        for rows in rows_of_prompt.values():
            of_rows = [[sequence.ids for sequence in chat.comparison(row.prompt, row.answers)] for row in rows]
            answers = list(dict.fromkeys(ids for of_row in of_rows for ids in of_row))
            tiers = [ranking_of(row, ids, answers) for row, ids in zip(rows, of_rows, strict=True)]
            scored.append(([score(ids) for ids in answers], tiers))
        assert len(scored) == len(part)
        scores = torch.tensor([score(sequence.ids) for item in part for sequence in item.sequences])
        metrics, naive = score_metrics(part, scores, loss), naive_metrics(scored, loss)
        assert {key: metrics[key] for key in naive} == pytest.approx(naive, abs=1e-5)


def test_the_training_loss_is_bradley_and_terrys(recipe_of: Any, tiny_run: Path, tmp_path: Path) -> None:
    """The first update's loss, against scores of a model that one harmless step has saved; tolerance 1e-4."""
    recipe = recipe_of("--reward.learning_rate=1e-12")
    stage = run_stage("reward", recipe, tmp_path / "run", {"sft": tiny_run / "sft"})
    scored = score_by_transformers(stage.directory, shares(recipe)[0])
    losses = [math.log1p(math.exp(worse - better)) for (better, worse), _ in scored]
    assert stage.series("reward/loss")[0] == pytest.approx(math.fsum(losses) / len(losses), abs=1e-4)


def test_the_best_checkpoint_is_kept_with_its_own_statistics(recipe_of: Any, tiny_run: Path, tmp_path: Path) -> None:
    """A first step of rate 0, then a wreck: the saved weights and the saved mean are those of the first."""
    rates = ("--reward.scheduler=constant_with_warmup", "--reward.warmup_steps=1", "--reward.learning_rate=100")
    recipe = recipe_of("--reward.max_steps=2", "--reward.eval_every=1", *rates)
    stage = run_stage("reward", recipe, tmp_path / "run", {"sft": tiny_run / "sft"})
    losses, means = stage.series("reward/eval_loss")[1:], stage.series("reward/score_mean")[1:]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert (best, stage.summary["best_step"]) == (0, 1), losses
    assert abs(means[best] - means[-1]) > 1e-2
    saved = naive_metrics(score_by_transformers(stage.directory, shares(recipe)[1]), "pairwise")
    assert saved["reward/score_mean"] == pytest.approx(means[best], rel=1e-5, abs=1e-5)
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
    heads: list[Tensor] = []
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
