"""How step 3 scales: measured from one to two processes on this machine, and computed for 8, 64 and 512 GPUs beside
what DeepSpeed-Chat has published.

    .venv/bin/python -m benchmarks.scaling measure [--zero-stage 0 3]    `threefold train` with 1 and 2 processes
    .venv/bin/python -m benchmarks.scaling table                         the computed tables

Measured are whole runs as a user starts them: one thread a process, a 25 M model, step 3's iterations of 24 answers
(strong scaling: the same work, shared) and of 24 a process (weak scaling: twice the work). Efficiency is how much of
the ideal is reached: t1 / (2 t2) strong, t1 / t2 weak. Two runs of one process each at the same time, which have
nothing to tell each other, show what the machine itself takes off: cores share caches, memory and, as hyper-threads,
arithmetic units. The first iteration does not count; of the others it is the
median. What share of the machine other processes had meanwhile is told, and a run in which it was more than 5 % is no
measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.scaling_model import A100_40, A100_80, Assumptions, Hardware, Model, Setting, StepTime

BAR, DISTURBED = 0.8, 0.05
SEQUENCES, ITERATIONS = 24, 5
TICKS = os.sysconf("SC_CLK_TCK")
RECIPE = """
[run]
name = "scaling"
device = "cpu"
num_threads = 1
[model.embedded]
hidden_size = 512
num_layers = 8
num_heads = 8
ffn_dim = 2048
[data]
split = [1, 1, 8]
max_length = 128
max_prompt_length = 96
long_rows = "drop"
[data.demo]
num_prompts = 1000
[sft]
max_steps = 1
max_eval_examples = 8
[reward]
max_steps = 1
max_eval_examples = 8
[ppo]
num_eval_prompts = 8
warmup_steps = 0
[ppo.sampling]
min_new_tokens = 31
max_new_tokens = 32
[checkpoint]
every_minutes = 0
[evaluate]
num_prompts = 4
num_samples = 0
"""


def measure(processes: int, sequences: int, zero_stage: int, iterations: int = ITERATIONS) -> dict[str, Any]:
    """Seconds of each iteration of step 3 but the first, and of its phases, of a run with so many processes."""
    with tempfile.TemporaryDirectory() as directory:
        recipe, output = Path(directory) / "recipe.toml", Path(directory) / "run"
        recipe.write_text(RECIPE, encoding="utf-8")
        settings = {
            "ppo.iterations": iterations,
            "ppo.prompts_per_iteration": sequences,
            "parallel.actor.zero_stage": zero_stage,
            "parallel.critic.zero_stage": zero_stage,
            "launch.deployment": "single_node" if processes > 1 else "single_gpu",
            "launch.processes_per_node": processes,
        }
        flags = [f"--{name}={value}" for name, value in settings.items()]
        before, started = _others_seconds(), time.perf_counter()
        command = [sys.executable, "-m", "threefold", "train", str(recipe), "--output-dir", str(output), *flags]
        done = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        share = _share(before, started)
        lines = map(json.loads, (output / "metrics.jsonl").read_text("utf-8").splitlines())
        timed = [line for line in lines if line.get("stage") == "ppo" and "timing_s/generate" in line][1:]
    phases = {p: [line[f"timing_s/{p}"] for line in timed] for p in ("generate", "score", "update")}
    return {
        "seconds": statistics.median(map(sum, zip(*phases.values(), strict=True))),
        **{phase: statistics.median(values) for phase, values in phases.items()},
        "others_share": share,
    }


def _share(others_before: float, started: float) -> float:
    """Of the machine's processor time since then, what all but this process and its children had."""
    seconds = (time.perf_counter() - started) * (os.cpu_count() or 1)
    return max(_others_seconds() - others_before, 0.0) / seconds


def _others_seconds() -> float:
    """Processor time that everything but this process and its children has had, seconds."""
    if not Path("/proc/stat").is_file():
        return 0.0
    total = sum(map(int, Path("/proc/stat").read_text("utf-8").splitlines()[0].split()[1:4])) / TICKS
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return total - sum(usage.ru_utime + usage.ru_stime for usage in own)  # children count once they have ended


def run_measured(zero_stages: Iterable[int]) -> dict[str, Any]:
    """One process once; for each stage two processes on the same work and on twice the work. Prints as it goes."""
    alone = measure(1, SEQUENCES, 0)
    results: dict[str, Any] = {"1 process": alone}
    print(_line("1 process", SEQUENCES, alone, None), flush=True)
    before, started = _others_seconds(), time.perf_counter()
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: measure(1, SEQUENCES, 0), range(2)))
    slower = max(both, key=lambda found: found["seconds"])
    slower["others_share"] = _share(before, started)
    results["2 separate runs"] = slower | {"ceiling": alone["seconds"] / slower["seconds"]}
    print(_line("2 separate runs at once", SEQUENCES, slower, results["2 separate runs"]["ceiling"]), flush=True)
    for stage in zero_stages:
        for kind, factor in (("strong", 1), ("weak", 2)):
            found = measure(2, SEQUENCES * factor, stage)
            efficiency = alone["seconds"] * factor / (2 * found["seconds"])
            results[f"2 processes, ZeRO {stage}, {kind}"] = {**found, "efficiency": efficiency}
            print(_line(f"2 processes, ZeRO {stage}, {kind}", SEQUENCES * factor, found, efficiency), flush=True)
    return results


def _line(name: str, sequences: int, found: dict[str, Any], efficiency: float | None) -> str:
    seconds = " | ".join(f"{found[phase]:.2f}" for phase in ("seconds", "generate", "score", "update"))
    reached = "" if efficiency is None else f"{efficiency:.2f}"
    return f"| {name} | {sequences} | {seconds} | {reached} | {found['others_share']:.0%} |"


# ---------------------------------------------------------------------------------------------------------- computed

SETTINGS: dict[str, Setting] = {
    "1.3B": Setting("facebook/opt-1.3b", zero_stage=2),
    "6.7B": Setting("facebook/opt-6.7b"),
    "13B": Setting("facebook/opt-13b", lora_rank=128, tensor_parallel=2),
    "66B": Setting("facebook/opt-66b", lora_rank=128, tensor_parallel=8),
}
"""As DeepSpeed-Chat's own scripts for these sizes have them: ZeRO stage, adapters, tensor-parallel size."""

GLOBAL_BATCH, PER_GPU = 1024, 16
RANKS = (8, 64, 512)
QUERIES = 264_292
PUBLISHED_HOURS = {"1.3B": (1.4, 31 / 60), "6.7B": (4.1, 51 / 60), "13B": (9.0, 1.25), "66B": (50.4, 7.5)}
"""Step 3 over 264,292 prompts of 256 tokens with answers of 256, on 8 and on 64 A100-80G, DeepSpeed-Chat's tables."""
PUBLISHED_FIGURE = {("13B", "A100-40G"): (7.0, 14.0, 23.5, 48.0), ("66B", "A100-80G"): (1.5, 3.3, 5.7, 10.0)}
"""Sequences a second on 1, 2, 4 and 8 machines of 8 GPUs, read off the figure of its scaling, to within some 5 %."""


def tables(assumptions: Assumptions) -> list[str]:
    """Markdown: strong and weak scaling, then beside the published numbers."""
    return [
        f"Assumed: {assumptions_text(A100_80, assumptions)}",
        "",
        f"Strong scaling: {GLOBAL_BATCH} sequences an iteration (256 + 256 tokens) on A100-80G.",
        "",
        *_grid(assumptions, lambda ranks: GLOBAL_BATCH),
        "",
        f"Weak scaling: {PER_GPU} sequences a GPU.",
        "",
        *_grid(assumptions, lambda ranks: PER_GPU * ranks),
        "",
        "Beside DeepSpeed-Chat's tables (8 and 64 A100-80G, reward model OPT-350M):",
        "",
        *_beside_tables(assumptions),
        "",
        "Beside the figure of its scaling (1, 2, 4, 8 machines):",
        "",
        *_beside_figure(assumptions),
    ]


def assumptions_text(hardware: Hardware, assumptions: Assumptions) -> str:
    """One sentence with every number that the tables rest on."""
    return (
        f"{hardware.name}: {hardware.flop_per_second / 1e12:.0f} TFLOP/s bfloat16, of which training reaches "
        f"{assumptions.training:.0%} and reading {assumptions.scoring:.0%}; "
        f"{hardware.memory_bandwidth / 1e12:.3g} TB/s, of which decoding reaches {assumptions.decoding:.0%}; "
        f"{hardware.node_bandwidth / 1e9:.0f} GB/s a GPU within a machine and {hardware.network_bandwidth / 1e9:.0f} "
        f"GB/s a machine between them, of which collectives reach {assumptions.wire:.0%}, "
        f"{hardware.latency * 1e6:.0f} µs each; passes of {assumptions.pass_tokens} tokens; gradient checkpointing; "
        "communication is hidden behind arithmetic in score and update, and not in generate; answers all 256 tokens."
    )


def _grid(assumptions: Assumptions, sequences: Any) -> list[str]:
    lines = [
        "| OPT | GPUs | sequences/s | efficiency | generate s | of it gather | all-reduce | score s | update s "
        "| communication s | rank GiB |",
        "|---" * 11 + "|",
    ]
    for name, setting in SETTINGS.items():
        model, first = Model(setting, A100_80, assumptions), None
        for ranks in RANKS:
            step = model.step(ranks, sequences(ranks))
            if step is None:
                lines.append(f"| {name} | {ranks} | does not fit |" + " |" * 8)
                continue
            first = first or (ranks, step.sequences_per_second)
            lines.append(_row(name, ranks, step, step.sequences_per_second * first[0] / first[1] / ranks))
    return lines


def _row(name: str, ranks: int, step: StepTime, efficiency: float) -> str:
    seconds = (step.generate, step.gather, step.tensor_parallel, step.score, step.update, step.communication)
    cells = [f"{step.sequences_per_second:.1f}", f"{efficiency:.2f}", *(f"{value:.2f}" for value in seconds)]
    return f"| {name} | {ranks} | " + " | ".join(cells) + f" | {step.peak_bytes / 2**30:.0f} |"


def _beside_tables(assumptions: Assumptions) -> list[str]:
    lines = [
        "| OPT | published 8 | 64 | factor | computed 8 | 64 | factor | published / computed, 8 | 64 |",
        "|---" * 9 + "|",
    ]
    for name, hours in PUBLISHED_HOURS.items():
        published = [QUERIES / (h * 3600) for h in hours]
        lines.append(_beside(name, published, _rates(SETTINGS[name], A100_80, (8, 64), assumptions)))
    return lines


def _rates(setting: Setting, hardware: Hardware, ranks: Sequence[int], assumptions: Assumptions) -> list[float]:
    """Sequences a second; 0 where it does not fit."""
    steps = [Model(setting, hardware, assumptions).step(count, GLOBAL_BATCH) for count in ranks]
    return [0.0 if step is None else step.sequences_per_second for step in steps]


def _beside(name: str, published: Sequence[float], computed: Sequence[float]) -> str:
    def cells(rates: Sequence[float]) -> list[str]:
        factor = f"{rates[-1] / rates[0]:.1f}" if rates[0] else "-"
        return [*(f"{rate:.1f}" if rate else "does not fit" for rate in rates), factor]

    shares = [f"{p / c:.2f}" if c else "-" for p, c in zip(published, computed, strict=True)]
    return f"| {name} | " + " | ".join([*cells(published), *cells(computed), *shares]) + " |"


def _beside_figure(assumptions: Assumptions) -> list[str]:
    lines = ["| OPT | on | | 8 | 16 | 32 | 64 | 8 to 64 |", "|---" * 8 + "|"]
    for (name, where), published in PUBLISHED_FIGURE.items():
        hardware = A100_40 if where == A100_40.name else A100_80
        computed = _rates(SETTINGS[name], hardware, (8, 16, 32, 64), assumptions)
        for what, rates in (("published", published), ("computed", computed)):
            shown = " | ".join(f"{rate:.1f}" if rate else "does not fit" for rate in rates)
            factor = f"{rates[-1] / rates[0]:.1f}" if rates[0] else "-"
            lines.append(f"| {name} | {where} | {what} | {shown} | {factor} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["measure", "table"])
    parser.add_argument("--zero-stage", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--json", type=Path, help="file to write what was measured to")
    arguments = parser.parse_args()
    if arguments.what == "table":
        print("\n".join(tables(Assumptions())))
        return 0
    print("| | sequences | iteration s | generate | score | update | efficiency | others had |\n" + "|---" * 8 + "|")
    results = run_measured(arguments.zero_stage)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    disturbed = max(found["others_share"] for found in results.values())
    if disturbed > DISTURBED:
        print(f"\nother processes had up to {disturbed:.0%} of the machine: this is no measurement", file=sys.stderr)
        return 1
    lowest = min(found["efficiency"] for found in results.values() if "efficiency" in found)
    print(f"\nlowest efficiency {lowest:.2f}, bar {BAR}")
    return 0 if lowest >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
