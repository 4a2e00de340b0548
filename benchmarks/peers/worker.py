"""How a contestant talks to the driver: one process per contestant, kept alive, which does one iteration per order.

The driver writes an order as a line of JSON, the worker answers with one. So contestants take turns iteration by
iteration, and whatever slows the machine for a while slows all of them. A waiting worker only waits: no thread of it
computes. What libraries print goes to standard error, so that standard output carries answers only.

This file uses the standard library alone: both interpreters run it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Orders:
    """The driver's orders, one by one, and the way to answer them."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def answer(self, **values: Any) -> None:
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()

    def next(self) -> dict[str, Any] | None:
        """Wait for the next order; None when there are no more."""
        line = sys.stdin.readline()
        order: dict[str, Any] | None = json.loads(line) if line.strip() else None
        return order

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (order := self.next()) is not None:
            yield order


def _status(field: str) -> int:
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}: memory is measured on Linux only")


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that was in RAM at once, since the process began or since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Let `peak_bytes` count from now."""
    RESET_PEAK.write_text("5", encoding="utf-8")
