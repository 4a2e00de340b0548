"""`threefold bench` from its options to its report."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from threefold import __version__
from threefold.bench.flops import model_cost
from threefold.bench.iteration import actor_lora, run_iteration, set_up
from threefold.bench.options import BenchOptions
from threefold.bench.perf_formulas import PerfSizes
from threefold.bench.random_models import activation_bytes, check_memory, memory_need, plan_models, random_causal_lm
from threefold.bench.report import print_report, write_json
from threefold.bench.results import Counted, Measurement, iteration_metrics, medians
from threefold.bench.workload import LengthPairs, draw_workloads, length_pairs
from threefold.config.recipe import RunSection
from threefold.engine.device import make_repeatable, pick_device, pick_dtype
from threefold.engine.sharing import micro_batching
from threefold.errors import ConfigError
from threefold.machine.memory import free_bytes, resident_bytes, return_freed_memory
from threefold.machine.rates import MeasuredRate, bandwidth, matrix_rate
from threefold.metrics import RunLog
from threefold.models.shapes import Shape, find_shape


@dataclass(frozen=True)
class Plan:
    """What is run, known before anything is made.

    Attributes:
        actor, critic: shapes.
        actor_model, critic_model: as they will be trained, on the meta device: to be counted.
        pairs: the lengths.
    """

    options: BenchOptions
    actor: Shape
    critic: Shape
    actor_model: PreTrainedModel
    critic_model: PreTrainedModel
    pairs: LengthPairs
    device: torch.device
    dtype: torch.dtype


def run_bench(options: BenchOptions, command: Sequence[str], log: RunLog | None = None) -> dict[str, Any]:
    """Run the benchmark, print its report and return it, as it is written to `options.json`.

    Args:
        command: the command line, for the record.

    Raises:
        ConfigError, DataError: a shape, a length or a file that cannot be used, or models that the memory cannot hold.
    """
    log = log or RunLog(Path())
    plan = _plan(options, log)
    make_repeatable(RunSection(seed=options.seed, num_threads=options.threads))
    need, free = memory_need(plan.actor_model, plan.critic_model, _activations(plan)), free_bytes(plan.device)
    check_memory(need, free, plan.device, f"actor {plan.actor.name} and critic {plan.critic.name}")
    log.note(_headline(plan))
    before = _rates(plan)
    resident = resident_bytes(plan.device)
    measured = _measure(plan, log)
    rates = [first.or_better(second) for first, second in zip(before, _rates(plan), strict=True)]
    counted = _count(plan, *rates)
    metrics = [iteration_metrics(measurement, counted) for measurement in measured]
    record = {
        "command": list(command),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "environment": _environment(plan),
        "machine": {"flop_per_second": asdict(rates[0]), "bytes_per_second": asdict(rates[1])},
        "models": {
            "actor": _model_record(plan.actor, plan.actor_model),
            "critic": _model_record(plan.critic, plan.critic_model),
        },
        "memory": {"needed_bytes": dict(need.parts), "free_bytes": free, "resident_bytes": resident},
        "lengths": {"longest_prompt": counted.longest_prompt, "longest_answer": counted.longest_answer},
        "iterations": [
            {"warmup": index < options.warmup, "lengths": measurement.lengths, "metrics": numbers, "losses": losses}
            for index, (measurement, numbers) in enumerate(zip(measured, metrics, strict=True))
            for losses in [dict(measurement.losses)]
        ],
        "median": medians(metrics[options.warmup :]),
    }
    print_report(record, log)
    if options.json is not None:
        write_json(record, options.json)
        log.note(f"all numbers: {options.json}")
    return record


def _plan(options: BenchOptions, log: RunLog) -> Plan:
    actor, critic = find_shape(options.actor, "--actor"), find_shape(options.critic, "--critic")
    if critic.vocab_size < actor.vocab_size:
        log.note(
            f"critic {critic.name} gets the actor's vocabulary: {actor.vocab_size} tokens, not {critic.vocab_size}"
        )
        critic = critic.with_vocabulary(actor.vocab_size)
    pairs = length_pairs(options)
    prompt, answer = pairs.longest()
    for which, shape in (("actor", actor), ("critic", critic)):
        if prompt + answer > shape.max_positions:
            raise ConfigError(
                f"prompts of {prompt} and answers of {answer} tokens are longer than the context of {which} "
                f"{shape.name}, {shape.max_positions}: lower --prompt-length or --answer-length"
            )
    device = pick_device(options.device)
    models = plan_models(actor, critic, actor_lora(options))
    return Plan(options, actor, critic, *models, pairs, device, pick_dtype(options.dtype, device))


def _activations(plan: Plan) -> int:
    """Of one forward pass of the larger model, at least, whichever lengths are drawn."""
    options, lengths = plan.options, [prompt + answer for prompt, answer in plan.pairs.pairs]
    limit = micro_batching(0, options.micro_batch_tokens, plan.device).max_tokens
    sequences = options.batch * options.answers_per_prompt // options.minibatches
    tokens = min(sequences, max(limit // max(lengths), 1)) * min(lengths)
    return max(
        activation_bytes(shape, tokens, plan.dtype, options.gradient_checkpointing)
        for shape in (plan.actor, plan.critic)
    )


def _rates(plan: Plan) -> tuple[MeasuredRate, MeasuredRate]:
    """The machine's matrix rate and bandwidth; what measuring them took is given back."""
    rates = matrix_rate(plan.device, plan.dtype), bandwidth(plan.device)
    return_freed_memory(plan.device)
    return rates


def _count(plan: Plan, flop_rate: MeasuredRate, byte_rate: MeasuredRate) -> Counted:
    actor, critic = model_cost(plan.actor_model), model_cost(plan.critic_model)
    reference = model_cost(random_causal_lm(plan.actor, torch.device("meta"), seed=0))
    bytes_per_number = plan.dtype.itemsize
    longest_prompt, longest_answer = plan.pairs.longest()
    key_value_width = plan.actor.num_layers * plan.actor.num_kv_heads * plan.actor.head_dim
    return Counted(
        actor=actor,
        reference=reference,
        critic=critic,
        actor_sizes=_perf_sizes(plan.actor, plan.actor_model, plan.options),
        critic_sizes=_perf_sizes(plan.critic, plan.critic_model, plan.options),
        longest_prompt=longest_prompt,
        longest_answer=longest_answer,
        weight_bytes=bytes_per_number * (reference.trained + reference.head),
        key_value_bytes_per_token=bytes_per_number * 2 * key_value_width,
        bytes_per_number=bytes_per_number,
        flop_per_second=flop_rate.best,
        bytes_per_second=byte_rate.best,
        one_critic_pass=plan.options.minibatches == 1,
    )


def _perf_sizes(shape: Shape, model: PreTrainedModel, options: BenchOptions) -> PerfSizes:
    return PerfSizes(
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        vocab_size=shape.vocab_size,
        num_parameters=_num_parameters(model),
        lora_rank=options.lora_rank if model.can_generate() else 0,
        checkpointing=options.gradient_checkpointing,
    )


def _measure(plan: Plan, log: RunLog) -> list[Measurement]:
    """All iterations, those of the warm-up first."""
    try:
        return _iterations(plan, log)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{plan.device.type} is out of memory: lower --batch or --micro-batch-tokens, or take smaller shapes, "
            "--gradient-checkpointing or --offload-optimizer"
        ) from error


def _iterations(plan: Plan, log: RunLog) -> list[Measurement]:
    options, (_, longest_answer) = plan.options, plan.pairs.longest()
    count = options.warmup + options.iterations
    step3 = set_up(options, plan.actor, plan.critic, longest_answer, plan.device, plan.dtype, log.note)
    measured = []
    with log.progress("bench ", count) as bar:
        for index, work in enumerate(draw_workloads(options, plan.pairs, plan.actor.vocab_size, count)):
            measured.append(run_iteration(step3, work, index))
            bar.advance(seconds=sum(measured[-1].seconds.values()))
    return measured


def _headline(plan: Plan) -> str:
    options, (prompt, answer) = plan.options, plan.pairs.longest()
    sizes = [_num_parameters(model) / 1e6 for model in (plan.actor_model, plan.critic_model)]
    adapters = f" with adapters of rank {options.lora_rank}" if options.lora_rank else ""
    upto = "up to " if len(set(plan.pairs.pairs)) > 1 else ""
    answers = f"{options.answers_per_prompt} answers" if options.answers_per_prompt > 1 else "one answer"
    return (
        f"actor {plan.actor.name}, {sizes[0]:,.1f} M parameters{adapters}; critic and reward model {plan.critic.name}, "
        f"{sizes[1]:,.1f} M; {options.batch} prompts of {upto}{prompt} tokens with {answers} "
        f"of {upto}{answer} each; {plan.device.type}, {_dtype_name(plan.dtype)}"
    )


def _environment(plan: Plan) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else None
    return {
        "threefold": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": plan.device.type,
        "device_name": gpu or _processor_name(),
        "dtype": _dtype_name(plan.dtype),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _processor_name() -> str:
    """As the system calls it; on Linux the model in /proc/cpuinfo, which `platform` does not read."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _model_record(shape: Shape, model: PreTrainedModel) -> dict[str, Any]:
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    sizes = {name: dict(value) if name == "rope" else value for name, value in vars(shape).items()}
    return {**sizes, "num_parameters": _num_parameters(model), "num_trained_parameters": learning}


def _num_parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
