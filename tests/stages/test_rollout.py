"""From rollouts to experience, against naive loops and plain transformers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.oracles import episodes
from tests.tiny import tiny_recipe
from threefold.config.recipe import PPOSection
from threefold.data.chat import ChatFormat, build_chat_format, ensure_pad_token
from threefold.engine.sharing import MicroBatching
from threefold.errors import ConfigError, DataError
from threefold.inference.generate import generate
from threefold.models.forward import CausalForward
from threefold.models.loading import generation_stop_ids, load_causal_lm, load_scalar_model, load_tokenizer
from threefold.stages.rollout import (
    Reference,
    RewardScorer,
    ScoredBatch,
    Scorers,
    check_references,
    final_answer_accuracy,
    make_experience,
    right_answers,
    same_tokens,
)
from threefold.types import FinishReason, Message, PreparedPrompt, Prompt, Rollout

CPU, FLOAT32 = torch.device("cpu"), torch.float32
PASSES = MicroBatching(max_tokens=50)
QUESTIONS = ("Hi", "What is 2 plus 3?", "Sort b, c, a", "Why?", "Name a colour, please")


def chat_of(directory: Path, template: str = "tokenizer") -> ChatFormat:
    tokenizer = load_tokenizer(str(directory))
    ensure_pad_token(tokenizer, "", template, str(directory))
    return build_chat_format(tokenizer, template, generation_stop_ids(str(directory)), str(directory))


def prepared(chat: ChatFormat, questions: Sequence[str] = QUESTIONS) -> list[PreparedPrompt]:
    prompts = [Prompt((Message("user", question),)) for question in questions]
    return [PreparedPrompt(p, chat.prompt_ids(p.messages), f"test row {n}") for n, p in enumerate(prompts, start=1)]


@dataclass(frozen=True)
class Scene:
    """Rollouts of an actor that has moved away from the reference, one of them of a single token."""

    prompts: list[PreparedPrompt]
    rollouts: list[Rollout]
    score: Callable[..., ScoredBatch]


@pytest.fixture(scope="module")
def scene(tiny_run: Path) -> Scene:
    chat = chat_of(tiny_run / "sft")
    actor = CausalForward(load_causal_lm(str(tiny_run / "ppo/actor")))
    scorer = RewardScorer(load_scalar_model(str(tiny_run / "reward")), chat, chat, False, CPU, FLOAT32, PASSES)
    critic = load_scalar_model(str(tiny_run / "ppo/critic"))
    reference = CausalForward(load_causal_lm(str(tiny_run / "sft")))
    scorers = Scorers(Reference(reference), critic, scorer, chat.pad_id, CPU, FLOAT32, PASSES)
    prompts = prepared(chat)
    sampling = tiny_recipe("--ppo.sampling.temperature=0.7", "--ppo.sampling.max_new_tokens=9").ppo.sampling
    ids = [prompt.ids for prompt in prompts]
    rollouts = generate(actor, ids, sampling, chat.stop_ids, torch.manual_seed(5))
    stop = torch.tensor(sorted(chat.stop_ids)[:1])
    rollouts[1] = Rollout(rollouts[1].prompt_ids, stop, torch.tensor([-0.4]), torch.tensor([-0.4]), "stop", 0)
    rollouts[3] = with_stop(rollouts[3], stop, 4)

    def score(
        settings: PPOSection, kl: float, asked: list[PreparedPrompt] = prompts, answers: list[Rollout] = rollouts
    ) -> ScoredBatch:
        return make_experience(asked, answers, scorers, settings, kl)

    return Scene(prompts, rollouts, score)


def with_stop(rollout: Rollout, stop: Tensor, length: int) -> Rollout:
    """The same answer as if it had stopped after `length` tokens."""
    ids = torch.cat([rollout.response_ids[: length - 1], stop])
    return Rollout(rollout.prompt_ids, ids, rollout.logprobs[:length], rollout.sampled_logprobs[:length], "stop", 0)


def settings_of(*overrides: str) -> PPOSection:
    return tiny_recipe("--ppo.sampling.temperature=0.7", *(f"--ppo.{override}" for override in overrides)).ppo


def whole(rollout: Rollout) -> Tensor:
    return torch.cat([rollout.prompt_ids, rollout.response_ids]).unsqueeze(0)


@torch.no_grad()
def reference_logprobs(directory: Path, rollout: Rollout, temperature: float) -> list[float]:
    """One answer at a time with transformers: no padding, no chunks."""
    logits = AutoModelForCausalLM.from_pretrained(directory)(input_ids=whole(rollout)).logits[0]
    start = len(rollout.prompt_ids)
    found = []
    for position, token in enumerate(rollout.response_ids.tolist()):
        found.append(float((logits[start + position - 1] / temperature).log_softmax(-1)[token]))
    return found


@torch.no_grad()
def scores_at_every_length(directory: Path, rollout: Rollout) -> list[float]:
    """A scalar model's score of every prefix from the prompt to the whole answer, through its own public forward."""
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    ids, start = whole(rollout), len(rollout.prompt_ids)
    return [float(model(input_ids=ids[:, :length]).logits) for length in range(start, ids.shape[1] + 1)]


def kl_by_hand(estimator: str, logprob: float, reference: float) -> float:
    difference = logprob - reference
    if estimator == "k1":
        return difference
    return difference**2 / 2 if estimator == "k2" else math.exp(-difference) - 1 + difference


@pytest.mark.parametrize(
    "overrides",
    [
        ("whiten_advantages=false",),
        ("whiten_advantages=false", "kl_estimator=k2", "gamma=0.9", "gae_lambda=0.8"),
        ("whiten_advantages=false", "kl_estimator=k3", "reward_clip=0.3", "missing_stop_penalty=0.7"),
        ("whiten_advantages=false", "normalise_reward=false", "reward_clip=0", "missing_stop_penalty=1"),
        ("gamma=0.95",),
    ],
)
def test_experience_equals_a_naive_loop(scene: Scene, tiny_run: Path, overrides: tuple[str, ...]) -> None:
    """Reference log-probs, values, rewards, advantages and returns of every token; tolerance 2e-5."""
    settings, kl_coef = settings_of(*overrides), 0.3
    batch = scene.score(settings, kl_coef)
    config = AutoModelForSequenceClassification.from_pretrained(tiny_run / "reward").config
    mean, scale = config.threefold_score_mean, config.threefold_score_scale
    advantages: list[list[float]] = []
    for experience, rollout in zip(batch.experiences, scene.rollouts, strict=True):
        reference = reference_logprobs(tiny_run / "sft", rollout, 0.7)
        values = [(score - mean) / scale for score in scores_at_every_length(tiny_run / "ppo/critic", rollout)[:-1]]
        score = scores_at_every_length(tiny_run / "reward", rollout)[-1]
        shaped = (score - mean) / scale if settings.normalise_reward else score
        if settings.reward_clip:
            shaped = min(max(shaped, -settings.reward_clip), settings.reward_clip)
        shaped -= settings.missing_stop_penalty if rollout.finish_reason == "length" else 0
        pairs = zip(rollout.logprobs.tolist(), reference, strict=True)
        kl = [kl_by_hand(settings.kl_estimator, ours, theirs) for ours, theirs in pairs]
        rewards = episodes.token_rewards(shaped, kl, kl_coef)
        advantages.append(episodes.advantages_as_sum(rewards, values, settings.gamma, settings.gae_lambda))
        returns = episodes.lambda_returns(rewards, values, settings.gamma, settings.gae_lambda)
        assert experience.score == pytest.approx(score, abs=2e-5)
        for ours, by_hand in (
            (experience.ref_logprobs, reference),
            (experience.values, values),
            (experience.rewards, rewards),
            (experience.returns, returns),
        ):
            assert ours.tolist() == pytest.approx(by_hand, abs=2e-5)
    if settings.whiten_advantages:
        every = [advantage for answer in advantages for advantage in answer]
        middle = math.fsum(every) / len(every)
        spread = math.sqrt(math.fsum((advantage - middle) ** 2 for advantage in every) / len(every))
        advantages = [[(advantage - middle) / spread for advantage in answer] for answer in advantages]
    for experience, by_hand in zip(batch.experiences, advantages, strict=True):
        assert experience.advantages.tolist() == pytest.approx(by_hand, abs=1e-4)


def test_what_is_reported_about_a_batch(scene: Scene, tiny_run: Path) -> None:
    """KL per answer is the sum of log-ratios whatever estimator the reward uses; the RLHF reward sums the tokens'."""
    batch = scene.score(settings_of("kl_estimator=k3", "missing_stop_penalty=0.5"), 0.3)
    for row, rollout in enumerate(scene.rollouts):
        reference = reference_logprobs(tiny_run / "sft", rollout, 0.7)
        by_hand = math.fsum(rollout.logprobs.tolist()) - math.fsum(reference)
        assert float(batch.kl[row]) == pytest.approx(by_hand, abs=2e-5)
        assert float(batch.rlhf_reward[row]) == pytest.approx(float(batch.experiences[row].rewards.sum()), abs=1e-5)
    assert {rollout.finish_reason for rollout in scene.rollouts} == {"stop", "length"}


def test_a_fresh_critic_knows_the_score_of_a_finished_answer(tiny_run: Path, scene: Scene) -> None:
    """Started from the reward model, its value after an answer's last token is that answer's normalised score."""
    chat = chat_of(tiny_run / "sft")
    reward = load_scalar_model(str(tiny_run / "reward"))
    scorer = RewardScorer(reward, chat, chat, False, CPU, FLOAT32, PASSES)
    reference = CausalForward(load_causal_lm(str(tiny_run / "sft")))
    scorers = Scorers(
        Reference(reference), load_scalar_model(str(tiny_run / "reward")), scorer, chat.pad_id, CPU, FLOAT32, PASSES
    )
    # One token more, whose value stands before it, that is at the end of the answer.
    longer = [
        Rollout(r.prompt_ids, torch.cat([r.response_ids, torch.tensor([7])]), torch.cat([r.logprobs, torch.zeros(1)]),
                torch.cat([r.sampled_logprobs, torch.zeros(1)]), "length", 0)
        for r in scene.rollouts
    ]  # fmt: skip
    batch = make_experience(scene.prompts, longer, scorers, settings_of(), 0.0)
    scores = scorer([prompt.prompt.messages for prompt in scene.prompts], scene.rollouts)
    mean, scale = scorer.mean_and_scale
    values = torch.stack([experience.values[-1] for experience in batch.experiences])
    torch.testing.assert_close(values, (scores - mean) / scale, rtol=0, atol=2e-5)


def test_records_are_complete_and_ragged(scene: Scene) -> None:
    for experience, rollout in zip(scene.score(settings_of(), 0.1).experiences, scene.rollouts, strict=True):
        assert experience.rollout is rollout
        for name in ("ref_logprobs", "values", "rewards", "advantages", "returns"):
            tensor = getattr(experience, name)
            assert tensor.shape == rollout.response_ids.shape
            assert tensor.dtype == torch.float32
            assert not tensor.requires_grad


def test_a_batch_scored_alone_or_together_is_the_same(scene: Scene, tiny_run: Path) -> None:
    """More rollouts than a scoring batch holds; tolerance 1e-5."""
    chat = chat_of(tiny_run / "sft")
    scorer = RewardScorer(load_scalar_model(str(tiny_run / "reward")), chat, chat, False, CPU, FLOAT32, PASSES)
    messages = [prompt.prompt.messages for prompt in scene.prompts]
    alone = torch.cat([scorer([m], [r]) for m, r in zip(messages, scene.rollouts, strict=True)])
    together = scorer(messages * 14, scene.rollouts * 14)
    assert len(together) == 70
    torch.testing.assert_close(together, alone.repeat(14), rtol=0, atol=1e-5)


def fake_rollout(prompt: PreparedPrompt, ids: Sequence[int], reason: FinishReason) -> Rollout:
    zeros = torch.zeros(len(ids))
    return Rollout(torch.tensor(prompt.ids), torch.tensor(ids), zeros, zeros, reason, 0)


# ------------------------------------------------------------------------------------------------------ final answers


def answered(
    chat: ChatFormat, question: str, reference: str, answer: str, reason: FinishReason
) -> tuple[PreparedPrompt, Rollout]:
    (prompt,) = prepared(chat, [question])
    ids = chat.answer_ids(prompt.prompt.messages, answer)
    rollout = fake_rollout(prompt, ids if reason == "stop" else ids[:-1], reason)
    return replace(prompt, reference=reference), rollout


CASES: list[tuple[str, str, FinishReason]] = [
    ("72", "24 and 48 are 72.\nFinal answer: 72", "stop"),
    ("72", "It is $72.00, I think.", "stop"),
    ("72", "Final answer: 72", "length"),  # cut: more digits may have followed
    ("72", "Final answer: 27", "stop"),
    ("72", "", "stop"),
    ("", "Final answer: 72", "stop"),
    ("1,000", "#### 1000", "stop"),
]
RIGHT = [1.0, 1.0, 0.0, 0.0, 0.0, None, 1.0]


def test_right_final_answers_by_hand(tiny_run: Path) -> None:
    chat = chat_of(tiny_run / "sft")
    pairs = [answered(chat, "How many?", reference, answer, reason) for reference, answer, reason in CASES]
    prompts, rollouts = [prompt for prompt, _ in pairs], [rollout for _, rollout in pairs]
    assert right_answers(prompts, rollouts, chat) == RIGHT
    assert final_answer_accuracy(prompts, rollouts, chat) == 3 / 6
    assert final_answer_accuracy(prompts[5:6], rollouts[5:6], chat) is None


def test_a_control_token_within_an_answer_does_not_join_what_it_parts(tiny_run: Path) -> None:
    """7, a control token, 2: shown without the token it would be the 72 that was asked for."""
    chat = chat_of(tiny_run / "sft")
    prompt, rollout = answered(chat, "How many?", "72", "Final answer: 72", "stop")
    text_ids = chat.tokenizer.encode("Final answer: 7", add_special_tokens=False)
    digit_ids, stop_id = chat.tokenizer.encode("2", add_special_tokens=False), int(rollout.response_ids[-1])
    others = [token_id for token_id in chat.tokenizer.all_special_ids if token_id not in chat.stop_ids]
    for control_id in (*others, stop_id):
        ids = [*text_ids, control_id, *digit_ids, stop_id]
        assert chat.decode(ids) == "Final answer: 72"
        assert right_answers([prompt], [fake_rollout(prompt, ids, "stop")], chat) == [0.0]
    assert right_answers([prompt], [rollout], chat) == [1.0]


def test_the_reward_of_a_final_answer(scene: Scene, tiny_run: Path) -> None:
    """Half the reward model's shaped score, and 2 where the answer is the data's; prompts without one get no more."""
    settings = settings_of("reward_model_coef=0.5", "final_answer_coef=2", "missing_stop_penalty=0.25")
    chat = chat_of(tiny_run / "sft")
    pairs = [answered(chat, "How many?", reference, answer, reason) for reference, answer, reason in CASES]
    prompts, rollouts = [prompt for prompt, _ in pairs], [rollout for _, rollout in pairs]
    plain = scene.score(settings_of(), 0.0, prompts, rollouts)
    found = scene.score(settings, 0.0, prompts, rollouts)
    expected = [
        0.5 * float(plain.shaped_scores[row]) + (2.0 if right else 0.0) - (0.25 if reason == "length" else 0.0)
        for row, ((*_, reason), right) in enumerate(zip(CASES, RIGHT, strict=True))
    ]
    assert found.shaped_scores.tolist() == pytest.approx(expected, abs=1e-6)
    for ours, experience in zip(expected, found.experiences, strict=True):
        assert float(experience.rewards[-1]) == pytest.approx(ours, abs=1e-6)
    assert [one.score for one in found.experiences] == [one.score for one in plain.experiences], "as it was measured"


def test_a_reward_on_final_answers_needs_some(tiny_run: Path) -> None:
    prompts = prepared(chat_of(tiny_run / "sft"))
    with pytest.raises(ConfigError, match=r"ppo\.final_answer_coef = 2, and no prompt of step 3 has a final answer"):
        check_references(prompts, settings_of("final_answer_coef=2"))
    check_references(prompts, settings_of())
    check_references([*prompts, replace(prompts[0], reference="3")], settings_of("final_answer_coef=2"))


@pytest.mark.real
def test_a_reward_model_with_another_vocabulary_is_refused_or_reads_the_text(shared: Path) -> None:
    """The actor is word-piece stories260K, the judge character-level babyllama: the same text in other tokens."""
    actor_chat = chat_of(shared / "models/stories260K", "dialogue")
    judge_source = shared / "models/babyllama-char-1M"
    judge_chat, judge = chat_of(judge_source, "dialogue"), load_scalar_model(str(judge_source), new_head_seed=1)
    assert not same_tokens(actor_chat, judge_chat)
    with pytest.raises(ConfigError, match=r"\(105 tokens\).*\(512 tokens\).*retokenise_for_reward true"):
        RewardScorer(judge, judge_chat, actor_chat, False, CPU, FLOAT32, PASSES)
    scorer = RewardScorer(judge, judge_chat, actor_chat, True, CPU, FLOAT32, PASSES)
    prompts = prepared(actor_chat, ["Who is there", "Who is there"])
    answer = actor_chat.answer_ids(prompts[0].prompt.messages, "A little dog")
    rollouts = [fake_rollout(prompts[0], answer, "stop"), fake_rollout(prompts[1], answer[:-1], "length")]
    scores = scorer([prompt.prompt.messages for prompt in prompts], rollouts)
    (as_trained,) = judge_chat.comparison(prompts[0].prompt, ["A little dog"])
    ids = torch.tensor([as_trained.ids])
    with torch.no_grad():
        by_hand = [float(judge(input_ids=part).logits) for part in (ids, ids[:, :-1])]
    assert scores.tolist() == pytest.approx(by_hand, abs=1e-5)
    assert abs(by_hand[0] - by_hand[1]) > 1e-4, "whether it stopped can be seen"


@pytest.mark.real
def test_a_text_longer_than_the_judges_context_is_refused(shared: Path) -> None:
    actor_chat = chat_of(shared / "models/stories260K", "dialogue")
    source = shared / "models/babyllama-char-1M"
    judge = load_scalar_model(str(source), new_head_seed=1)
    scorer = RewardScorer(judge, chat_of(source, "dialogue"), actor_chat, True, CPU, FLOAT32, PASSES)
    (prompt,) = prepared(actor_chat, ["word " * 60])
    rollout = fake_rollout(prompt, actor_chat.answer_ids(prompt.prompt.messages, "yes"), "stop")
    with pytest.raises(DataError, match=r"context of 256: lower data.max_prompt_length or ppo.sampling.max_new_tokens"):
        scorer([prompt.prompt.messages], [rollout])
