"""The three steps with adapters: what they change, what they save, and what the steps after them start from."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.tiny import StageRun, file_stamps, rewritten, run_stage, same_weights, tiny_recipe, train, weights
from threefold.config.recipe import LoRASection
from threefold.data.collate import collate_rollouts
from threefold.models.adapters import add_lora
from threefold.models.forward import CausalForward
from threefold.models.loading import load_causal_lm
from threefold.stages.rollout import Reference
from threefold.types import Rollout

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # by peft's own wrapper

RANK = 2
LAYERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
IDS = torch.tensor([[5, 9, 17, 33, 120, 7], [2, 40, 41, 42, 43, 44]])
STEP_1 = (
    "--sft.lora.rank=2",
    "--sft.epochs=40",
    "--sft.max_steps=90",
    "--sft.eval_every=15",
    "--sft.learning_rate=3e-2",
)
STEP_2 = ("--reward.lora.rank=2", "--reward.epochs=9", "--reward.max_steps=40", "--reward.learning_rate=1e-2")


def run_step_1(tiny_run: Path, directory: Path, *overrides: str) -> StageRun:
    return run_stage("sft", tiny_recipe(f"--model.actor={tiny_run / 'sft'}", *STEP_1, *overrides), directory)


@pytest.fixture(scope="module")
def step_1(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> StageRun:
    """The tiny run's model, fine-tuned once more."""
    return run_step_1(tiny_run, tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def step_2(step_1: StageRun, tmp_path_factory: pytest.TempPathFactory) -> StageRun:
    """A reward model from the result of `step_1`."""
    return run_stage("reward", tiny_recipe(*STEP_2), tmp_path_factory.mktemp("reward"), {"sft": step_1.directory})


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def check_difference(start: dict[str, Tensor], end: dict[str, Tensor]) -> None:
    """Just the matrices of the blocks have changed, each by a matrix of the adapters' rank."""
    assert {name for name in start if not torch.equal(start[name], end[name])} == {
        name for name in start if name.endswith(LAYERS)
    }
    for name in start:
        if name.endswith(LAYERS):
            difference = end[name].double() - start[name].double()
            assert int(torch.linalg.matrix_rank(difference, atol=1e-4)) == RANK, name


def test_step_1_learns_and_changes_only_the_matrices_of_the_blocks(step_1: StageRun, tiny_run: Path) -> None:
    first, *_, last = step_1.series("sft/eval_loss")
    assert last < first - 0.1
    check_difference(weights(tiny_run / "sft"), weights(step_1.directory))


def test_step_2_learns_and_changes_only_the_matrices_and_the_head(step_1: StageRun, step_2: StageRun) -> None:
    losses = step_2.series("reward/loss")  # on what it trains on: so few pairs teach nothing about others
    assert math.fsum(losses[-5:]) / 5 < losses[0] - 0.1
    end = weights(step_2.directory)
    head = end.pop("score.weight")
    start = {name: weight for name, weight in weights(step_1.directory).items() if name in end}
    assert start.keys() == end.keys()
    check_difference(start, end)
    drawn = torch.randn(head.shape, generator=torch.Generator().manual_seed(tiny_recipe().run.seed)) / math.sqrt(33)
    assert float((head - drawn).abs().max()) > 1e-3


def test_what_step_1_saves_is_what_it_measured(step_1: StageRun, tiny_run: Path, tmp_path: Path) -> None:
    """A whole-model run from the saved directory has the same held-out loss before its first update; tolerance 1e-5."""
    again = run_stage("sft", tiny_recipe(f"--model.actor={step_1.directory}", "--sft.max_steps=1"), tmp_path)
    assert again.summary["initial/sft/eval_loss"] == pytest.approx(step_1.summary["sft/eval_loss"], abs=1e-5)


@pytest.mark.parametrize("step", [1, 2])
def test_the_adapters_on_their_base_model_are_the_saved_model(
    step: int, step_1: StageRun, step_2: StageRun, tiny_run: Path
) -> None:
    """By peft's own loader and forward; tolerance 1e-5."""
    if step == 1:
        auto, directory = AutoModelForCausalLM, step_1.directory
        base = auto.from_pretrained(tiny_run / "sft")
    else:
        auto, directory = AutoModelForSequenceClassification, step_2.directory
        base = auto.from_pretrained(step_1.directory, num_labels=1)
        base.config.pad_token_id = auto.from_pretrained(directory).config.pad_token_id
    before, saved = logits(base), logits(auto.from_pretrained(directory))
    theirs = peft.PeftModel.from_pretrained(base, directory / "adapter")
    torch.testing.assert_close(logits(theirs), saved, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, saved, atol=1e-2)
    name = theirs.peft_config["default"].base_model_name_or_path
    assert Path(name) == (tiny_run / "sft" if step == 1 else step_1.directory)


def test_it_is_repeatable_and_the_seed_counts(step_1: StageRun, tiny_run: Path, tmp_path: Path) -> None:
    same = run_step_1(tiny_run, tmp_path / "same")
    assert same_weights(same.directory, step_1.directory)
    assert same.series("sft/loss") == step_1.series("sft/loss")


def test_the_dropout_of_the_adapters_is_their_own(step_1: StageRun, tiny_run: Path, tmp_path: Path) -> None:
    """At first B is zero and dropout before it changes nothing; from the second step on it does."""
    other = run_step_1(tiny_run, tmp_path, "--sft.lora.dropout=0.4")
    ours, theirs = step_1.series("sft/loss"), other.series("sft/loss")
    assert ours[0] == theirs[0]
    assert abs(ours[5] - theirs[5]) > 1e-4


def test_a_run_with_adapters_goes_on_from_merged_weights(tmp_path: Path, tiny_recipe_file: Path) -> None:
    settings = ("--sft.lora.rank=2", "--reward.lora.rank=2")
    assert train(tiny_recipe_file, tmp_path / "run", *settings, "--step", "1") == 0
    before = file_stamps(tmp_path / "run")
    assert train(tiny_recipe_file, tmp_path / "run", *settings, "--step", "1", "2") == 0
    assert rewritten(before, file_stamps(tmp_path / "run")) == {"reward"}
    sft, reward = (weights(tmp_path / "run" / name) for name in ("sft", "reward"))
    frozen = [name for name in reward if name in sft and not name.endswith(LAYERS)]
    assert frozen
    assert all(torch.equal(sft[name], reward[name]) for name in frozen)
    before = file_stamps(tmp_path / "run")
    assert train(tiny_recipe_file, tmp_path / "run", *settings, "--reward.lora.alpha=1", "--step", "1", "2") == 0
    assert rewritten(before, file_stamps(tmp_path / "run")) == {"reward"}


@pytest.mark.parametrize("step", [1, 2])
def test_names_that_fit_no_layer_are_one_line(
    step: int, tmp_path: Path, tiny_run: Path, tiny_recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {1: "sft", 2: "reward"}[step]
    settings = [f"--{section}.lora.rank=2", f"--{section}.lora.target_modules=q_proj,query"]
    assert train(tiny_recipe_file, tmp_path / "run", *settings, "--step", *map(str, range(1, step + 1))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{section}.lora.target_modules = ['q_proj', 'query']" in error
    assert "choose from fc1, fc2, k_proj, out_proj, q_proj, v_proj" in error


def test_step_3_trains_adapters_against_the_same_model_without_them(
    step_1: StageRun, step_2: StageRun, tmp_path: Path
) -> None:
    """Before the first update the policy is its reference, afterwards it is not; what is saved gives the answers that
    were measured."""
    settings = ("--ppo.actor_lora.rank=2", "--ppo.critic_lora.rank=2", "--ppo.actor_learning_rate=2e-2")
    inputs = {"sft": step_1.directory, "reward": step_2.directory}
    stage = run_stage("ppo", tiny_recipe(*settings, "--ppo.kl_coef=0"), tmp_path / "run", inputs)
    assert stage.summary["initial/ppo/eval_kl"] == pytest.approx(0, abs=1e-4)
    assert abs(stage.summary["ppo/eval_kl"]) > 1e-3
    start = weights(step_1.directory)
    check_difference(start, weights(stage.directory / "actor"))
    averaged = weights(stage.directory / "actor_ema")
    assert {name for name in start if not torch.equal(start[name], averaged[name])} == {
        name for name in start if name.endswith(LAYERS)
    }
    critic, reward = weights(stage.directory / "critic"), weights(step_2.directory)
    assert not torch.equal(critic.pop("score.weight"), reward.pop("score.weight"))
    check_difference(reward, critic)

    again = tiny_recipe("--ppo.iterations=1", "--ppo.actor_learning_rate=1e-30", "--ppo.critic_learning_rate=1e-30")
    same = run_stage("ppo", again, tmp_path / "again", {**inputs, "sft": stage.directory / "actor"})
    assert same.summary["initial/ppo/eval_score"] == pytest.approx(stage.summary["ppo/eval_score"], abs=1e-4)


def test_step_3_trains_the_head_against_the_model_with_the_head_from_before(
    step_1: StageRun, step_2: StageRun, tmp_path: Path
) -> None:
    """It gets a matrix of its own, which the average follows; the embeddings stay, and the policy starts as its
    reference."""
    settings = ("--ppo.actor_lora.rank=2", "--ppo.actor_lora.train_heads=true", "--ppo.actor_learning_rate=2e-2")
    inputs = {"sft": step_1.directory, "reward": step_2.directory}
    stage = run_stage("ppo", tiny_recipe(*settings, "--ppo.kl_coef=0"), tmp_path / "run", inputs)
    assert stage.summary["initial/ppo/eval_kl"] == pytest.approx(0, abs=1e-4)
    assert abs(stage.summary["ppo/eval_kl"]) > 1e-3
    start, actor, average = (
        weights(d) for d in (step_1.directory, *(stage.directory / n for n in ("actor", "actor_ema")))
    )
    embedding = "model.decoder.embed_tokens.weight"
    for end in (actor, average):
        assert end.keys() == start.keys() | {"lm_head.weight"}
        assert torch.equal(end[embedding], start[embedding])
        assert not torch.equal(end["lm_head.weight"], start[embedding])
    assert not torch.equal(actor["lm_head.weight"], average["lm_head.weight"])

    again = tiny_recipe("--ppo.iterations=1", "--ppo.actor_learning_rate=1e-30", "--ppo.critic_learning_rate=1e-30")
    same = run_stage("ppo", again, tmp_path / "again", {**inputs, "sft": stage.directory / "actor"})
    assert same.summary["initial/ppo/eval_score"] == pytest.approx(stage.summary["ppo/eval_score"], abs=1e-4)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (the extra qlora)"
)
def test_a_run_on_packed_weights(tmp_path: Path, tiny_recipe_file: Path) -> None:
    """All three steps; each saves a plain model of which it measured the results."""
    sections = ("sft.lora", "reward.lora", "ppo.actor_lora", "ppo.critic_lora")
    settings = [f"--{s}.{f}" for s in sections for f in ("rank=2", "quantise_base=nf4")]
    run = tmp_path / "run"
    assert train(tiny_recipe_file, run, *settings, "--sft.lora.train_heads=true") == 0
    for name in ("sft", "reward", "ppo/actor", "ppo/actor_ema", "ppo/critic"):
        assert {tensor.dtype for tensor in weights(run / name).values()} == {torch.float32}
        assert "quant" not in (run / name / "config.json").read_text()
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [line["sft/eval_loss"] for line in log if "sft/eval_loss" in line]
    again = run_stage("sft", tiny_recipe(f"--model.actor={run / 'sft'}", "--sft.max_steps=1"), tmp_path / "again")
    assert again.summary["initial/sft/eval_loss"] == pytest.approx(min(measured), abs=1e-5)


def test_the_reference_stays_the_model_of_step_1_whatever_the_adapters_become(step_1: StageRun) -> None:
    """Bit for bit the log-probs of a second copy of that model."""
    zeros, prompt = torch.zeros(4), torch.tensor([5, 9, 17])
    rollouts = [Rollout(prompt[:size], IDS[0, :4], zeros, zeros, "length", 0) for size in (3, 2)]
    batch = collate_rollouts(rollouts, pad_id=0)
    actor, copy = (CausalForward(load_causal_lm(str(step_1.directory))) for _ in range(2))
    expected = Reference(copy).logprobs(batch, 0.7)
    add_lora(actor.model, LoRASection(rank=RANK), 0, "ppo.actor_lora")
    reference = Reference(actor, is_actor=True)
    for _ in range(2):
        assert torch.equal(reference.logprobs(batch, 0.7), expected)
        with torch.no_grad():
            for name, parameter in actor.model.named_parameters():
                if ".lora_" in name:
                    parameter.add_(0.3)
        assert not torch.allclose(
            actor.target_logprobs(batch.input_ids, batch.target_mask, 0.7)[0], expected, atol=1e-2
        )
