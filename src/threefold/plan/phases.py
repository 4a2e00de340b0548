"""What each phase of a run takes of one rank: the parts of every model that are there at the same time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from threefold.config.recipe import LoRASection, Recipe, SupervisedSection
from threefold.config.scale import TrainedModelSection
from threefold.engine.hybrid import AUTO_ROWS
from threefold.engine.parallel import FREE_SHARE_FOR_FROZEN
from threefold.engine.sharing import AUTO_MICRO_BATCH_TOKENS
from threefold.plan.deployment import GIB, Deployment
from threefold.plan.memory import (
    Bytes,
    ModelMemory,
    activation_bytes,
    cast_bytes,
    decode_bytes,
    frozen_model_memory,
    key_value_bytes,
    logit_bytes,
    nbytes,
    shards_weights,
    trained_model_memory,
)
from threefold.plan.sizes import FLOAT_BYTES, ModelSizes, causal_sizes, scalar_sizes, source_config

WEIGHTS, OPTIMIZER, AVERAGE = "weights", "optimizer", "moving average"
GRADIENTS, GATHERED, ACTIVATIONS = "gradients", "gathered in a pass", "activations"
DECODE_WEIGHTS, KEYS_AND_VALUES, CHECKPOINT = "decode weights", "keys and values", "checkpoint copy"
PARTS = (
    WEIGHTS,
    OPTIMIZER,
    AVERAGE,
    GRADIENTS,
    GATHERED,
    ACTIVATIONS,
    DECODE_WEIGHTS,
    KEYS_AND_VALUES,
    CHECKPOINT,
)  # fmt: skip
"""In the order of the table."""


@dataclass(frozen=True)
class Phase:
    """One phase of a run on one rank.

    Attributes:
        parts: what is there at its peak, by name.
    """

    name: str
    parts: dict[str, Bytes]

    @property
    def peak(self) -> Bytes:
        """Sum of the parts."""
        return sum(self.parts.values(), Bytes())


@dataclass(frozen=True)
class PlannedModel:
    """One model of the run, for the reader: its role, its source, its size, how it is spread."""

    role: str
    source: str
    sizes: ModelSizes
    spread: str


@dataclass(frozen=True)
class Plan:
    """What a run needs of each rank.

    Attributes:
        rows: answers that one rank decodes at a time, where memory lets it.
        row_bytes: keys and values of one of them.
    """

    deployment: Deployment
    models: tuple[PlannedModel, ...]
    phases: tuple[Phase, ...]
    rows: int
    row_bytes: int

    @property
    def peak(self) -> Bytes:
        """Of the device in its fullest phase, and of the host in its."""
        return Bytes(max(p.peak.device for p in self.phases), max(p.peak.host for p in self.phases))

    def rows_that_fit(self, device_bytes: int) -> int:
        """Answers decoded at a time on a device of that memory; 0 if a phase does not fit at all."""
        if any(phase.peak.device > device_bytes for phase in self.phases if KEYS_AND_VALUES not in phase.parts):
            return 0
        [generate] = [phase for phase in self.phases if KEYS_AND_VALUES in phase.parts]
        left = device_bytes - (generate.peak.device - generate.parts[KEYS_AND_VALUES].device)
        return max(min(self.rows, left // self.row_bytes), 0)


@dataclass(frozen=True)
class _Planner:
    """The arguments that every formula needs."""

    recipe: Recipe
    deployment: Deployment

    def trained(
        self, sizes: ModelSizes, section: TrainedModelSection, average: bool = False, taken: int = 0
    ) -> ModelMemory:
        """A model that learns, beside `taken` bytes of the device that others hold already."""
        ema = self.recipe.ppo.ema
        return trained_model_memory(
            sizes,
            section,
            self.deployment.ranks,
            self._frozen_whole(sizes, section, taken),
            average and ema.enabled,
            ema.offload,
            self.deployment.on_gpu,
        )

    def _frozen_whole(self, sizes: ModelSizes, section: TrainedModelSection, taken: int) -> bool:
        """As engine.parallel decides; where the GPU's memory is not known, as on one of 80 GiB."""
        choice = self.recipe.parallel.frozen_base
        if not sizes.frozen or choice == "sharded":
            return False
        if choice == "replicated" or section.zero_stage != 3:
            return True
        memory = self.deployment.device_bytes or UNKNOWN_GPU_BYTES
        return nbytes(sizes.frozen) <= FREE_SHARE_FOR_FROZEN * (memory - taken)

    def pass_tokens(self, sequences: int, longest: int, max_sequences: int, max_tokens: int) -> int:
        """Tokens of the fullest forward pass of one rank, all sequences as long as they may be."""
        limit = max_tokens or AUTO_MICRO_BATCH_TOKENS["cuda" if self.deployment.on_gpu else "cpu"]
        fitting = max(limit // longest, 1)
        share = math.ceil(sequences / self.deployment.ranks)
        return longest * min(fitting, share, max_sequences or share)

    def training_pass(
        self,
        sizes: ModelSizes,
        section: TrainedModelSection,
        tokens: int,
        longest: int,
        positions: int,
        checkpointing: bool,
    ) -> int:
        """Activations, logits and autocast's copies of a forward and backward pass."""
        shards = shards_weights(section, self.deployment.ranks)
        kept = activation_bytes(sizes, tokens, longest, self.deployment.bfloat16, checkpointing, self.deployment.on_gpu)
        casts = cast_bytes(sizes, checkpointing, shards) if self.deployment.bfloat16 else 0
        return kept + logit_bytes(sizes, positions) + casts

    def checkpoint_copy(self, *models: ModelMemory) -> dict[str, Bytes]:
        """What an asynchronous checkpoint copies to the host: all that training changes."""
        settings = self.recipe.checkpoint
        if not settings.asynchronous or not (settings.every_steps or settings.every_minutes):
            return {}
        size = sum(model.saved for model in models)
        return {CHECKPOINT: Bytes(host=size) if self.deployment.on_gpu else Bytes(device=size)}

    def supervised(
        self, name: str, sizes: ModelSizes, settings: SupervisedSection, scale: TrainedModelSection
    ) -> Phase:
        memory = self.trained(sizes, scale)
        longest = self.recipe.data.max_length
        sequences = settings.batch_size * (2 if name == "reward" else 1)
        tokens = self.pass_tokens(sequences, longest, settings.micro_batch_size, settings.micro_batch_tokens)
        return Phase(
            name,
            {
                WEIGHTS: memory.weights,
                OPTIMIZER: memory.optimizer,
                GRADIENTS: memory.gradients,
                GATHERED: Bytes(memory.gathered_in_training),
                ACTIVATIONS: Bytes(
                    self.training_pass(sizes, scale, tokens, longest, tokens, settings.gradient_checkpointing)
                ),
                **self.checkpoint_copy(memory),
            },
        )


UNKNOWN_GPU_BYTES = 80 * GIB


def make_plan(recipe: Recipe, deployment: Deployment) -> Plan:
    """Memory of every phase of the recipe on one rank of the deployment; nothing is loaded but configs.

    Raises:
        ConfigError, CheckpointError: a model's source or adapters cannot be what the recipe says.
    """
    planner = _Planner(recipe, deployment)
    source, judge = recipe.model.actor, recipe.model.reward or recipe.model.actor

    def config(name: str) -> Any:
        return source_config(name, recipe.model.embedded)

    def actor(lora: LoRASection, field: str, trained: bool = True) -> ModelSizes:
        return causal_sizes(config(source), lora, field, trained)

    def scalar(lora: LoRASection, field: str, trained: bool = True) -> ModelSizes:
        return scalar_sizes(config(judge), lora, field, trained)

    scale, ppo = recipe.parallel, recipe.ppo
    sft, reward = actor(recipe.sft.lora, "sft.lora"), scalar(recipe.reward.lora, "reward.lora")
    models = {
        "actor": actor(ppo.actor_lora, "ppo.actor_lora"),
        "critic": scalar(ppo.critic_lora, "ppo.critic_lora"),
        "reference": actor(LoRASection(), "", trained=False),
        "scorer": scalar(LoRASection(), "", trained=False),
    }
    if ppo.actor_lora.rank:
        del models["reference"]  # it is the actor with its adapters off
    phases = [
        planner.supervised("sft", sft, recipe.sft, scale.actor),
        planner.supervised("reward", reward, recipe.reward, scale.reward),
        *_ppo_phases(planner, models),
    ]
    rows, row_bytes = _rows(planner, models["actor"])
    return Plan(deployment, tuple(_planned(recipe, models, reward, source, judge)), tuple(phases), rows, row_bytes)


def _planned(
    recipe: Recipe, models: dict[str, ModelSizes], reward: ModelSizes, source: str, judge: str
) -> list[PlannedModel]:
    scale = recipe.parallel
    planned = []
    for role, sizes in {**models, "reward": reward}.items():
        section = getattr(scale, role)
        offload = section.offload if isinstance(section.offload, str) else ("all" if section.offload else "none")
        spread = f"ZeRO {section.zero_stage}" + ("" if offload == "none" else f", offload {offload}")
        planned.append(PlannedModel(role, source if role in ("actor", "reference") else judge, sizes, spread))
    return planned


def _rows(planner: _Planner, actor: ModelSizes) -> tuple[int, int]:
    """Answers that a rank decodes at a time, and the bytes of keys and values of each on it."""
    recipe, deployment = planner.recipe, planner.deployment
    settings, tensor_parallel = recipe.generation, recipe.generation.inference_tp_size
    answers = recipe.ppo.prompts_per_iteration * recipe.ppo.answers_per_prompt
    rows = math.ceil(answers / max(deployment.ranks // tensor_parallel, 1))
    most = settings.max_rows or AUTO_ROWS.get("cuda" if deployment.on_gpu else "cpu", 0)
    rows = min(rows, most) if most else rows
    longest = recipe.data.max_prompt_length + recipe.ppo.sampling.max_new_tokens
    one = key_value_bytes(actor, 1, longest, tensor_parallel, decode_dtype(deployment))
    if settings.kv_memory_gib:
        rows = max(min(rows, int(settings.kv_memory_gib * GIB) // one), 1)
    return rows, one


def decode_dtype(deployment: Deployment) -> torch.dtype:
    """What keys, values and decode weights are stored in."""
    return torch.bfloat16 if deployment.on_gpu and deployment.bfloat16 else torch.float32


def _ppo_phases(planner: _Planner, models: dict[str, ModelSizes]) -> list[Phase]:
    """Generate, score, update: everything that stays is in all of them."""
    recipe, deployment = planner.recipe, planner.deployment
    ppo, scale = recipe.ppo, recipe.parallel
    actor = planner.trained(models["actor"], scale.actor, average=True)
    readers = [
        frozen_model_memory(models[role], section, deployment.ranks, deployment.on_gpu)
        for role, section in (("reference", scale.reference), ("scorer", scale.scorer))
        if role in models
    ]
    there = sum((memory.weights for memory in (actor, *readers)), Bytes()).device  # the critic is loaded last
    critic = planner.trained(models["critic"], scale.critic, taken=there)
    held = {
        WEIGHTS: sum((memory.weights for memory in (actor, critic, *readers)), Bytes()),
        OPTIMIZER: actor.optimizer + critic.optimizer,
        AVERAGE: actor.average,
        **planner.checkpoint_copy(actor, critic),
    }
    longest = recipe.data.max_prompt_length + ppo.sampling.max_new_tokens
    tokens = planner.pass_tokens(
        ppo.prompts_per_iteration * ppo.answers_per_prompt, longest, ppo.micro_batch_size, ppo.micro_batch_tokens
    )
    answer_tokens = tokens * ppo.sampling.max_new_tokens // longest

    critic_pass = planner.training_pass(models["critic"], scale.critic, tokens, longest, 0, ppo.gradient_checkpointing)
    actor_pass = planner.training_pass(
        models["actor"], scale.actor, tokens, longest, answer_tokens, ppo.gradient_checkpointing
    )
    of_critic = {GATHERED: Bytes(critic.gathered_in_training), ACTIVATIONS: Bytes(critic_pass)}
    of_actor = {GATHERED: Bytes(actor.gathered_in_training), ACTIVATIONS: Bytes(actor_pass)}
    reading = {
        GATHERED: Bytes(max(memory.gathered for memory in (actor, critic, *readers))),
        ACTIVATIONS: Bytes(logit_bytes(models["actor"], answer_tokens)),
    }
    score = {**held, **reading}
    if ppo.ppo_epochs * ppo.minibatches == 1:  # the critic's training pass gives the values
        score = {**held, **_larger(reading, of_critic), GRADIENTS: critic.gradients}
    update = {**held, **_larger(of_actor, of_critic), GRADIENTS: actor.gradients + critic.gradients}
    return [
        Phase("generate", _generate(planner, models["actor"], actor, held)),
        Phase("score", score),
        Phase("update", update),
    ]


def _larger(first: dict[str, Bytes], second: dict[str, Bytes]) -> dict[str, Bytes]:
    """Of two passes that come one after the other, the one that takes more."""
    return max(first, second, key=lambda parts: sum(size.total for size in parts.values()))


def _generate(planner: _Planner, sizes: ModelSizes, actor: ModelMemory, held: dict[str, Bytes]) -> dict[str, Bytes]:
    recipe, deployment = planner.recipe, planner.deployment
    scale, generation = recipe.parallel, recipe.generation
    parts = dict(held)
    if recipe.ppo.offload_optimizer and deployment.on_gpu:
        parts[OPTIMIZER] = Bytes(host=held[OPTIMIZER].total)
    rows, one = _rows(planner, sizes)
    decode = decode_bytes(
        sizes,
        sharded=_needs_arena(sizes, scale.actor, deployment.ranks),
        tensor_parallel=generation.inference_tp_size,
        dtype=decode_dtype(deployment),
        on_gpu=deployment.on_gpu,
        packed=generation.packed_weights == "auto" and (deployment.on_gpu or not deployment.bfloat16),
    )
    logits = LOGIT_ROWS * FLOAT_BYTES * rows * sizes.vocab_size
    # weights are gathered to fill the arena before there are keys and values: what these leave of it is no peak
    parts[GATHERED] = Bytes(max(actor.gathered - rows * one - logits, 0))
    parts[DECODE_WEIGHTS] = Bytes(decode)
    parts[KEYS_AND_VALUES] = Bytes(rows * one)
    parts[ACTIVATIONS] = Bytes(logits)
    return parts


def _needs_arena(sizes: ModelSizes, section: TrainedModelSection, ranks: int) -> bool:
    """Weights that are shards, or packed in 4 bits, are put together for the decoder."""
    return shards_weights(section, ranks) or any(weight.bits < 8 for weight in sizes.weights)


LOGIT_ROWS = 3
"""Of each answer a decode step holds logits, their log softmax and what is drawn from."""
