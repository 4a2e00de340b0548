"""Plans of whole recipes: what is there in which phase, and every shipped recipe without a network."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from threefold.config.load import load_recipe
from threefold.plan.deployment import GIB, Deployment, deployment_of
from threefold.plan.memory import Bytes
from threefold.plan.phases import (
    ACTIVATIONS,
    AVERAGE,
    CHECKPOINT,
    DECODE_WEIGHTS,
    GRADIENTS,
    KEYS_AND_VALUES,
    OPTIMIZER,
    WEIGHTS,
    Plan,
    make_plan,
)

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.toml"))
NODE = Deployment(on_gpu=True, bfloat16=True, ranks=8, ranks_per_node=8, device_bytes=0)
BIG = ("--model.actor=facebook/opt-1.3b", "--model.reward=facebook/opt-350m")


def plan_of(*settings: str, deployment: Deployment = NODE) -> Plan:
    return make_plan(load_recipe(None, [*BIG, *settings]), deployment)


def phase(plan: Plan, name: str) -> dict[str, Bytes]:
    return next(phase.parts for phase in plan.phases if phase.name == name)


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a plan needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("path", [path for path in RECIPES if "hh_stories" not in path.name], ids=lambda p: p.stem)
def test_every_shipped_recipe_is_planned(path: Path) -> None:
    recipe = load_recipe(path)
    plan = make_plan(recipe, deployment_of(recipe, on_gpu=path.stem != "demo"))
    assert [phase.name for phase in plan.phases] == ["sft", "reward", "generate", "score", "update"]
    assert all(phase.peak.device > 0 for phase in plan.phases)
    assert plan.rows >= 1


def test_parts_by_hand_on_one_gpu() -> None:
    one = Deployment(on_gpu=True, bfloat16=True, ranks=1, ranks_per_node=1, device_bytes=0)
    plan = plan_of("--ppo.prompts_per_iteration=10", deployment=one)
    actor, judge = 4 * 1_315_758_080, 4 * 331_197_952  # 350m: trunk and score head
    found = phase(plan, "update")
    critic = next(model.sizes.numel for model in plan.models if model.role == "critic")
    assert critic == pytest.approx(judge / 4, rel=0.01)
    assert found[WEIGHTS] == Bytes(2 * actor + 2 * 4 * critic)
    assert found[GRADIENTS] == Bytes(actor + 4 * critic)
    assert found[OPTIMIZER] == Bytes(2 * (actor + 4 * critic))
    assert found[AVERAGE] == Bytes(actor)
    assert found[CHECKPOINT] == Bytes(host=actor * 4 + 4 * critic * 3)
    row = 2 * 24 * 2048 * 512 * 2 + 64 * 24 * 2048  # keys and values of 512 positions in bfloat16, and spare lines
    assert phase(plan, "generate")[KEYS_AND_VALUES] == Bytes(10 * row)


def test_a_higher_stage_never_holds_more() -> None:
    plans = [plan_of(f"--parallel.actor.zero_stage={s}", f"--parallel.critic.zero_stage={s}") for s in range(4)]
    for name in ("sft", "update"):
        held = [sum(phase(plan, name)[part].device for part in (WEIGHTS, GRADIENTS, OPTIMIZER)) for plan in plans]
        assert held == sorted(held, reverse=True)
        assert held[0] > held[1] > held[2] == held[3]


def test_adapters_need_no_reference() -> None:
    plan = plan_of("--ppo.actor_lora.rank=8")
    assert "reference" not in [model.role for model in plan.models]
    whole, adapted = phase(plan_of(), "update"), phase(plan, "update")
    assert adapted[GRADIENTS].device < whole[GRADIENTS].device
    assert adapted[WEIGHTS].device < whole[WEIGHTS].device


def test_a_frozen_base_is_whole_where_it_fits() -> None:
    settings = ("--parallel.actor.zero_stage=3", "--ppo.actor_lora.rank=8")
    replicated = phase(plan_of(*settings, "--parallel.frozen_base=replicated"), "generate")[WEIGHTS]
    sharded = phase(plan_of(*settings, "--parallel.frozen_base=sharded"), "generate")[WEIGHTS]
    automatic = phase(plan_of(*settings), "generate")[WEIGHTS]
    assert sharded.device < replicated.device == automatic.device
    cramped = Deployment(on_gpu=True, bfloat16=True, ranks=8, ranks_per_node=8, device_bytes=8 * GIB)
    assert phase(plan_of(*settings, deployment=cramped), "generate")[WEIGHTS] == sharded


def test_offload_moves_to_the_host() -> None:
    kept, moved = plan_of(), plan_of("--parallel.actor.offload=optimizer", "--parallel.critic.offload=optimizer")
    assert phase(moved, "update")[OPTIMIZER].device == 0
    assert phase(moved, "update")[OPTIMIZER].host == phase(kept, "update")[OPTIMIZER].device * 3 // 2
    while_generating = plan_of("--ppo.offload_optimizer=true")
    assert phase(while_generating, "generate")[OPTIMIZER].device == 0
    assert phase(while_generating, "update")[OPTIMIZER] == phase(kept, "update")[OPTIMIZER]


def test_on_a_cpu_the_host_is_the_device() -> None:
    cpu = Deployment(on_gpu=False, bfloat16=False, ranks=2, ranks_per_node=2, device_bytes=0)
    plan = plan_of("--parallel.actor.offload=optimizer", "--ppo.offload_optimizer=true", deployment=cpu)
    assert plan.peak.host == 0
    assert phase(plan, "generate")[CHECKPOINT].device > 0


def test_checkpoints_that_are_off_need_no_copy() -> None:
    assert CHECKPOINT in phase(plan_of(), "sft")
    assert CHECKPOINT not in phase(plan_of("--checkpoint.every_minutes=0"), "sft")
    assert CHECKPOINT not in phase(plan_of("--checkpoint.asynchronous=false"), "sft")


def test_tensor_parallel_ranks_share_weights_and_cache() -> None:
    sharded = "--parallel.actor.zero_stage=3"
    alone, four = plan_of(sharded), plan_of(sharded, "--generation.inference_tp_size=4")
    assert four.row_bytes == alone.row_bytes // 4
    assert four.rows == 4 * alone.rows  # a group answers what its four would have
    # embeddings stay whole: 2.0 k x 52 k numbers of 4 bytes
    assert phase(four, "generate")[DECODE_WEIGHTS].device < phase(alone, "generate")[DECODE_WEIGHTS].device / 2


def test_micro_batches_and_checkpointing_bound_activations() -> None:
    many = phase(plan_of("--ppo.prompts_per_iteration=1024"), "update")[ACTIVATIONS].device
    small = phase(plan_of("--ppo.prompts_per_iteration=1024", "--ppo.micro_batch_size=2"), "update")[ACTIVATIONS].device
    again = phase(plan_of("--ppo.prompts_per_iteration=1024", "--ppo.gradient_checkpointing=true"), "update")
    assert small < many
    assert again[ACTIVATIONS].device < many


def test_rows_that_fit() -> None:
    plan = plan_of("--ppo.prompts_per_iteration=1024")
    generate = phase(plan, "generate")
    without_rows = sum(size.device for name, size in generate.items() if name != KEYS_AND_VALUES)
    assert plan.rows == 128
    roomy = plan.peak.device + 1
    assert plan.rows_that_fit(roomy) == 128
    assert plan.rows_that_fit(GIB) == 0
    largest_other = max(phase.peak.device for phase in plan.phases if phase.name != "generate")
    tight = max(largest_other, without_rows + 5 * plan.row_bytes)
    assert plan.rows_that_fit(tight) == min((tight - without_rows) // plan.row_bytes, 128)
    limited = plan_of("--ppo.prompts_per_iteration=1024", "--generation.kv_memory_gib=1")
    assert limited.rows == GIB // plan.row_bytes


def test_ranks_follow_the_recipe() -> None:
    multi = load_recipe(None, ["--launch.deployment=multi_node", "--launch.nodes=3", "--launch.processes_per_node=4"])
    assert deployment_of(multi, on_gpu=True).ranks == 12
    single = load_recipe(None, ["--launch.processes_per_node=4"])
    assert deployment_of(single, on_gpu=True).ranks == 1
    node = deployment_of(load_recipe(None, ["--launch.deployment=single_node"]), on_gpu=False)
    assert (node.ranks, node.bfloat16) == (1, False)


def test_the_critics_frozen_base_has_to_fit_beside_the_others() -> None:
    settings = ("--model.reward=facebook/opt-1.3b", "--ppo.actor_lora.rank=8", "--ppo.critic_lora.rank=8")
    stages = [f"--parallel.{name}.zero_stage=3" for name in ("actor", "critic", "scorer")]
    roomy, tight = (
        Deployment(on_gpu=True, bfloat16=True, ranks=8, ranks_per_node=8, device_bytes=gib * GIB) for gib in (40, 12)
    )
    whole, beside = (phase(plan_of(*settings, *stages, deployment=d), "generate")[WEIGHTS] for d in (roomy, tight))
    base = 4 * 1_315_758_080  # 4.9 GiB: half of 12 holds it, half of what the actor leaves of them does not
    assert whole.device > 2 * base
    assert base < beside.device < 1.5 * base
