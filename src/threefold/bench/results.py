"""From what was measured to what is reported: every number of one iteration, and the medians over iterations."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from threefold.bench.flops import IterationFlop, ModelCost, decode_reads, iteration_flop
from threefold.bench.perf_formulas import PerfSizes, step3_report

PHASES = ("generate", "score", "update")
DEEPSPEED_CHAT = "deepspeed_chat/"
"""What DeepSpeed-Chat reports, by its formulas: the metrics whose names begin so."""


@dataclass(frozen=True)
class Measurement:
    """One iteration as the clock and the memory counters saw it.

    Attributes:
        lengths: of each prompt, its tokens and those of each of its answers.
        seconds: of each phase.
        prefill_seconds: of generating one token per answer to the same prompts, with the same weights.
        peak_bytes: of each phase: the process on a CPU, PyTorch's allocations on a GPU.
        decodes_together: every answer has a place in the decode batch from the start, so its steps can be counted.
        losses: what the update reports.
    """

    lengths: tuple[tuple[int, tuple[int, ...]], ...]
    seconds: Mapping[str, float]
    prefill_seconds: float
    peak_bytes: Mapping[str, int]
    decodes_together: bool
    losses: Mapping[str, float]


@dataclass(frozen=True)
class Counted:
    """What does not change from one iteration to the next.

    Attributes:
        actor, reference, critic: cost of a token.
        actor_sizes, critic_sizes: what DeepSpeed-Chat's formulas know of them.
        longest_prompt, longest_answer: of the setting, tokens.
        weight_bytes: that a decode step has to read: every matrix and the output head, in the type of the products.
        key_value_bytes_per_token: of the actor's cache.
        bytes_per_number: of the type of the products.
        flop_per_second, bytes_per_second: the machine's measured rates.
        one_critic_pass: the critic trains while scoring, as it does where an iteration has one optimizer step.
    """

    actor: ModelCost
    reference: ModelCost
    critic: ModelCost
    actor_sizes: PerfSizes
    critic_sizes: PerfSizes
    longest_prompt: int
    longest_answer: int
    weight_bytes: int
    key_value_bytes_per_token: int
    bytes_per_number: int
    flop_per_second: float
    bytes_per_second: float
    one_critic_pass: bool = False


def iteration_metrics(measured: Measurement, counted: Counted) -> dict[str, float]:
    """Every number that is reported about one iteration.

    Seconds, bytes, FLOP and tokens in plain units; `fraction` of the measured rates. Names that begin with
    "deepspeed_chat/" are by its formulas, all others are counted.
    """
    sequences = [(prompt, answer) for prompt, answers in measured.lengths for answer in answers]
    tokens, answer_tokens = sum(map(sum, sequences)), sum(answer for _, answer in sequences)
    flop = iteration_flop(measured.lengths, counted.actor, counted.reference, counted.critic, counted.one_critic_pass)
    seconds = measured.seconds
    total = sum(seconds[phase] for phase in PHASES)
    learning = flop.score + flop.update, seconds["score"] + seconds["update"]
    metrics = {
        **{f"seconds/{phase}": seconds[phase] for phase in PHASES},
        "seconds/iteration": total,
        "seconds/prefill": measured.prefill_seconds,
        "sequences_per_second": len(sequences) / total,
        "tokens_per_second": tokens / total,
        "answer_tokens_per_second": answer_tokens / total,
        "generated_tokens_per_second": answer_tokens / seconds["generate"],
        **{f"flop/{phase}": float(value) for phase, value in asdict(flop).items()},
        **{f"flop_per_second/{phase}": value / seconds[phase] for phase, value in asdict(flop).items()},
        "flop_per_second/score_and_update": learning[0] / learning[1],
        "matrix_rate_fraction/score_and_update": learning[0] / learning[1] / counted.flop_per_second,
        **{f"matrix_rate_fraction/{phase}": _rate(flop, seconds, phase) / counted.flop_per_second for phase in PHASES},
        **{f"peak_bytes/{phase}": float(measured.peak_bytes[phase]) for phase in PHASES},
        "peak_bytes/iteration": float(max(measured.peak_bytes[phase] for phase in PHASES)),
    }
    return metrics | _decode_metrics(sequences, measured, counted) | _deepspeed_chat(sequences, measured, counted)


def _rate(flop: IterationFlop, seconds: Mapping[str, float], phase: str) -> float:
    return float(getattr(flop, phase)) / seconds[phase]


def _decode_metrics(sequences: Sequence[tuple[int, int]], measured: Measurement, counted: Counted) -> dict[str, float]:
    """What lies between the first tokens of the answers and their last, where its steps can be counted."""
    num_steps = max(answer for _, answer in sequences) - 1
    seconds = measured.seconds["generate"] - measured.prefill_seconds
    if not measured.decodes_together or num_steps < 1 or seconds <= 0:
        return {}
    weights, keys_and_values = decode_reads(sequences, counted.weight_bytes, counted.key_value_bytes_per_token)
    rate = (weights + keys_and_values) / seconds
    return {
        "decode/steps": float(num_steps),
        "decode/seconds_per_step": seconds / num_steps,
        "decode/weight_bytes_per_step": weights / num_steps,
        "decode/key_value_bytes_per_step": keys_and_values / num_steps,
        "decode/bytes_per_second": rate,
        "bandwidth_fraction/decode": rate / counted.bytes_per_second,
    }


def _deepspeed_chat(sequences: Sequence[tuple[int, int]], measured: Measurement, counted: Counted) -> dict[str, float]:
    """By its formulas, whose training time leaves out scoring; where the critic trains while scoring, all of that
    counts as training."""
    training = measured.seconds["update"] + (measured.seconds["score"] if counted.one_critic_pass else 0.0)
    report = step3_report(
        counted.actor_sizes,
        counted.critic_sizes,
        len(sequences),
        counted.longest_prompt,
        counted.longest_answer,
        generation_seconds=measured.seconds["generate"],
        training_seconds=training,
        bytes_per_parameter=counted.bytes_per_number,
    )
    return {DEEPSPEED_CHAT + name: value for name, value in asdict(report).items()}


def medians(iterations: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each metric over iterations that all have the same ones, or some."""
    names = [name for name in iterations[0] if all(name in metrics for metrics in iterations)]
    return {name: statistics.median(metrics[name] for metrics in iterations) for name in names}
