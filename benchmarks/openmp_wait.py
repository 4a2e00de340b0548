"""Why threefold sets GOMP_SPINCOUNT: a small model's training step, alone and beside busy processes.

    python benchmarks/openmp_wait.py   median seconds per step for each setting, ratio to OpenMP's default

Each case is a process of its own, since OpenMP reads its variables once. The neighbours are two processes that count.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

NEIGHBOUR = "while True: pass"
NUM_STEPS = 8
SETTINGS = ("OMP_WAIT_POLICY=PASSIVE", "GOMP_SPINCOUNT=5000")


def measure() -> None:
    """Time training steps of the embedded model, and print them as JSON."""
    import torch  # noqa: PLC0415  (the parent process must not load it)
    from transformers import OPTConfig, OPTForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=512,
        hidden_size=128,
        word_embed_proj_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=512,
    )
    model = OPTForCausalLM(config)
    ids = torch.randint(0, 512, (32, 40))
    seconds = []
    for _ in range(NUM_STEPS + 2):
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        seconds.append(time.perf_counter() - started)
    print(json.dumps(seconds[2:]))


def median_step(setting: str, num_neighbours: int) -> float:
    """Median seconds of a step in a fresh process with this variable set ("" for OpenMP's default)."""
    neighbours = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(num_neighbours)]
    try:
        own = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
        environment = {name: value for name, value in os.environ.items() if name not in own}
        if setting:
            name, value = setting.split("=")
            environment[name] = value
        output = subprocess.run(
            [sys.executable, __file__, "--measure"], env=environment, capture_output=True, text=True, check=True
        ).stdout
    finally:
        for neighbour in neighbours:
            neighbour.kill()
    return statistics.median(json.loads(output.splitlines()[-1]))


def main() -> None:
    for num_neighbours in (0, 2):
        where = f"beside {num_neighbours} busy processes" if num_neighbours else "alone"
        default = median_step("", num_neighbours)
        print(f"{where}: default {default:.3f} s")
        for setting in SETTINGS:
            seconds = median_step(setting, num_neighbours)
            print(f"{where}: {setting} {seconds:.3f} s, {seconds / default:.2f} of the default")


if __name__ == "__main__":
    measure() if "--measure" in sys.argv else main()
