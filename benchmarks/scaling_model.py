"""How long an iteration of step 3 takes on many GPUs, from counted arithmetic and counted bytes; nothing is measured.

Time of a phase is the larger of its arithmetic and its communication, which FSDP lets happen at the same time; a decode
step is the larger of its arithmetic and its reading of memory, and then its communication, which nothing hides. The
formulas, with W ranks, t of them decoding together, S sequences of P + A tokens, L blocks D wide, Ψ weights of which Φ
learn, Ψ' of which are shards, k passes of a rank over its sequences:

    gather once         4 Ψ' (W - 1) / W bytes received, float32
    decode step         max(FLOP / peak, (b Ψ + keys and values) / t / memory bandwidth), of rows S t / W
                        + 2 L all-reduces of rows D b bytes, each 2 (t - 1) / t of that, and a latency
    score               FLOP; stage 3: k gathers of each model's shards
    update              FLOP; stage 3: k (2 gathers + 4 Φ (W - 1) / W to sum the gradients); below it, once,
                        2 * 4 Φ (W - 1) / W

(Rajbhandari et al. 2020, "ZeRO", section 7, counts the same volumes; Shoeybi et al. 2019, "Megatron-LM", section 3, the
two all-reduces of a block.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import threefold  # noqa: F401  before torch: it sets how OpenMP waits

# isort: split
import torch

from threefold.bench.flops import ModelCost, causal_pairs, iteration_flop, model_cost
from threefold.bench.random_models import plan_models
from threefold.config.load import load_recipe
from threefold.config.recipe import LoRASection
from threefold.inference.kv_cache import CacheLayout
from threefold.models.shapes import Shape, find_shape
from threefold.plan.deployment import Deployment
from threefold.plan.phases import Plan, make_plan

HALF_BYTES, FLOAT_BYTES = 2, 4


@dataclass(frozen=True)
class Hardware:
    """A machine with GPUs, per GPU where not said otherwise; bytes and seconds.

    Attributes:
        flop_per_second: bfloat16 matrix products, without sparsity.
        node_bandwidth: to the GPUs of the same machine, one way.
        network_bandwidth: of all network cards of a machine together, one way: what a ring through all GPUs passes on.
        latency: of a collective operation.
    """

    name: str
    flop_per_second: float
    memory_bytes: int
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    gpus_per_node: int = 8
    latency: float = 20e-6


A100_80 = Hardware("A100-80G", 312e12, 80 * 2**30, 2.039e12, 300e9, 200e9)
A100_40 = Hardware("A100-40G", 312e12, 40 * 2**30, 1.555e12, 300e9, 200e9)
"""NVIDIA's data sheet; NVLink 600 GB/s both ways; 8 network cards of 200 Gbit/s, as Azure's NDv4 machines have."""


@dataclass(frozen=True)
class Assumptions:
    """Shares of the peak that are reached. They are assumed, not measured."""

    training: float = 0.40
    scoring: float = 0.45
    decoding: float = 0.60
    wire: float = 0.70
    pass_tokens: int = 8192


@dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    Attributes:
        lora_rank: of the actor; 0 trains it whole.
        zero_stage: of the actor; the critic, small beside it, is whole on every rank.
        tensor_parallel: ranks that decode together.
    """

    actor: str
    critic: str = "facebook/opt-350m"
    zero_stage: int = 3
    lora_rank: int = 0
    tensor_parallel: int = 1
    prompt_tokens: int = 256
    answer_tokens: int = 256

    def plan(self, ranks: int, sequences: int, hardware: Hardware, pass_tokens: int) -> Plan:
        """What it needs of a rank's memory."""
        recipe = load_recipe(
            None,
            [
                f"--model.actor={self.actor}",
                f"--model.reward={self.critic}",
                f"--parallel.actor.zero_stage={self.zero_stage}",
                f"--parallel.reference.zero_stage={3 if self.zero_stage == 3 else 0}",
                "--parallel.frozen_base=sharded",
                f"--ppo.actor_lora.rank={self.lora_rank}",
                f"--ppo.prompts_per_iteration={sequences}",
                f"--ppo.micro_batch_tokens={pass_tokens}",
                "--ppo.gradient_checkpointing=true",
                "--ppo.ema.enabled=false",
                f"--data.max_prompt_length={self.prompt_tokens}",
                f"--ppo.sampling.max_new_tokens={self.answer_tokens}",
                f"--generation.inference_tp_size={self.tensor_parallel}",
            ],
        )
        per_node = min(ranks, hardware.gpus_per_node)
        plan = make_plan(recipe, Deployment(True, True, ranks, per_node, hardware.memory_bytes))
        return replace(plan, phases=tuple(phase for phase in plan.phases if phase.name not in ("sft", "reward")))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one iteration by phase, and what is in them.

    Attributes:
        gather, tensor_parallel: of generate: filling the arena, and the all-reduces of its steps.
        communication: of score and update, whether it is hidden or not.
        waves: decodings one after the other, because the cache does not hold all answers at once.
        peak_bytes: memory of a rank, in training.
    """

    sequences: int
    generate: float
    score: float
    update: float
    gather: float
    tensor_parallel: float
    communication: float
    waves: int
    peak_bytes: int

    @property
    def seconds(self) -> float:
        return self.generate + self.score + self.update

    @property
    def sequences_per_second(self) -> float:
        return self.sequences / self.seconds


@dataclass(frozen=True)
class Model:
    """The time of iterations of one setting on one kind of machine."""

    setting: Setting
    hardware: Hardware
    assumptions: Assumptions = field(default_factory=Assumptions)

    def step(self, ranks: int, sequences: int) -> StepTime | None:
        """One iteration; None where it does not fit the memory."""
        plan = self.setting.plan(ranks, sequences, self.hardware, self.assumptions.pass_tokens)
        fitting = plan.rows_that_fit(int(0.95 * self.hardware.memory_bytes))
        if fitting == 0:
            return None
        actor, reference, critic = self._costs()
        length = (self.setting.prompt_tokens, (self.setting.answer_tokens,))
        flop = iteration_flop([length], actor, reference, critic)
        per_rank = sequences / ranks
        speed = self.hardware.flop_per_second
        sizes = next(model.sizes for model in plan.models if model.role == "actor")
        passes = math.ceil(per_rank * sum((length[0], length[1][0])) / self.assumptions.pass_tokens)
        shards = FLOAT_BYTES * sizes.numel if self.setting.zero_stage == 3 else 0
        sums = FLOAT_BYTES * sum(weight.numel for weight in sizes.trained)
        of_score = self._wire(passes * shards, ranks)
        of_update = self._wire(passes * (2 * shards + sums) if shards else 2 * sums, ranks)
        score = max(flop.score * per_rank / (speed * self.assumptions.scoring), of_score)
        # checkpointing computes each forward pass once more: 4 for 3
        update = max(flop.update * per_rank * 4 / 3 / (speed * self.assumptions.training), of_update)
        gather = self._wire(FLOAT_BYTES * sizes.numel, ranks) if self.setting.zero_stage >= 2 else 0.0
        waves = math.ceil(plan.rows / fitting)
        decode, reduces = self._decode(actor, plan.rows / waves)
        return StepTime(
            sequences,
            gather + waves * (decode + reduces),
            score,
            update,
            gather,
            waves * reduces,
            of_score + of_update,
            waves,
            max(phase.peak.device for phase in plan.phases if phase.name in ("score", "update")),
        )

    def _costs(self) -> tuple[ModelCost, ModelCost, ModelCost]:
        shape, judge = self._shape(self.setting.actor), self._shape(self.setting.critic)
        adapted, critic = plan_models(shape, judge, LoRASection(rank=self.setting.lora_rank))
        plain, _ = plan_models(shape, judge, LoRASection())
        return model_cost(adapted), model_cost(plain), model_cost(critic)

    @staticmethod
    def _shape(name: str) -> Shape:
        return find_shape(name, "setting")

    def _wire(self, size: float, ranks: int) -> float:
        """Seconds for each rank to receive its part of `size` bytes that all ranks hold together."""
        bandwidth = self.hardware.node_bandwidth
        if ranks > self.hardware.gpus_per_node:
            bandwidth = min(bandwidth, self.hardware.network_bandwidth)
        return size * (ranks - 1) / ranks / (bandwidth * self.assumptions.wire)

    def _decode(self, actor: ModelCost, rows: float) -> tuple[float, float]:
        """Seconds of reading the prompts and of all decode steps of a group, and of their all-reduces."""
        setting, hardware = self.setting, self.hardware
        shape, parallel = self._shape(setting.actor), setting.tensor_parallel
        speed = hardware.flop_per_second * self.assumptions.scoring * parallel
        prompts = rows * actor.forward(setting.prompt_tokens, causal_pairs(setting.prompt_tokens), 1) / speed
        weights = HALF_BYTES * (actor.trained + actor.frozen + actor.head)
        row = CacheLayout(shape.num_layers, shape.num_kv_heads, shape.head_dim).bytes_per_token(torch.bfloat16)
        seconds = reduces = 0.0
        for step in range(1, setting.answer_tokens):
            seen = setting.prompt_tokens + step
            read = (weights + rows * seen * row) / (parallel * hardware.memory_bandwidth * self.assumptions.decoding)
            seconds += max(rows * actor.forward(1, seen, 1) / speed, read)
            reduces += self._all_reduces(shape, rows)
        return prompts + seconds, reduces + self._all_reduces(shape, rows * setting.prompt_tokens)

    def _all_reduces(self, shape: Shape, tokens: float) -> float:
        """Two of each block, over the ranks that decode together, which are of one machine."""
        parallel = self.setting.tensor_parallel
        if parallel == 1:
            return 0.0
        size = 2 * (parallel - 1) / parallel * tokens * shape.hidden_size * HALF_BYTES
        one = size / (self.hardware.node_bandwidth * self.assumptions.wire) + self.hardware.latency
        return 2 * shape.num_layers * one
