"""What machine/linear.py, machine/memory.py and machine/attention.py are worth on this machine, side by side.

    .venv/bin/python benchmarks/matrix_kernels.py

Prints times as ratios of medians; a ratio above 1 means that threefold's choice is the faster one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import threefold  # noqa: F401  sets OpenMP's waiting before torch is loaded

# isort: split
import torch
import torch.nn.functional as F

from threefold.machine.attention import blocked_causal_attention
from threefold.machine.linear import PackedLinear, linear
from threefold.machine.memory import keep_freed_memory

REPEATS = 9
WIDE, NARROW, LAYERS = 2048, 512, 28
"""Shape of the matrices, and how many different ones a round reads, so that none is still in the cache."""


def medians(**contestants: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each, taken in turns after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(REPEATS + 1):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, times: dict[str, float]) -> None:
    """One line: the first contestant's time, and how many times as long it takes as each other one."""
    (first, base), *others = times.items()
    ratios = ", ".join(f"{name} {base / seconds:.2f}x" for name, seconds in others)
    print(f"{title:44s} {first} {base * 1e3:8.2f} ms; {ratios}")


@torch.no_grad()
def products() -> None:
    """A round of linear layers with few rows (decoding) and many (prompts, training)."""
    weights = [torch.randn(WIDE, NARROW) for _ in range(LAYERS)]
    for rows in (1, 4, 8, 16, 32, 64, 512, 2048):
        x = torch.randn(rows, NARROW)
        contestants: dict[str, Callable[[], object]] = {
            "torch": lambda x=x: [F.linear(x, weight) for weight in weights],
            "threefold": lambda x=x: [linear(x, weight) for weight in weights],
        }
        if PackedLinear.suits(weights[0]):
            packed = [PackedLinear(weight, None, rows) for weight in weights]
            contestants["packed"] = lambda x=x, packed=packed: [image(x) for image in packed]
        show(f"{LAYERS} linear layers {NARROW}x{WIDE}, {rows} rows", medians(**contestants))


def training() -> None:
    """Forward and backward of one linear layer, and of one attention."""
    weight = torch.randn(WIDE, NARROW, requires_grad=True)
    x = torch.randn(2048, NARROW, requires_grad=True)
    upstream = torch.randn(2048, WIDE)
    show(
        "linear layer, forward and backward",
        medians(
            torch=lambda: F.linear(x, weight).backward(upstream), threefold=lambda: linear(x, weight).backward(upstream)
        ),
    )
    for length in (256, 512, 1024):
        shape = (2048 // length, 8, length, 64)
        q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
        grad = torch.randn(shape)
        show(
            f"attention, {shape[0]} x {length} tokens, both ways",
            medians(
                torch=lambda q=q, k=k, v=v, grad=grad: F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(
                    grad
                ),
                threefold=lambda q=q, k=k, v=v, grad=grad: blocked_causal_attention(q, k, v, 0.125).backward(grad),
            ),
        )


def log_softmax_both_ways() -> float:
    """Median seconds of a log softmax over a vocabulary and its gradient: two large temporaries."""
    logits = torch.randn(2048, 8000, requires_grad=True)
    return medians(it=lambda: logits.log_softmax(dim=-1)[:, 0].sum().backward())["it"]


def main() -> None:
    """Everything, the memory setting last: it cannot be undone."""
    torch.manual_seed(0)
    products()
    training()
    before = log_softmax_both_ways()
    if keep_freed_memory():
        after = log_softmax_both_ways()
        show("log softmax [2048, 8000], both ways", {"glibc's default": before, "freed memory kept": after})


if __name__ == "__main__":
    main()
