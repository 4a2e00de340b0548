"""All three steps and the benchmark on a GPU, in bfloat16, as a user runs them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from tests.tiny import read_metrics, train, write_recipe
from threefold import cli

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ON_GPU = ("--run.device=cuda", "--run.dtype=bfloat16")
BFLOAT16_BOUND = 0.5


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("--ppo.offload_optimizer=true", "--ppo.gradient_checkpointing=true", "--ppo.micro_batch_tokens=200"),
        ("--ppo.actor_lora.rank=4", "--ppo.critic_lora.rank=4"),
        ("--generation.cuda_graphs=never", "--generation.packed_weights=never", "--generation.overlap_scoring=never"),
    ],
    ids=["defaults", "little memory", "adapters", "plain"],
)
def test_a_run(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    recipe = write_recipe(tmp_path / "gpu.toml", *ON_GPU, "--ppo.iterations=3", *overrides)
    assert train(recipe, tmp_path / "run") == 0
    iterations = [record for record in read_metrics(tmp_path / "run") if "objective/kl" in record]
    assert len(iterations) == 3
    for record in iterations:
        assert all(math.isfinite(value) for name, value in record.items() if name not in ("stage", "step"))
        assert 0 < record["parity/max_abs_logprob_diff"] < BFLOAT16_BOUND
        assert record["policy/grad_norm"] > 0
    assert (tmp_path / "run" / "ppo" / "actor" / "model.safetensors").is_file()


@pytest.mark.parametrize("extra", [[], ["--lora-rank", "4"], ["--offload-optimizer"]], ids=["whole", "lora", "offload"])
def test_the_benchmark(tmp_path: Path, extra: list[str]) -> None:
    actor = "opt:hidden=256,layers=2,heads=4,ffn=1024,vocab=1000,positions=256"
    critic = "opt:hidden=128,layers=2,heads=2,ffn=512,vocab=1000,positions=256"
    file = tmp_path / "bench.json"
    lengths = ["--batch", "8", "--prompt-length", "40", "--answer-length", "50", "--iterations", "2"]
    arguments = ["--actor", actor, "--critic", critic, "--device", "cuda", "--dtype", "bfloat16", *lengths, *extra]
    assert cli.main(["bench", *arguments, "--json", str(file)]) == 0
    record = json.loads(file.read_text("utf-8"))
    assert record["environment"]["device"] == "cuda"
    assert record["machine"]["flop_per_second"]["best"] > 1e12
    for iteration in record["iterations"]:
        assert iteration["losses"]["parity/max_abs_logprob_diff"] < BFLOAT16_BOUND
        assert iteration["metrics"]["sequences_per_second"] > 0


def test_the_benchmark_with_drawn_lengths(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.txt"
    lengths.write_text("5 1\n9 30\n30 12\n", encoding="utf-8")
    shape = "llama:hidden=256,layers=2,heads=4,kv_heads=2,ffn=512,vocab=1000,positions=128"
    file = tmp_path / "bench.json"
    arguments = ["--actor", shape, "--critic", shape, "--device", "cuda", "--dtype", "bfloat16", "--batch", "12"]
    assert cli.main(["bench", *arguments, "--lengths", str(lengths), "--json", str(file)]) == 0
    losses = [iteration["losses"] for iteration in json.loads(file.read_text("utf-8"))["iterations"]]
    assert all(loss["parity/max_abs_logprob_diff"] < BFLOAT16_BOUND for loss in losses)
