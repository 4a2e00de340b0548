"""threefold as a contestant: the one file here that knows its API. Run by threefold's interpreter.

    -m benchmarks.ours WORKLOAD.json   takes orders (see peers/worker.py)
    -m benchmarks.ours rate            measured float32 matrix rates of this machine by kernel, FLOP/s, as JSON

`Ours` assembles what step 3 assembles from a recipe (stages/ppo.py), from the workload's checkpoints; the phases are
those of a run. The moving average is off, since no peer has one; all else that is not the workload's stays at the
recipe's default.

Orders (JSON): {"do": "iteration", "batch": 0} · {"do": "generate", "prompts": […], "answer_length": 64} ·
{"do": "prefill", "prompts": […], "answers_per_prompt": 4}
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import threefold  # noqa: F401  before torch: it sets how OpenMP waits, as it does for its users

# isort: split
import torch

from benchmarks.flops import OPTShape, scoring_flop, update_flop
from benchmarks.peers.worker import Orders, peak_bytes, resident_bytes
from threefold.config.recipe import EMASection, GenerationSection, PPOSection, RunSection, SamplingSection
from threefold.data.chat import ChatFormat
from threefold.engine.device import make_repeatable
from threefold.engine.hybrid import HybridEngine
from threefold.engine.phases import PhaseMeter
from threefold.engine.sharing import micro_batching
from threefold.engine.train import TrainEngine
from threefold.inference.generate import generate
from threefold.machine.rates import matrix_rate
from threefold.models.forward import CausalForward
from threefold.models.loading import load_causal_lm, load_scalar_model, load_tokenizer, set_dropout
from threefold.stages.ppo_update import Learners, critic_pass_of, update
from threefold.stages.rollout import Reference, RewardScorer, Scorers, make_experience
from threefold.types import Message, PreparedPrompt, Prompt, Rollout

LEARNING_RATE, KL_COEF, SEED = 1e-6, 0.05, 1234
PARITY_BOUND = 1e-3
PHASES = ("generate", "score", "update")


class Ours:
    """Step 3 on a workload, iteration by iteration."""

    def __init__(self, workload: dict[str, Any]) -> None:
        make_repeatable(RunSection(seed=SEED))
        self.device, self.dtype = torch.device("cpu"), torch.float32
        where = (self.device, self.dtype)
        directory = Path(workload["directory"])
        self._batches = workload["batches"]
        self._answer_length = workload["answer_length"]
        self.settings = PPOSection(
            prompts_per_iteration=len(self._batches[0]),
            actor_learning_rate=LEARNING_RATE,
            critic_learning_rate=LEARNING_RATE,
            scheduler="constant",
            warmup_steps=0,
            kl_coef=KL_COEF,
            ema=EMASection(enabled=False),
            sampling=SamplingSection(max_new_tokens=self._answer_length),
        )
        tokenizer = load_tokenizer(str(directory / workload["actor"]))
        stop_ids = frozenset({tokenizer.eos_token_id}) if workload["stops"] else frozenset()
        self._chat = ChatFormat(tokenizer, stop_ids, tokenizer.pad_token_id)
        passes = micro_batching(self.settings.micro_batch_size, self.settings.micro_batch_tokens, self.device)
        actor, reference = (load_causal_lm(str(directory / workload["actor"])) for _ in range(2))
        critic, reward = (load_scalar_model(str(directory / name)) for name in ("critic", "reward"))
        for model in (actor, critic):
            set_dropout(model, 0.0)
        forward = CausalForward(actor)
        self._hybrid = HybridEngine(forward, GenerationSection(), *where, lambda note: print(note, file=sys.stderr))
        scorer = RewardScorer(reward.requires_grad_(False), self._chat, self._chat, False, *where, passes)
        self._scorers = Scorers(
            Reference(CausalForward(reference.requires_grad_(False))), critic, scorer, self._chat.pad_id, *where, passes
        )
        actor_engine = TrainEngine(actor, self.settings.optimizer("actor"), 1, *where, "actor")
        critic_engine = TrainEngine(critic, self.settings.optimizer("critic"), 1, *where, "critic")
        self._learners = Learners(actor_engine, forward, critic_engine, critic, self._chat.pad_id, self.device, passes)
        self._sampler = torch.Generator(self.device).manual_seed(SEED)
        self._num_iterations = 0

    def iteration(self, batch: int) -> dict[str, Any]:
        """One PPO iteration on a batch of the workload's prompts: seconds and peak memory per phase, lengths."""
        ids = self._batches[batch % len(self._batches)]
        prompts = [PreparedPrompt(Prompt((Message("user", "-"),)), tuple(row), "benchmark") for row in ids]
        meter = PhaseMeter(self.device)
        started = time.perf_counter()
        with meter.phase("generate"):
            rollouts = self._hybrid.generate(ids, self.settings.sampling, self._chat.stop_ids, self._sampler)
        critic_pass = critic_pass_of(self._learners, self.settings)
        with meter.phase("score"):
            scored = make_experience(prompts, rollouts, self._scorers, self.settings, KL_COEF, critic_pass)
        with meter.phase("update"):
            metrics = update(
                scored.experiences,
                self._learners,
                self.settings,
                seed=SEED,
                iteration=self._num_iterations,
                train_actor=True,
                parity_bound=PARITY_BOUND,
                mixture=None,
                critic_pass=critic_pass,
            )
        seconds = time.perf_counter() - started
        self._num_iterations += 1
        return {
            "seconds": seconds,
            **{f"{phase}_s": meter.seconds[phase] for phase in PHASES},
            "phase_peak_bytes": {phase: meter.peak_bytes[phase] for phase in PHASES},
            "max_abs_logprob_diff": metrics["parity/max_abs_logprob_diff"],
            "prompt_lengths": [len(row) for row in ids],
            "lengths": _lengths(rollouts),
        }

    def generate(self, prompts: list[list[int]], answer_length: int) -> dict[str, Any]:
        """Answers alone, the switch to generation and back included."""
        sampling = SamplingSection(max_new_tokens=answer_length)
        started = time.perf_counter()
        rollouts = self._hybrid.generate(prompts, sampling, self._chat.stop_ids, self._sampler)
        return {"seconds": time.perf_counter() - started, "lengths": _lengths(rollouts)}

    def prefill(self, prompts: list[list[int]], answers_per_prompt: int) -> dict[str, Any]:
        """Prompts to first tokens: answers of length 1, without the switch, which costs both sides the same."""
        sampling = SamplingSection(max_new_tokens=1)
        with torch.no_grad(), self._hybrid.generating(len(prompts) * answers_per_prompt):
            started = time.perf_counter()
            rollouts = generate(
                self._hybrid.decoder,
                prompts,
                sampling,
                self._chat.stop_ids,
                self._sampler,
                answers_per_prompt=answers_per_prompt,
            )
            seconds = time.perf_counter() - started
        return {"seconds": seconds, "lengths": _lengths(rollouts)}


def _lengths(rollouts: list[Rollout]) -> list[int]:
    return [len(rollout.response_ids) for rollout in rollouts]


def _shape(sizes: dict[str, int]) -> OPTShape:
    return OPTShape(sizes["hidden_size"], sizes["num_layers"], sizes["ffn_dim"], sizes["vocab_size"])


def main() -> None:
    if sys.argv[1] == "rate":
        print(json.dumps(dict(matrix_rate(torch.device("cpu"), torch.float32).by_kernel)))
        return
    orders = Orders()
    workload = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    ours = Ours(workload)
    actor, scorer = (_shape(workload["sizes"][name]) for name in ("actor", "scorer"))
    loaded = resident_bytes()
    highest = peak_bytes()
    orders.answer(ready=True, threads=torch.get_num_threads(), bytes_loaded=loaded)
    for order in orders:
        answer: dict[str, Any] = getattr(ours, order.pop("do"))(**order)
        # PhaseMeter resets the kernel's high-water mark, so the highest of all readings is the process's peak
        highest = max(highest, peak_bytes(), *answer.get("phase_peak_bytes", {}).values())
        if "score_s" in answer:
            lengths = list(zip(answer["prompt_lengths"], answer["lengths"], strict=True))
            answer |= {
                "score_flop": scoring_flop(actor, scorer, lengths),
                "update_flop": update_flop(actor, scorer, lengths),
            }
        orders.answer(**answer, peak_bytes=highest)


if __name__ == "__main__":
    main()
