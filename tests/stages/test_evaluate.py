"""The closing comparison, worked again from its own samples and by naive loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.oracles.proportions import wilson_by_bisection
from tests.tiny import stage_context, tiny_recipe
from threefold.data.demo import gold_score
from threefold.metrics import RunLog
from threefold.stages import evaluate
from threefold.types import Message, Prompt, Rollout


@pytest.fixture(scope="module")
def comparison(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One answer each to all prompts, so that the samples are all there is."""
    directory = tmp_path_factory.mktemp("evaluate")
    recipe = tiny_recipe("--evaluate.answers_per_prompt=1", "--evaluate.num_prompts=9", "--evaluate.num_samples=9")
    inputs = {name: tiny_run / name for name in ("sft", "reward", "ppo")}
    log = RunLog(directory, Console(quiet=True))
    with log.stage("evaluate", "0" * 8):
        found = evaluate.run(stage_context("evaluate", recipe, directory, inputs, log))
    log.close()
    return found


def test_every_number_follows_from_the_samples(comparison: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    result, samples = comparison
    assert (len(samples), result["num_prompts"]) == (9, 9)
    for name, model in result["models"].items():
        for measure in ("score", "gold"):
            ours = [sample[name][measure] for sample in samples]
            sft = [sample["sft"][measure] for sample in samples]
            wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, sft, strict=True)]
            shown = model[measure]
            mean = math.fsum(ours) / 9
            half = 1.959964 * math.sqrt(math.fsum((value - mean) ** 2 for value in ours) / 8 / 9)
            assert (shown["mean"], shown["low"], shown["high"], shown["count"]) == pytest.approx(
                (mean, mean - half, mean + half, 9), abs=1e-6
            )
            shown = model[f"win_rate_by_{measure}"]
            low, high = wilson_by_bisection(math.fsum(wins), 9, 1.959964)
            assert (shown["mean"], shown["low"], shown["high"], shown["count"]) == pytest.approx(
                (math.fsum(wins) / 9, low, high, 9), abs=1e-6
            )


def test_gold_scores_are_those_of_the_answers(comparison: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    """Whether an answer stopped is not in the sample; the gold score must be that of one or the other."""
    for sample in comparison[1]:
        prompt = Prompt(tuple(Message(m["role"], m["content"]) for m in sample["prompt"]))
        for name in ("sft", "ppo", "ema"):
            possible = {gold_score(prompt, sample[name]["answer"], stopped) for stopped in (True, False)}
            assert sample[name]["gold"] in possible


def test_a_model_is_compared_with_itself_as_equal(comparison: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    sft = comparison[0]["models"]["sft"]
    low, high = wilson_by_bisection(4.5, 9, 1.959964)
    assert sft["win_rate_by_gold"] == pytest.approx({"mean": 0.5, "low": low, "high": high, "count": 9}, abs=1e-6)
    assert abs(sft["kl_per_answer"]) < 1e-4
    assert comparison[0]["models"]["ppo"]["kl_per_answer"] != 0


def test_reward_clean_accuracy_by_hand(
    comparison: tuple[dict[str, Any], list[dict[str, Any]]], tiny_run: Path, tmp_path: Path
) -> None:
    """Held-out pairs put in order by the gold score, scored one by one with transformers."""
    recipe = tiny_recipe()
    context = stage_context("again", recipe, tmp_path, log=RunLog(tmp_path, Console(quiet=True)))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_run / "reward")
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "reward")
    wins = []
    for example in context.library.examples("reward", "eval"):
        scores = []
        for answer in sorted(example.answers, key=lambda a: -gold_score(example.prompt, a, True)):
            messages = [{"role": m.role, "content": m.content} for m in example.prompt.messages]
            messages.append({"role": "assistant", "content": answer})
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
            with torch.no_grad():
                scores.append(float(model(input_ids=ids).logits) if ids.shape[1] <= recipe.data.max_length else None)
        if None not in scores:
            wins.append(scores[0] > scores[1])
    context.log.close()
    shown = comparison[0]["reward_clean_accuracy"]
    assert shown["count"] == len(wins)
    assert shown["mean"] == pytest.approx(sum(wins) / len(wins))
    assert shown["low"] < shown["mean"] < shown["high"] or shown["mean"] in (0, 1)


def test_description_by_hand(tiny_run: Path) -> None:
    """Two prompts with two answers each: the interval is over prompts, lengths and stops over answers."""

    def rollout(ids: list[int], reason: Any) -> Rollout:
        zeros = torch.zeros(len(ids))
        return Rollout(torch.tensor([1]), torch.tensor(ids), zeros, zeros, reason, 0)

    ours = evaluate.Answers(
        [rollout([5, 6, 7], "stop"), rollout([5, 6], "stop"), rollout([9], "stop"), rollout([5, 6, 5, 6], "length")],
        ["a", "b", "a", "c"], [1.0, 2.0, 3.0, 0.0], [], [],
    )  # fmt: skip
    sft = evaluate.Answers(ours.rollouts, ours.texts, [0.0, 2.0, 4.0, 1.0], [], [])
    found = evaluate._describe(ours, sft, [1.0, 2.0, 3.0, 6.0], 2)
    assert found["score"]["mean"] == 1.5
    assert found["score"]["low"] == found["score"]["high"] == 1.5, "both prompts have the same mean"
    assert found["win_rate_by_score"]["mean"] == (1 + 0.5 + 0 + 0) / 4
    assert found["win_rate_by_score"]["count"] == 2
    assert found["kl_per_answer"] == 3.0
    assert found["mean_length_tokens"] == 2.5
    assert found["stopped"] == 0.75
    assert found["distinct_answers_per_prompt"] == 1.0
    # the first prompt's bigrams: 56 67 | 56, two of three; the second's: none | 56 65 56, two of three
    assert found["distinct_2_per_prompt"] == pytest.approx(2 / 3)
    # bigrams: 56 67 | 56 | - | 56 65 56: six of them, three different
    assert found["distinct_2"] == 3 / 6
    assert "gold" not in found
    assert "final_answer_accuracy" not in found


def test_final_answers_are_counted_by_prompt(comparison: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    """Three prompts that can be checked, two answers each, shares 1, 1/2 and 0 of them right."""
    zeros = torch.zeros(1)
    rollouts = [Rollout(torch.tensor([1]), torch.tensor([5]), zeros, zeros, "stop", 0)] * 8
    ours = evaluate.Answers(rollouts, ["a"] * 8, [0.0] * 8, [], [1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    low, high = wilson_by_bisection(1.5, 3, 1.959964)
    found = evaluate._describe(ours, ours, [0.0] * 8, 2)["final_answer_accuracy"]
    assert found == pytest.approx({"mean": 0.5, "low": low, "high": high, "count": 3}, abs=1e-6)
    assert all("final_answer_accuracy" not in model for model in comparison[0]["models"].values())


def test_the_models_answer_from_the_same_random_numbers(tiny_run: Path, tmp_path: Path) -> None:
    """With ppo/ replaced by step 1's model its answers are step 1's."""
    fake = tmp_path / "ppo"
    fake.mkdir()
    (fake / "actor").symlink_to(tiny_run / "sft", target_is_directory=True)
    inputs = {"sft": tiny_run / "sft", "reward": tiny_run / "reward", "ppo": fake}
    log = RunLog(tmp_path, Console(quiet=True))
    result, samples = evaluate.run(stage_context("evaluate", tiny_recipe(), tmp_path, inputs, log))
    log.close()
    assert set(result["models"]) == {"sft", "ppo"}
    assert result["models"]["ppo"] == result["models"]["sft"]
    assert all(sample["ppo"] == sample["sft"] for sample in samples)
    assert AutoModelForCausalLM.from_pretrained(fake / "actor").config.vocab_size == 320
