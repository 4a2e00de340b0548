"""From the results of a run to its bars and its markdown tables. Ratios are of medians."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

GIB = 2**30
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
LABELS = {
    "threefold": "threefold",
    "trl": "TRL PPOTrainer",
    "trl_small_passes": "TRL PPOTrainer, updating 2 sequences at a time",
    "transformers": "transformers `generate`",
    "transformers_continuous": "transformers `generate_batch`",
}
CLIFF_LENGTH, CLIFF_BATCH = 2.0, 1.25
"""Twice the answer's length may at most double the time per token (attention reads twice as much); twice the batch may
not raise it, beyond noise."""

DISTURBED = 0.05
"""Share of the machine that other processes may have had."""


@dataclass(frozen=True)
class Row:
    """A measured value against its bar; `bar` "" where the issue sets none."""

    part: str
    what: str
    measured: str
    bar: str
    met: bool | None


def rows(results: dict[str, Any]) -> list[Row]:
    """All comparisons that the parts of a run allow."""
    parts = results["parts"]
    found: list[Row] = []
    if "A" in parts:
        found += _rows_of_a(parts["A"])
    if "generation" in parts and "A" not in parts:
        found += _generation_rows("A", parts["generation"]["contestants"], 3.0)
    if "B" in parts:
        found += _rows_of_b(parts["B"])
    if "C" in parts:
        ratio = median(parts["C"]["shared_s"]) / median(parts["C"]["separate_s"])
        n = parts["C"]["answers_per_prompt"]
        found.append(Row("C", f"prefill, {n} answers a prompt / {n} prompts", f"{ratio:.3f}", "≤ 0.3", ratio <= 0.3))
    if "D" in parts:
        found += _rows_of_d(parts["D"])
    return found


def all_met(results: dict[str, Any]) -> bool:
    return all(row.met is not False for row in rows(results))


def others_share(results: dict[str, Any]) -> float | None:
    """The largest, over contestants of A and B and points of D, of the median share of the machine that other processes
    had during the measured turns; None if it was not recorded."""
    turns = [
        [answer.get("others_share") for answer in contestant["iterations"]]
        for part in results["parts"].values()
        for contestant in part.get("contestants", {}).values()
    ]
    turns += [[point.get("others_share")] for part in results["parts"].values() for point in part.get("points", [])]
    if any(share is None for shares in turns for share in shares):
        return None
    return max((median(shares) for shares in turns), default=0.0)


def is_disturbed(results: dict[str, Any]) -> bool:
    """Whether something else computed beside the run. Software that waits by spinning (GNU OpenMP's default) then takes
    several times as long, so the ratios would flatter whoever does not."""
    share = others_share(results)
    return share is None or share > DISTURBED


def iteration_seconds(contestant: dict[str, Any], phase: str = "") -> list[float]:
    """Seconds of each measured iteration, or of one phase of it ("generate", "score", "update")."""
    return [answer[f"{phase}_s" if phase else "seconds"] for answer in contestant["iterations"]]


def generation_seconds(contestant: dict[str, Any]) -> list[float]:
    """Seconds of generation, of a whole iteration's share or of a run of generation alone."""
    return [answer.get("generate_s", answer["seconds"]) for answer in contestant["iterations"]]


def matrix_rate(part: dict[str, Any]) -> dict[str, float]:
    """The best rate of each kernel over all measurements of the part, FLOP/s."""
    kernels = part["rates"][0]
    return {kernel: max(rates[kernel] for rates in part["rates"]) for kernel in kernels}


def ratio_of_medians(numerator: list[float], denominator: list[float]) -> float:
    return median(numerator) / median(denominator)


def _at_least(part: str, what: str, ratio: float, bar: float | None) -> Row:
    return Row(part, what, f"{ratio:.2f}×", f"≥ {bar:g}×" if bar else "", ratio >= bar if bar else None)


def _generation_rows(part: str, contestants: dict[str, Any], bar: float | None) -> list[Row]:
    ours = generation_seconds(contestants["threefold"])
    found = []
    for name in ("transformers", "transformers_continuous"):
        ratio = ratio_of_medians(generation_seconds(contestants[name]), ours)
        found.append(_at_least(part, f"generation, {LABELS[name]} / threefold", ratio, bar))
        bar = None  # the bar is for `generate`
    return found


def _rows_of_a(part: dict[str, Any]) -> list[Row]:
    contestants = part["contestants"]
    ours, trl = contestants["threefold"], contestants["trl"]
    ratio = ratio_of_medians(iteration_seconds(trl), iteration_seconds(ours))
    found = [_at_least("A", "PPO iteration, TRL / threefold", ratio, 2.5)]
    found += _generation_rows("A", contestants, 3.0)
    fraction = median(matrix_fractions(part))
    found.append(Row("A", "score + update, fraction of the matrix rate", f"{fraction:.2f}", "≥ 0.6", fraction >= 0.6))
    memory = peak(ours) / peak(trl)
    found.append(Row("A", "peak memory, threefold / TRL", f"{memory:.2f}×", "≤ 0.6×", memory <= 0.6))
    small = contestants["trl_small_passes"]
    ratio = ratio_of_medians(iteration_seconds(small), iteration_seconds(ours))
    found.append(_at_least("A", f"PPO iteration, {LABELS['trl_small_passes']} / threefold", ratio, None))
    memory = f"{peak(ours) / peak(small):.2f}×"
    found.append(Row("A", f"peak memory, threefold / {LABELS['trl_small_passes']}", memory, "", None))
    return found


def _rows_of_b(part: dict[str, Any]) -> list[Row]:
    contestants = part["contestants"]
    ours, trl = contestants["threefold"], contestants["trl"]
    ratio = ratio_of_medians(iteration_seconds(trl), iteration_seconds(ours))
    found = [_at_least("B", "PPO iteration, TRL / threefold", ratio, 5.0)]
    found += _generation_rows("B", contestants, None)
    found.append(Row("B", "peak memory, threefold / TRL", f"{peak(ours) / peak(trl):.2f}×", "", None))
    return found


def matrix_fractions(part: dict[str, Any]) -> list[float]:
    """Of each iteration of threefold: counted FLOP of score and update / their seconds / the measured matrix rate."""
    best = max(matrix_rate(part).values())
    return [
        (answer["score_flop"] + answer["update_flop"]) / (answer["score_s"] + answer["update_s"]) / best
        for answer in part["contestants"]["threefold"]["iterations"]
    ]


def peak(contestant: dict[str, Any]) -> int:
    """Peak resident memory of the process, bytes."""
    return max(answer["peak_bytes"] for answer in contestant["iterations"])


def per_token(point: dict[str, Any], name: str) -> float:
    """Seconds per answer token at a point of D."""
    return median(point["seconds"][name]) / (point["batch"] * point["length"])


def _rows_of_d(part: dict[str, Any]) -> list[Row]:
    found = []
    for axis, limit in (("length", CLIFF_LENGTH), ("batch", CLIFF_BATCH)):
        values = [per_token(point, "threefold") for point in part["points"] if point["axis"] == axis]
        worst = max(after / before for before, after in pairwise(values))
        found.append(
            Row(
                "D",
                f"time per token, largest factor at a doubling of the {axis}",
                f"{worst:.2f}×",
                f"≤ {limit:g}×",
                worst <= limit,
            )
        )
    return found


def markdown(results: dict[str, Any]) -> str:
    """Everything that a run found, as markdown."""
    machine, parts = results["machine"], results["parts"]
    ours = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    peers = ", ".join(f"{name} {number}" for name, number in results["peers"].items())
    dates = ", ".join(sorted({part["date"] for part in parts.values()}))
    lines = [
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Python "
        f"{machine['python']}; {results['threads']} threads each, float32. threefold on {ours}; peers on {peers}. "
        f"Measured {dates}.",
        "",
    ]
    shares = others_share(results)
    if shares is not None:
        left_out = sum(part.get("rounds_left_out", 0) for part in parts.values())
        said = f", {left_out} rounds in which they had more than {DISTURBED:.0%} left out" if left_out else ""
        lines += [f"Other processes had {shares:.0%} of the machine at the most disturbed place of the run{said}.", ""]
    if is_disturbed(results):
        lines += [f"**Disturbed: more than {DISTURBED:.0%}, or not recorded. Ratios of this run say little.**", ""]
    if any(part["small"] for part in parts.values()):
        lines += ["**A trial with tiny models, not a measurement.**", ""]
    lines += ["| workload | what | measured | bar | met |", "|---|---|---|---|---|"]
    word = {True: "yes", False: "**no**", None: ""}
    lines += [f"| {row.part} | {row.what} | {row.measured} | {row.bar} | {word[row.met]} |" for row in rows(results)]
    for name, title in (
        ("A", "prompts 256, answers exactly 256, batch 8"),
        ("B", "HH prompts, answers stop, batch 32"),
    ):
        if name in parts:
            lines += ["", f"**{name}: {title}** (seconds: median, least to most)", "", *_contestants(parts[name])]
    if "generation" in parts:
        lines += ["", "**A, generation alone** (seconds)", "", *_contestants(parts["generation"])]
    if "A" in parts:
        lines += ["", _flop_line(parts["A"])]
    if "B" in parts:
        lines += ["", _workload_b_line(results)]
    if "C" in parts:
        shared, separate = median(parts["C"]["shared_s"]), median(parts["C"]["separate_s"])
        lines += ["", f"C: prompts to first tokens {shared:.3f} s shared, {separate:.3f} s separate."]
    if "D" in parts:
        lines += ["", *_growth(parts["D"])]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def _contestants(part: dict[str, Any]) -> list[str]:
    lines = [
        "| | iteration | generate | score | update | peak GiB | answer tokens/s, generating |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, contestant in part["contestants"].items():
        answers = contestant["iterations"]
        phases = [
            _spread([answer[key] for answer in answers]) if key in answers[0] else "" for key in ("score_s", "update_s")
        ]
        trains = "generate_s" in answers[0]
        generation = generation_seconds(contestant)
        tokens = median(sum(a["lengths"]) / seconds for a, seconds in zip(answers, generation, strict=True))
        iteration = _spread(iteration_seconds(contestant)) if trains else ""
        if "phase_peak_bytes" in answers[0]:
            by_phase = ", ".join(
                f"{max(a['phase_peak_bytes'][phase] for a in answers) / GIB:.2f}"
                for phase in ("generate", "score", "update")
            )
            memory = f"{peak(contestant) / GIB:.2f} ({by_phase})"
        else:
            memory = f"{peak(contestant) / GIB:.2f}"
        shown = (LABELS[name], iteration, _spread(generation), *phases, memory, f"{tokens:.0f}")
        lines.append(f"| {' | '.join(shown)} |")
    return lines


def _flop_line(part: dict[str, Any]) -> str:
    answer = part["contestants"]["threefold"]["iterations"][-1]
    rates = ", ".join(f"{kernel} {rate / 1e9:.0f}" for kernel, rate in matrix_rate(part).items())
    fractions = ", ".join(f"{fraction:.2f}" for fraction in matrix_fractions(part))
    return (
        f"A: {answer['score_flop'] / 1e12:.3f} TFLOP to score and {answer['update_flop'] / 1e12:.3f} to update; "
        f"measured float32 matrix rates, GFLOP/s: {rates}; fractions of the best, iteration by iteration: {fractions}. "
        f"Largest difference between log-probs of rollout and training forward: {answer['max_abs_logprob_diff']:.1e}."
    )


def _workload_b_line(results: dict[str, Any]) -> str:
    material = results["material"]
    lengths = {
        LABELS[name]: [length for answer in contestant["iterations"] for length in answer["lengths"]]
        for name, contestant in results["parts"]["B"]["contestants"].items()
    }
    means = ", ".join(f"{name} {sum(found) / len(found):.1f}" for name, found in lengths.items())
    return (
        f"B: {material['hh_prompts']} prompts of at most 256 tokens ({material['hh_prompts_left_out']} longer ones "
        f"left out), {material['hh_mean_prompt_length']:.0f} tokens on average; stop probability "
        f"{material['stop_probability']:.4f}; mean length of the answers: {means}."
    )


def _growth(part: dict[str, Any]) -> list[str]:
    lines = [
        f"D: milliseconds per answer token (prompts of {part['prompt_length']} tokens, prefill included).",
        "",
        "| batch | answer length | threefold | transformers `generate` | ratio |",
        "|---|---|---|---|---|",
    ]
    for point in part["points"]:
        ours, theirs = (1e3 * per_token(point, name) for name in ("threefold", "transformers"))
        lines.append(f"| {point['batch']} | {point['length']} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f}× |")
    return lines


def rewrite(page: Path, results: dict[str, Any]) -> None:
    """Put the tables between the page's markers."""
    text = page.read_text(encoding="utf-8")
    block = f"{BEGIN}\n{markdown(results)}\n{END}"
    changed, count = re.subn(f"{BEGIN}.*?{END}", lambda _: block, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page}: needs the lines {BEGIN} and {END} once each")
    page.write_text(changed, encoding="utf-8")
