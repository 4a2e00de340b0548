"""The plan of a recipe as a table for a reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from threefold.config.recipe import Recipe
from threefold.machine.memory import free_bytes
from threefold.plan.deployment import GIB, GPU_SIZES_GIB, Deployment, deployment_of
from threefold.plan.memory import Bytes, numbers
from threefold.plan.phases import PARTS, Plan, PlannedModel, make_plan

CPU = torch.device("cpu")


def describe(recipe: Recipe) -> Plan:
    """The plan for the deployment that the recipe asks for. Where run.device is "auto", this machine has no GPU, and
    the run does not fit its memory, it is for GPUs.

    Raises:
        ConfigError, CheckpointError: a model's source or adapters cannot be what the recipe says.
    """
    plan = make_plan(recipe, deployment_of(recipe))
    if recipe.run.device == "auto" and not plan.deployment.on_gpu and plan.peak.total > plan.deployment.device_bytes:
        return make_plan(recipe, deployment_of(recipe, on_gpu=True))
    return plan


def print_plan(recipe: Recipe, write: Callable[[str], None]) -> None:
    """Write what `describe` finds, line by line."""
    for line in plan_lines(describe(recipe), recipe.run.name):
        write(line)


def plan_lines(plan: Plan, name: str) -> list[str]:
    """The plan as lines: for what it is, its models, memory of each phase, whether that fits."""
    deployment = plan.deployment
    kind = "GPU" if deployment.on_gpu else "CPU"
    count = _processes(deployment.ranks)
    each = f" ({deployment.ranks_per_node} on a machine)" if deployment.ranks > deployment.ranks_per_node else ""
    unit = "MiB" if plan.peak.device < GIB else "GiB"
    products = "bfloat16" if deployment.bfloat16 else "float32"
    return [
        f"plan of {name}: {count}{each}, one {kind} each, matrix products in {products}"
        if deployment.on_gpu
        else f"plan of {name}: {count}{each} on {kind}s, matrix products in {products}",
        *(f"taken to be so: {assumed}" for assumed in deployment.assumed),
        "",
        *_aligned([("model", "source", "weights", "trained", "spread"), *map(_model_row, plan.models)]),
        "",
        f"Memory of one process at the peak of each phase, {unit}. (Activations are estimates.)",
        "",
        *_aligned(_memory_rows(plan)),
        "",
        *_verdict(plan),
    ]


def _processes(count: int) -> str:
    return f"{count} process" + ("es" if count > 1 else "")


def _model_row(model: PlannedModel) -> tuple[str, ...]:
    sizes = model.sizes
    trained = numbers(sizes.trained)
    return (model.role, model.source, _count(sizes.numel), _count(trained) if trained else "-", model.spread)


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def _memory_rows(plan: Plan) -> list[tuple[str, ...]]:
    number = _in_mib if plan.peak.device < GIB else _in_gib
    rows: list[tuple[str, ...]] = [("", *(phase.name for phase in plan.phases))]
    for part in PARTS:
        sizes = [phase.parts.get(part, Bytes()).device for phase in plan.phases]
        if any(sizes):
            rows.append((part, *map(number, sizes)))
    rows.append(("peak", *(number(phase.peak.device) for phase in plan.phases)))
    if plan.peak.host:
        rows.append(("in host memory", *(number(phase.peak.host) for phase in plan.phases)))
    return rows


def _in_gib(size: int) -> str:
    gib = size / GIB
    return "-" if size == 0 else f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}" if gib >= 0.01 else "<0.01"


def _in_mib(size: int) -> str:
    return "-" if size == 0 else f"{size / 2**20:.1f}"


def _verdict(plan: Plan) -> list[str]:
    deployment = plan.deployment
    if deployment.device_bytes:
        where = "the GPU here" if deployment.on_gpu else "its share of the memory that is free here"
        lines = [_fits(plan, deployment.device_bytes, where)]
    else:
        lines = [_fits(plan, gib * GIB, "a GPU") for gib in GPU_SIZES_GIB]
    if plan.peak.host:
        lines.append(_host(plan, deployment))
    return lines


def _fits(plan: Plan, device_bytes: int, where: str) -> str:
    """One line: whether all phases fit, and how many answers are decoded at a time where it is not all of them."""
    rows, size = plan.rows_that_fit(device_bytes), f"{where}, {device_bytes / GIB:.4g} GiB"
    if rows == 0:
        fullest = max(plan.phases, key=lambda phase: phase.peak.device)
        return f"does not fit {size}: {fullest.name} needs {_in_gib(fullest.peak.device)} GiB"
    if rows < plan.rows:
        return f"fits {size}, {rows} of {plan.rows} answers decoded at a time"
    return f"fits {size}"


def _host(plan: Plan, deployment: Deployment) -> str:
    needed = plan.peak.host * deployment.ranks_per_node
    free = f"; {free_bytes(CPU) / GIB:.4g} GiB are free here" if not deployment.assumed else ""
    return f"host memory of a machine: {_in_gib(needed)} GiB for its {_processes(deployment.ranks_per_node)}{free}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest entry; the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = [all(row[c][:1] in "-<0123456789" for row in rows[1:]) for c in range(len(widths))]
    return [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]
