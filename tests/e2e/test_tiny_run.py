"""The whole pipeline, small: what a run leaves on disk, that other software can use it, that it repeats bit for bit."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.tiny import MODELS, read_metrics, same_weights, tiny_recipe, train, weights, without_times, write_recipe
from threefold.checkpoint.files import hash_of
from threefold.data.chat import build_chat_format
from threefold.engine.sharing import MicroBatching
from threefold.models.loading import generation_stop_ids, load_scalar_model, load_tokenizer
from threefold.pipeline import graph, step_keys
from threefold.stages.rollout import RewardScorer
from threefold.types import FinishReason, Message, Rollout

PAGE_METRICS = [
    "sft/loss",
    "sft/eval_perplexity",
    "reward/loss",
    "reward/eval_accuracy",
    "objective/kl",
    "objective/scores",
    "objective/rlhf_reward",
    "objective/entropy",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/ratio",
    "response_length/mean",
    "timing_s/generate",
    "timing_s/score",
    "timing_s/update",
    "perf/tokens_per_s",
    "parity/max_abs_logprob_diff",
]
CAUSAL = ("sft", "ppo/actor", "ppo/actor_ema")
QUESTION = [{"role": "user", "content": "What is 2 plus 3?"}]


def test_a_run_leaves_the_files_of_the_architecture_page(tiny_run: Path) -> None:
    for name in ("run.json", "metrics.jsonl", "samples.jsonl", "evaluation.json"):
        assert (tiny_run / name).is_file(), name
    for name in MODELS:
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            assert (tiny_run / name / file).is_file(), (name, file)
        assert (tiny_run / name / "chat_template.jinja").is_file(), name
        assert (tiny_run / name / "generation_config.json").is_file() == (name in CAUSAL)
    assert {path.name for path in tiny_run.iterdir()} == {
        *("run.json", "metrics.jsonl", "samples.jsonl", "evaluation.json"),
        *("data.json", "data_places.parquet", "tensorboard", "sft", "reward", "ppo", ".lock"),
    }, "nothing half-built is left"


def test_a_run_says_what_went_where(tiny_run: Path) -> None:
    """The manifest of the sources, the place of each row, and in each step's directory what it trained on."""
    (source,) = json.loads((tiny_run / "data.json").read_text())["sources"]
    assert (source["name"], source["format"], source["rows"]) == ("demo", "demo", 300)
    rows = pq.read_table(tiny_run / "data_places.parquet").to_pylist()
    assert len({row["origin"] for row in rows}) == len(rows) == 300
    for step in ("sft", "reward", "ppo"):
        record = json.loads((tiny_run / step / "data.json").read_text())
        assert set(record) == {"sources", "train", "eval"}
        (drawn,) = record["sources"].values()
        assert drawn["items"] == drawn["draws_per_pass"] == record["train"]["items"]
        for part in ("train", "eval"):
            placed = sum(row["step"] == step and row["part"] == part for row in rows)
            assert record[part]["examples"] == source["steps"][step][part]["examples"] == placed
            assert 0 < record[part]["items"] == placed - record[part]["dropped"] - record[part]["without"]


def test_run_json_and_stage_json_say_what_was_run_and_from_what(tiny_run: Path, tiny_recipe_file: Path) -> None:
    record = json.loads((tiny_run / "run.json").read_text())
    assert record["name"] == "tiny"
    assert record["recipe"] == tomllib.loads(tiny_recipe_file.read_text())
    assert {"threefold", "python", "torch", "transformers", "platform", "threads"} <= record["environment"].keys()
    assert record["keys"] == step_keys(graph(tiny_recipe()))
    stages = {name: json.loads((tiny_run / name / "stage.json").read_text()) for name in ("sft", "reward", "ppo")}
    for name, stage in stages.items():
        assert (stage["stage"], stage["key"]) == (name, record["keys"][name])
        assert stage["seconds"] > 0
        assert stage["key"] == hash_of({"format": 2, "settings": stage["settings"], "inputs": stage["inputs"]})
    assert stages["sft"]["inputs"] == {}
    assert stages["reward"]["inputs"] == {"sft": record["keys"]["sft"]}
    assert stages["ppo"]["inputs"] == {name: record["keys"][name] for name in ("sft", "reward")}


def test_metrics_have_the_names_of_the_architecture_page(tiny_run: Path) -> None:
    metrics = read_metrics(tiny_run)
    assert {record["stage"] for record in metrics} == {"sft", "reward", "ppo"}
    assert all(list(record)[:2] == ["stage", "step"] for record in metrics)
    seen = {name for record in metrics for name in record}
    assert set(PAGE_METRICS) <= seen
    assert all(value is not None for record in metrics for value in record.values()), "no number is missing or NaN"
    iterations = [record for record in metrics if "objective/kl" in record]
    assert [record["step"] for record in iterations] == [1, 2]
    assert all(set(PAGE_METRICS[4:]) <= record.keys() for record in iterations)
    assert all(record["timing_s/update"] > 0 and record["perf/tokens_per_s"] > 0 for record in iterations)


def test_tensorboard_shows_the_same_numbers(tiny_run: Path) -> None:
    metrics = read_metrics(tiny_run)
    for stage, name in (("sft", "sft/eval_loss"), ("reward", "reward/loss"), ("ppo", "objective/kl")):
        (directory,) = (tiny_run / "tensorboard").glob(f"{stage}-*")
        events = EventAccumulator(str(directory))
        events.Reload()
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        logged = [(record["step"], record[name]) for record in metrics if name in record]
        assert [step for step, _ in shown] == [step for step, _ in logged]
        assert [value for _, value in shown] == pytest.approx([value for _, value in logged], rel=1e-6, abs=1e-7)


def test_samples_and_evaluation(tiny_run: Path) -> None:
    samples = [json.loads(line) for line in (tiny_run / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3
    for sample in samples:
        assert set(sample) == {"prompt", "sft", "ppo", "ema"}
        assert sample["prompt"][-1]["role"] == "user"
        assert all({"answer", "score", "gold"} == set(sample[name]) for name in ("sft", "ppo", "ema"))
    evaluation = json.loads((tiny_run / "evaluation.json").read_text())
    assert (evaluation["num_prompts"], evaluation["answers_per_prompt"]) == (5, 2)
    assert set(evaluation["models"]) == {"sft", "ppo", "ema"}
    sft = evaluation["models"]["sft"]
    assert sft["win_rate_by_score"]["mean"] == sft["win_rate_by_gold"]["mean"] == 0.5, "all answers tie with themselves"
    assert abs(sft["kl_per_answer"]) < 1e-4, "a model is where it is"
    assert 0 <= evaluation["reward_clean_accuracy"]["mean"] <= 1


@pytest.mark.parametrize("name", CAUSAL)
def test_plain_transformers_loads_and_runs_an_actor(tiny_run: Path, name: str) -> None:
    directory = tiny_run / name
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.dtype == torch.float32
    stop_ids = model.generation_config.eos_token_id
    assert stop_ids == [tokenizer.convert_tokens_to_ids("<|end|>")], "a list, of what ends an answer"
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == model.config.pad_token_id
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    ours = build_chat_format(load_tokenizer(str(directory)), "tokenizer", generation_stop_ids(str(directory)))
    assert tuple(ids) == ours.prompt_ids([Message("user", QUESTION[0]["content"])])
    answer = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > len(ids)


def test_plain_transformers_scores_as_we_do(tiny_run: Path) -> None:
    """Answers that stopped and answers that were cut, in one padded batch; tolerance 1e-5."""
    directory = tiny_run / "reward"
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    assert model.config.num_labels == 1
    chat = build_chat_format(load_tokenizer(str(directory)), "tokenizer")
    prompts = [(Message("user", text),) for text in ("Hi", "What is 2 plus 3?", "Sort b, c, a please")]
    rollouts = []
    for messages, answer in zip(prompts, ("Hello there!", "5", "It is a b c, I think"), strict=True):
        for finished, ids in ((True, chat.answer_ids), (False, chat.unfinished_answer_ids)):
            response = torch.tensor(ids(messages, answer))
            zeros = torch.zeros(len(response))
            reason: FinishReason = "stop" if finished else "length"
            rollouts.append(Rollout(torch.tensor(chat.prompt_ids(messages)), response, zeros, zeros, reason, 0))
    scorer = RewardScorer(
        load_scalar_model(str(directory)), chat, chat, False, torch.device("cpu"), torch.float32, MicroBatching()
    )
    ours = scorer([messages for messages in prompts for _ in range(2)], rollouts)
    whole = [torch.cat([rollout.prompt_ids, rollout.response_ids]) for rollout in rollouts]
    batch = torch.full((len(whole), max(map(len, whole))), chat.pad_id)
    mask = torch.zeros_like(batch)
    for row, tokens in enumerate(whole):
        batch[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    with torch.no_grad():
        theirs = model(input_ids=batch, attention_mask=mask).logits.squeeze(-1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_critic_was_trained_and_keeps_the_reward_models_statistics(tiny_run: Path) -> None:
    before, after = weights(tiny_run / "reward"), weights(tiny_run / "ppo" / "critic")
    assert before.keys() == after.keys()
    assert not torch.equal(before["score.weight"], after["score.weight"])
    configs = [json.loads((tiny_run / name / "config.json").read_text()) for name in ("reward", "ppo/critic")]
    assert configs[0]["threefold_score_scale"] == configs[1]["threefold_score_scale"]
    assert configs[0]["threefold_score_mean"] == configs[1]["threefold_score_mean"]


def test_actor_average_and_start_are_three_different_models(tiny_run: Path) -> None:
    pairs = (("sft", "ppo/actor"), ("sft", "ppo/actor_ema"), ("ppo/actor", "ppo/actor_ema"))
    assert not any(same_weights(tiny_run / first, tiny_run / second) for first, second in pairs)


def test_the_same_recipe_and_seed_give_the_same_numbers_and_weights(
    tiny_run: Path, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    torch.manual_seed(99)  # what ran before in this process must not matter
    assert train(tiny_recipe_file, other) == 0
    assert without_times(read_metrics(other)) == without_times(read_metrics(tiny_run))
    assert all(same_weights(other / name, tiny_run / name) for name in MODELS)
    assert (other / "samples.jsonl").read_bytes() == (tiny_run / "samples.jsonl").read_bytes()
    records = [json.loads((run / "evaluation.json").read_text()) for run in (other, tiny_run)]
    assert records[0] | {"seconds": 0} == records[1] | {"seconds": 0}


def test_one_stage_at_a_time_gives_the_same_weights_as_all_at_once(
    tiny_run: Path, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "stepwise"
    for number in ("1", "2", "3"):
        assert train(tiny_recipe_file, other, "--step", number) == 0
    assert all(same_weights(other / name, tiny_run / name) for name in MODELS)


def test_another_seed_gives_other_weights(tiny_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "seed"
    assert train(write_recipe(tmp_path / "tiny.toml", "--run.seed=7"), other, "--step", "1") == 0
    assert not same_weights(other / "sft", tiny_run / "sft")
