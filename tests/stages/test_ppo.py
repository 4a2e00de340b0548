"""Step 3 as a whole, run from the finished steps 1 and 2 of the tiny run."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.oracles import ppo as ppo_oracle
from tests.tiny import StageRun, finished, run_stage, same_weights, stage_context, tiny_recipe, weights
from threefold.data.blend import Blend, make_blend
from threefold.errors import ConfigError, TrainingError
from threefold.stages import ppo, ppo_update
from threefold.stages.ppo import prompt_batches
from threefold.stages.ppo_progress import Progress
from threefold.stages.ppo_setup import set_up
from threefold.stages.ppo_update import explained_variance
from threefold.stages.rollout import make_experience
from threefold.types import Experience, Message, PreparedPrompt, Prompt, Rollout

Ppo = Callable[..., StageRun]
TEXTS = [f"Once there was a {animal} who went to the {place}." for animal, place in
         itertools.product(("dog", "cat", "bird", "fox", "hen"), ("wood", "sea", "hill", "farm"))]  # fmt: skip


@pytest.fixture
def run_ppo(tiny_run: Path, tmp_path: Path) -> Ppo:
    """Runs step 3 with `--ppo.` overrides, each call in its own directory."""
    numbers = itertools.count()

    def run(*overrides: str) -> StageRun:
        recipe = tiny_recipe(*(f"--ppo.{override}" for override in overrides))
        return run_stage("ppo", recipe, tmp_path / str(next(numbers)), finished(tiny_run))

    return run


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(TEXTS))
    return path


def test_the_ratio_is_one_at_every_iterations_first_update(run_ppo: Ppo) -> None:
    """Within 1e-4 in float32, after the actor has moved, with a temperature and with a restricted sampler."""
    for overrides in ((), ("sampling.temperature=0.6", "sampling.top_k=20", "sampling.min_new_tokens=4")):
        stage = run_ppo("iterations=4", "micro_batch_size=5", *overrides)
        errors = stage.series("val/first_ratio_error")
        assert len(errors) == 4
        assert max(errors) <= 1e-4
        assert max(stage.series("parity/max_abs_logprob_diff")) <= 1e-4
        assert max(errors) > 0, "it was measured"
        assert max(stage.series("policy/approxkl_avg")) > 1e-6, "and the later updates did move the policy"


def test_one_update_per_iteration_sees_a_ratio_of_one_throughout(run_ppo: Ppo) -> None:
    stage = run_ppo("iterations=3", "ppo_epochs=1", "minibatches=1")
    assert stage.series("val/ratio") == pytest.approx([1.0] * 3, abs=1e-4)
    assert stage.series("policy/clipfrac_avg") == [0.0] * 3
    assert max(map(abs, stage.series("policy/approxkl_avg"))) < 1e-6
    # Whitened advantages have mean 0 over the one minibatch, and the ratio is 1.
    assert stage.series("loss/policy_avg") == pytest.approx([0.0] * 3, abs=1e-5)
    assert not same_weights(stage.directory / "actor", stage.directory / "actor_ema")


def test_micro_batches_do_not_change_the_metrics(run_ppo: Ppo, stories: Path) -> None:
    """12 answers in minibatches of 6, in pieces of 4 and of 1, mixture and entropy bonus on; tolerance 1e-5."""
    text = (f"mixture.source={stories}", "mixture.chunk_length=16", "mixture.batch_size=3", "mixture.eval_documents=4")
    whole = run_ppo(*text, "entropy_coef=0.01")
    for size in (4, 1):
        pieces = run_ppo(*text, "entropy_coef=0.01", f"micro_batch_size={size}")
        for ours, theirs in zip(whole.metrics, pieces.metrics, strict=True):
            names = [name for name in ours if not name.startswith(("timing_s/", "memory/", "perf/", "stage"))]
            # What these two measure is rounding itself.
            names = [name for name in names if name not in ("val/first_ratio_error", "parity/max_abs_logprob_diff")]
            assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, abs=1e-5, rel=1e-5)


def test_four_epochs_of_four_minibatches_run_and_stay_finite(run_ppo: Ppo) -> None:
    stage = run_ppo("iterations=3", "ppo_epochs=4", "minibatches=4")
    assert all(math.isfinite(value) for record in stage.metrics for key, value in record.items() if key != "stage")
    assert max(stage.series("val/first_ratio_error")) <= 1e-4
    assert max(stage.series("policy/clipfrac_avg")) > 0, "the clip had something to do"
    assert all(0.5 < ratio < 2 for ratio in stage.series("val/ratio"))
    assert stage.series("policy/stopped_early") == [0.0] * 3


def test_target_kl_ends_an_iterations_updates(run_ppo: Ppo) -> None:
    """A bound so low that the second minibatch is beyond it: one step each, against 16 without the bound."""
    free = run_ppo("iterations=1", "ppo_epochs=4", "minibatches=4")
    bound = run_ppo("iterations=1", "ppo_epochs=4", "minibatches=4", "target_kl=1e-9")
    assert bound.series("policy/stopped_early") == [1.0]
    assert bound.series("policy/approxkl_avg")[0] < free.series("policy/approxkl_avg")[0]
    one_step = run_ppo("iterations=1", "ppo_epochs=1", "minibatches=4", "target_kl=1e-9", "scheduler=constant")
    held = run_ppo("iterations=1", "ppo_epochs=4", "minibatches=4", "target_kl=1e-9", "scheduler=constant")
    for name in ("actor", "critic"):
        assert same_weights(one_step.directory / name, held.directory / name), "what came after was discarded"
    loose = run_ppo("iterations=1", "ppo_epochs=4", "minibatches=4", "target_kl=1e9")
    assert loose.series("policy/stopped_early") == [0.0]


def test_gradients_of_an_update_that_was_stopped_are_discarded(tiny_run: Path, tmp_path: Path) -> None:
    """Left behind, they would enter the next iteration's first step."""
    recipe = tiny_recipe("--ppo.target_kl=1e-9", "--ppo.minibatches=4")
    context = stage_context("ppo", recipe, tmp_path, finished(tiny_run))
    setup = set_up(context)
    batch_of_prompts = next(prompt_batches(setup.prompts, setup.blend, recipe.ppo))
    rollouts = ppo.sample(context, setup, batch_of_prompts)
    batch = make_experience(batch_of_prompts, rollouts, setup.scorers, recipe.ppo, 0.1)
    progress = Progress(0.1, rollouts=rollouts, batch=batch)
    assert ppo._update(context, setup, progress, None, lambda _: None)["policy/stopped_early"] == 1.0
    assert progress.update.done == 1
    for engine in (setup.learners.actor, setup.learners.critic):
        assert engine.num_steps == 1
        assert all(parameter.grad is None for parameter in engine.model.parameters())
    context.log.close()


def test_the_adaptive_controller_moves_the_coefficient_as_ziegler_says(run_ppo: Ppo) -> None:
    adaptive = ("kl_controller=adaptive", "kl_horizon=24", "iterations=5", "actor_learning_rate=1e-2")
    low = run_ppo(*adaptive, "kl_target=1e-3")
    kl, coefficients = low.series("objective/kl"), low.series("objective/kl_coef")
    for step in range(4):
        expected = ppo_oracle.next_kl_coef(coefficients[step], kl[step], 1e-3, 12, 24)
        assert coefficients[step + 1] == pytest.approx(expected, rel=1e-6)
    assert coefficients[0] == 0.1
    assert any(after > before for before, after in itertools.pairwise(coefficients)), "it was beyond the target"
    high = run_ppo(*adaptive, "kl_target=1e3").series("objective/kl_coef")
    assert high == pytest.approx([0.1 * 0.9**step for step in range(5)])
    fixed = run_ppo("iterations=2")
    assert fixed.series("objective/kl_coef") == [0.1, 0.1]


def test_critic_warm_up_leaves_the_actor_as_it_was(run_ppo: Ppo, tiny_run: Path) -> None:
    after = run_ppo("iterations=3", "critic_warmup_iterations=2", "scheduler=linear")
    assert after.series("val/ratio")[:2] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert after.series("objective/kl") == pytest.approx([0.0] * 3, abs=1e-3), "the third samples before it learns"
    assert len(after.series("policy/grad_norm")) == 1
    assert len(after.series("val/grad_norm")) == 3
    assert not same_weights(after.directory / "critic", tiny_run / "reward")
    assert after.series("policy/learning_rate") == pytest.approx([1e-3 * (1 + 0.75 + 0.5 + 0.25) / 4]), (
        "the actor's schedule covers its own steps"
    )
    assert not same_weights(after.directory / "actor", tiny_run / "sft")


def test_the_average_is_that_of_the_actors_steps(run_ppo: Ppo, tiny_run: Path) -> None:
    """One step: ema = decay * start + (1 - decay) * actor; and with decay 0 it is the actor."""
    one = ("iterations=1", "ppo_epochs=1", "minibatches=1")
    stage = run_ppo(*one, "ema.decay=0.75")
    start, actor = weights(tiny_run / "sft"), weights(stage.directory / "actor")
    for name, average in weights(stage.directory / "actor_ema").items():
        torch.testing.assert_close(average, 0.75 * start[name] + 0.25 * actor[name], rtol=0, atol=1e-6)
    none = run_ppo("ema.decay=0.0")
    assert same_weights(none.directory / "actor_ema", none.directory / "actor")
    off = run_ppo(*one, "ema.enabled=false")
    assert not (off.directory / "actor_ema").exists()
    assert same_weights(off.directory / "actor", stage.directory / "actor"), "the average does not touch training"


def test_mixture_training_keeps_the_texts_perplexity(run_ppo: Ppo, stories: Path) -> None:
    """coef 0 measures and changes nothing; a coefficient above 0 trains on the text."""
    text = (f"mixture.source={stories}", "mixture.chunk_length=16", "mixture.batch_size=8", "mixture.eval_documents=4")
    without = run_ppo("iterations=4")
    measured = run_ppo("iterations=4", *text, "mixture.coef=0")
    trained = run_ppo("iterations=4", *text, "mixture.coef=1")
    assert not without.series("ppo/eval_text_perplexity")
    assert same_weights(without.directory / "actor", measured.directory / "actor")
    first, last = measured.series("ppo/eval_text_perplexity")
    again, kept = trained.series("ppo/eval_text_perplexity")
    assert first == again
    assert kept < 0.9 * last
    assert trained.summary["initial/ppo/eval_text_perplexity"] == first
    assert trained.summary["ppo/eval_text_perplexity"] == kept


def test_text_perplexity_is_that_of_transformers(run_ppo: Ppo, stories: Path) -> None:
    """exp(mean loss) over all tokens of the last documents, each with its marks; tolerance 1e-4 relative."""
    text = (f"mixture.source={stories}", "mixture.chunk_length=16", "mixture.eval_documents=4", "mixture.coef=0")
    stage = run_ppo("iterations=1", *text)
    model = AutoModelForCausalLM.from_pretrained(stage.directory / "actor")
    tokenizer = AutoTokenizer.from_pretrained(stage.directory / "actor")
    total, count = 0.0, 0
    for document in TEXTS[-4:]:
        ids = torch.tensor([[*tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert stage.summary["ppo/eval_text_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_the_entropy_bonus_raises_entropy(run_ppo: Ppo) -> None:
    """At a temperature so low that a nearly untrained model is far from uniform."""
    base = ("iterations=3", "actor_learning_rate=3e-3", "ppo_epochs=4", "sampling.temperature=0.06")
    plain, bonus = (run_ppo(*base, f"entropy_coef={coef}").series("policy/entropy_avg") for coef in (0, 1))
    assert plain[0] < 0.9 * math.log(320)
    assert bonus[-1] - bonus[0] > 0.1
    assert bonus[-1] > plain[-1] + 0.1


def test_a_parity_bound_that_is_broken_ends_the_run(run_ppo: Ppo) -> None:
    with pytest.raises(TrainingError, match=r"step 3, ppo, iteration 1: .*ppo\.parity_bound 1e-12"):
        run_ppo("parity_bound=1e-12")


@pytest.mark.parametrize("model", ["actor", "critic"])
def test_weights_that_explode_end_the_run(run_ppo: Ppo, model: str) -> None:
    with pytest.raises(TrainingError, match=f"step 3, ppo, {model}, optimizer step|logits are not finite"):
        run_ppo(f"{model}_learning_rate=1e30", "iterations=3")


def test_what_is_measured_before_and_after(run_ppo: Ppo) -> None:
    """Held-out KL starts at 0, and the summary has the numbers of the first and the last evaluation."""
    stage = run_ppo("iterations=3", "eval_every=2", "actor_learning_rate=3e-3")
    kl, scores = stage.series("ppo/eval_kl"), stage.series("ppo/eval_score")
    assert len(kl) == 3
    assert abs(kl[0]) < 1e-4
    assert (stage.summary["initial/ppo/eval_score"], stage.summary["ppo/eval_score"]) == (scores[0], scores[-1])
    assert stage.summary["num_iterations"] == 3


def test_the_reward_of_a_batch_is_scores_less_the_penalty(run_ppo: Ppo) -> None:
    for record in run_ppo("iterations=3", "kl_coef=0.4").metrics[1:4]:
        expected = record["objective/shaped_scores"] - 0.4 * record["objective/kl"]
        assert record["objective/rlhf_reward"] == pytest.approx(expected, abs=1e-4)
        assert record["response_length/mean"] <= record["response_length/max"] <= 12
        assert 0 <= record["response_length/stopped"] <= 1


def test_a_prompt_and_answer_longer_than_the_context_are_refused(run_ppo: Ppo) -> None:
    with pytest.raises(ConfigError, match=r"max_prompt_length \+ ppo\.sampling\.max_new_tokens = 292 .*context of 288"):
        run_ppo("sampling.max_new_tokens=100")


def prompts(count: int) -> list[PreparedPrompt]:
    return [PreparedPrompt(Prompt((Message("user", str(n)),)), (n,), f"row {n}") for n in range(count)]


def one_source(size: int, seed: int) -> Blend:
    return make_blend([size], [], 1.0, [1.0], seed)


def test_prompt_batches_go_on_from_any_iteration() -> None:
    settings = tiny_recipe("--ppo.prompts_per_iteration=3", "--ppo.answers_per_prompt=2").ppo
    whole = list(itertools.islice(prompt_batches(prompts(7), one_source(7, 3), settings), 12))
    for start in (1, 2, 5, 9):
        rest = prompt_batches(prompts(7), one_source(7, 3), settings, start)
        assert list(itertools.islice(rest, 12 - start)) == whole[start:]


def test_prompt_batches_pass_over_all_prompts_each_time_in_another_order() -> None:
    """7 prompts in batches of 3: any 7 in a row from the start of a pass are all of them."""
    settings = tiny_recipe("--ppo.prompts_per_iteration=3", "--ppo.answers_per_prompt=2").ppo
    batches = list(itertools.islice(prompt_batches(prompts(7), one_source(7, 3), settings), 14))
    for batch in batches:
        assert len(batch) == 6
        assert batch[0::2] == batch[1::2], "answers to one prompt stand together"
    drawn = [prompt.ids[0] for batch in batches for prompt in batch[::2]]
    passes = [drawn[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len(set(map(tuple, passes))) > 1
    again = next(prompt_batches(prompts(7), one_source(7, 3), settings))
    assert again == batches[0] != next(prompt_batches(prompts(7), one_source(7, 4), settings))


def test_more_prompts_per_iteration_than_there_are() -> None:
    settings = tiny_recipe("--ppo.prompts_per_iteration=10", "--ppo.answers_per_prompt=1").ppo
    assert len(next(prompt_batches(prompts(4), one_source(4, 0), settings))) == 10


def experience(values: list[float], returns: list[float]) -> Experience:
    zeros = torch.zeros(len(values))
    rollout = Rollout(torch.tensor([1]), torch.ones(len(values), dtype=torch.int64), zeros, zeros, "length", 0)
    return Experience(rollout, 0.0, zeros, torch.tensor(values), zeros, zeros, torch.tensor(returns))


def test_explained_variance_by_hand() -> None:
    assert explained_variance([experience([1.0, 2.0], [1.0, 2.0]), experience([5.0], [5.0])]) == pytest.approx(1.0)
    assert explained_variance([experience([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])]) == pytest.approx(0.0)
    # errors (1, 0, 0): variance 2/9; returns (1, 2, 3): variance 6/9
    assert explained_variance([experience([0.0, 2.0], [1.0, 2.0]), experience([3.0], [3.0])]) == pytest.approx(2 / 3)
    assert explained_variance([experience([0.0, 1.0], [2.0, 2.0])]) == 0.0


@pytest.mark.parametrize("overrides", [(), ("micro_batch_tokens=60",), ("critic_warmup_iterations=1", "gamma=0.9")])
def test_values_and_gradient_of_the_critic_from_one_pass_are_those_of_two(
    run_ppo: Ppo, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an iteration has one optimizer step; metrics and weights within 1e-5, and not by doing the same twice."""
    single = ("iterations=3", "ppo_epochs=1", "minibatches=1", *overrides)
    calls: list[int] = []
    original = ppo_update.CriticPass.__call__
    monkeypatch.setattr(
        ppo_update.CriticPass, "__call__", lambda self, *given: (calls.append(1), original(self, *given))[1]
    )
    fused = run_ppo(*single)
    assert len(calls) == 3
    monkeypatch.setattr(ppo, "critic_pass_of", lambda *_: None)
    apart = run_ppo(*single)
    assert len(calls) == 3
    for ours, theirs in zip(fused.metrics, apart.metrics, strict=True):
        names = [n for n in ours if not n.startswith(("timing_s/", "memory/", "perf/", "stage"))]
        names = [n for n in names if n not in ("val/first_ratio_error", "parity/max_abs_logprob_diff")]
        assert {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, abs=1e-5, rel=1e-5)
    for name in ("actor", "critic"):
        found, expected = weights(fused.directory / name), weights(apart.directory / name)
        for key, weight in expected.items():
            # a key's bias has no gradient but rounding, which AdamW divides by its own size
            torch.testing.assert_close(found[key], weight, atol=1e-3 if "k_proj.bias" in key else 1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------ final answers


def sums(path: Path, answers: tuple[str, ...]) -> Path:
    """Rows as gsm8k has them, their answers in turn."""
    rows = [
        {"question": f"Guess number {n}.", "answer": f"It is.\n#### {answers[n % len(answers)]}"} for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_become_right_where_that_is_rewarded(tiny_run: Path, tmp_path: Path) -> None:
    """A model that was taught to guess 3 or 7 learns that it is 7, by the data's final answers alone."""
    taught = tiny_recipe(
        f"--data.sources={sums(tmp_path / 'taught.jsonl', ('3', '7'))}", "--data.split=1,0,0",
        f"--model.actor={tiny_run / 'sft'}", "--sft.max_steps=60", "--sft.epochs=60", "--sft.eval_every=0",
    )  # fmt: skip
    sft = run_stage("sft", taught, tmp_path / "sft", {}).directory
    recipe = tiny_recipe(
        f"--data.sources={sums(tmp_path / 'asked.jsonl', ('7',))}", "--data.split=0,0,1", "--data.eval_fraction=0.3",
        "--ppo.iterations=25", "--ppo.prompts_per_iteration=16", "--ppo.reward_model_coef=0",
        "--ppo.final_answer_coef=1", "--ppo.sampling.max_new_tokens=24", "--ppo.num_eval_prompts=40",
        "--ppo.actor_learning_rate=2e-3", "--ppo.scheduler=constant", "--ppo.kl_coef=0.02",
    )  # fmt: skip
    stage = run_stage("ppo", recipe, tmp_path / "ppo", {"sft": sft, "reward": tiny_run / "reward"})
    before, after = (stage.summary[f"{when}ppo/eval_final_answer_accuracy"] for when in ("initial/", ""))
    assert 0.05 < before < 0.6
    series = stage.series("objective/final_answer_accuracy")
    assert len(series) == 25
    assert after > 0.9, series
    assert max(series[:2]) < 0.6 < min(series[-2:])


def test_a_reward_on_final_answers_that_the_data_have_not(run_ppo: Ppo) -> None:
    with pytest.raises(ConfigError, match=r"ppo\.final_answer_coef = 1, and no prompt of step 3 has a final answer"):
        run_ppo("final_answer_coef=1")
