"""What a benchmark shows: tables on the console, everything as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from threefold.bench.random_models import gib
from threefold.bench.results import DEEPSPEED_CHAT, PHASES
from threefold.metrics import RunLog

_COUNTED_COLUMNS = ("", "seconds", "share", "TFLOP", "TFLOP/s", "of rate", "memory")
_DEEPSPEED_COLUMNS = ("", "seconds", "TFLOP/s", "sequences/s", "ms per token", "GB/s")


def print_report(record: Mapping[str, Any], log: RunLog) -> None:
    """Two tables and the lines that do not fit into them; `record` is what `write_json` writes."""
    median, iterations = record["median"], record["options"]["iterations"]
    title = f"As DeepSpeed-Chat reports it, by its formulas (medians of {iterations})"
    log.table(title, _DEEPSPEED_COLUMNS, _deepspeed_chat_rows(median))
    title = "Counted: matrices and causal attention, no padding; of the measured rate"
    log.table(title, _COUNTED_COLUMNS, _counted_rows(median))
    log.note(_speed_line(median))
    if "decode/steps" in median:
        log.note(_decode_line(median))
    rates = record["machine"]
    log.note(
        f"this machine, measured: {_rate(rates['flop_per_second'], 1e12, 'TFLOP/s')}; "
        f"{_rate(rates['bytes_per_second'], 1e9, 'GB/s')}"
    )


def write_json(record: Mapping[str, Any], file: Path) -> None:
    """The record as JSON with every raw number."""
    file.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _deepspeed_chat_rows(median: Mapping[str, float]) -> list[tuple[str, ...]]:
    def shown(name: str, unit: float = 1.0) -> str:
        return _number(median[DEEPSPEED_CHAT + name] / unit)

    return [
        ("end-to-end", shown("end_to_end_seconds"), shown("end_to_end_tflops"), shown("samples_per_second"), "", ""),
        (
            "generation",
            shown("generation_seconds"),
            shown("generation_tflops"),
            "",
            shown("per_token_latency_seconds", 1e-3),
            shown("generation_gb_per_second"),
        ),
        ("training", shown("training_seconds"), shown("training_tflops"), "", "", ""),
    ]


def _counted_rows(median: Mapping[str, float]) -> list[tuple[str, ...]]:
    def row(name: str, *phases: str) -> tuple[str, ...]:
        seconds = sum(median[f"seconds/{phase}"] for phase in phases)
        flop = sum(median[f"flop/{phase}"] for phase in phases)
        key = "_and_".join(phases)
        return (
            name,
            _number(seconds),
            f"{seconds / median['seconds/iteration']:.0%}",
            _number(flop / 1e12),
            _number(median[f"flop_per_second/{key}"] / 1e12),
            f"{median[f'matrix_rate_fraction/{key}']:.3f}",
            gib(max(median[f"peak_bytes/{phase}"] for phase in phases)),
        )

    flop = sum(median[f"flop/{phase}"] for phase in PHASES)
    whole = (_number(median["seconds/iteration"]), "100%", _number(flop / 1e12), "", "")
    return [
        row("generate", "generate"),
        row("score", "score"),
        row("update", "update"),
        row("score, update", "score", "update"),
        ("iteration", *whole, gib(median["peak_bytes/iteration"])),
    ]


def _speed_line(median: Mapping[str, float]) -> str:
    return (
        f"whole iteration: {_number(median['sequences_per_second'])} sequences/s, "
        f"{_number(median['tokens_per_second'])} tokens/s (prompts and answers), "
        f"{_number(median['answer_tokens_per_second'])} answer tokens/s; while generating "
        f"{_number(median['generated_tokens_per_second'])} answer tokens/s; "
        f"prefill {_number(median['seconds/prefill'])} s"
    )


def _decode_line(median: Mapping[str, float]) -> str:
    weights = median["decode/weight_bytes_per_step"]
    return (
        f"decoding: {_number(1000 * median['decode/seconds_per_step'])} ms a step, which reads "
        f"{gib(weights + median['decode/key_value_bytes_per_step'])} ({gib(weights)} of weights, the rest keys and "
        f"values): {_number(median['decode/bytes_per_second'] / 1e9)} GB/s, "
        f"{median['bandwidth_fraction/decode']:.3f} of the measured bandwidth"
    )


def _rate(rate: Mapping[str, Any], unit: float, name: str) -> str:
    kernels = ", ".join(f"{kernel} {_number(value / unit)}" for kernel, value in rate["by_kernel"].items())
    return f"{_number(rate['best'] / unit)} {name} ({kernels})"


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
