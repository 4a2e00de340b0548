"""The plan as text."""

from __future__ import annotations

import re

import pytest
import torch

from tests.tiny import tiny_recipe
from threefold.config.load import load_recipe
from threefold.errors import CheckpointError, ConfigError
from threefold.plan.describe import describe, print_plan

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def printed(*settings: str) -> list[str]:
    lines: list[str] = []
    print_plan(load_recipe(None, [*settings]), lines.append)
    return lines


def test_a_small_run_on_this_machine() -> None:
    lines: list[str] = []
    print_plan(tiny_recipe(), lines.append)
    assert lines[0] == "plan of tiny: 1 process on CPUs, matrix products in float32"
    assert any(re.fullmatch(r"actor +embedded +[\d.]+ K +[\d.]+ K +ZeRO 0", line) for line in lines)
    [header] = [line.split() for line in lines if line.split()[:1] == ["sft"]]
    assert header == ["sft", "reward", "generate", "score", "update"]
    [weights] = [line.split() for line in lines if line.startswith("weights")]
    numel = next(model.sizes.numel for model in describe(tiny_recipe()).models if model.role == "actor")
    assert weights[1] == f"{4 * numel / 2**20:.1f}"
    assert lines[-1].startswith("fits its share of the memory that is free here")
    assert not any(line != line.rstrip() or "\n" in line for line in lines)


def test_columns_are_aligned() -> None:
    lines = printed("--model.actor=opt-1.3b", "--run.device=cuda")
    table = [line for line in lines if re.match(r"(weights|optimizer|gradients|peak)", line)]
    assert len({len(line) for line in table}) == 1


@NO_GPU
def test_a_run_that_is_too_large_for_a_machine_without_gpus_is_planned_for_gpus() -> None:
    lines = printed("--model.actor=opt-66b", "--launch.deployment=multi_node", "--launch.nodes=8")
    assert lines[0] == "plan of run: 64 processes (8 on a machine), one GPU each, matrix products in bfloat16"
    assert "taken to be so: this machine has no GPU" in lines
    assert any(line.startswith("does not fit a GPU, 24 GiB: ") for line in lines)
    assert printed("--model.actor=opt-66b", "--run.device=cpu")[0].endswith("on CPUs, matrix products in float32")


def test_sizes_of_models_that_nobody_publishes_are_asked_of_the_disk() -> None:
    with pytest.raises(CheckpointError, match="no such directory") as refused:
        printed("--model.actor=./no/such/model")
    assert "\n" not in str(refused.value)


def test_adapters_of_no_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ppo\.actor_lora\.target_modules"):
        printed("--ppo.actor_lora.rank=4", "--ppo.actor_lora.target_modules=nothing")
