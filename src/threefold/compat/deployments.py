"""Hyper-parameters of DeepSpeed-Chat's scripts, as fields of the recipe, by deployment type and size of the actor.

Their batch sizes are per GPU; here they are multiplied by the number of processes, which their published runs had as 1,
8, and 64 on 8 machines. What differs from them, and why:

- On one GPU step 1 trains the whole model at 9.65e-6, the rate of their whole-model scripts: their one-GPU script
  trains a LoRA at 1e-3.
- Their gradient accumulation (on one GPU 8, 4 and 2 micro-batches of 16) is the batch size here. In step 3 two of their
  generation batches come from the same weights before one optimizer step, which is one iteration of 32 prompts.
- Where they train a LoRA, adapters alone are trained, at the rate that theirs have (theirs trains biases, norms and
  embeddings beside them), and B A is multiplied by 1 / rank as theirs is.
- Step 1 trains on the assistant's tokens (theirs: on all), with dropout 0 (theirs: as the model has it).
- Answers are sampled, rewards normalised and advantages whitened, as threefold's defaults have it.
- Their scripts drop prompts that are too long, so this does (data.long_rows). They look for no bad rows; here
  those are left out and counted (data.bad_rows), as nobody can mend a published dataset.
- Where they train on four datasets in steps 1 and 2, and on the first of them in step 3, the other three are split over
  steps 1 and 2 alone. (Theirs split each over three steps, and leave out the last share of these.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GPUS_PER_NODE = 8
NODES = 8
"""Machines of the published multi_node runs: 64 GPUs."""

_COMMON: dict[str, object] = {
    "run.seed": 1234,
    "model.chat_template": "dialogue",
    "data.split": [2, 4, 4],
    "data.max_length": 512,
    "data.max_prompt_length": 256,
    "data.long_rows": "drop",
    "data.bad_rows": "drop",
    "sft.scheduler": "cosine",
    "sft.warmup_steps": 0,
    "reward.learning_rate": 5e-5,
    "reward.weight_decay": 0.1,
    "reward.scheduler": "cosine",
    "reward.warmup_steps": 0,
    "reward.epochs": 1,
    "reward.dropout": 0.0,
    "ppo.epochs": 1,
    "ppo.ppo_epochs": 1,
    "ppo.minibatches": 1,
    "ppo.critic_learning_rate": 5e-6,
    "ppo.scheduler": "cosine",
    "ppo.warmup_steps": 100,
    "ppo.sampling.max_new_tokens": 256,
}


_FIRST_DATASET = "Dahoas/rm-static"
_MORE_DATASETS = (
    "Dahoas/full-hh-rlhf",
    "Dahoas/synthetic-instruct-gptj-pairwise",
    "yitingxie/rlhf-reward-datasets",
)


@dataclass(frozen=True)
class Script:
    """What distinguishes one set of their scripts.

    Attributes:
        sft_batch, reward_batch, ppo_batch: sequences per GPU in a forward pass.
        accumulation: passes per optimizer step, of the three steps.
        sft_rate, ppo_rate: learning rates of the actor.
        sft_decay, ppo_decay: weight decays of the actor in step 1, of actor and critic in step 3.
        sft_epochs: passes over the data of step 1.
        zero_stage: of actor and critic.
        lora_rank: of the actor in steps 1 and 3; 0 trains all of it.
        tp_size: tensor parallelism of generation.
        checkpointing: recompute activations in steps 1 and 3.
        ema: keep the actor's average.
    """

    sft_batch: int
    reward_batch: int
    ppo_batch: int
    accumulation: tuple[int, int, int] = (1, 1, 1)
    sft_rate: float = 9.65e-6
    ppo_rate: float = 9.65e-6
    sft_decay: float = 0.0
    ppo_decay: float = 0.0
    sft_epochs: int = 16
    zero_stage: int = 0
    lora_rank: int = 0
    tp_size: int = 1
    checkpointing: bool = False
    ema: bool = False


_LORA_RATE = 5e-4
SINGLE_GPU = Script(16, 16, 16, accumulation=(8, 4, 2), sft_epochs=1)
SINGLE_NODE = {
    "1.3b": Script(8, 4, 4, zero_stage=2, ema=True),
    "6.7b": Script(6, 4, 4, zero_stage=3, ppo_decay=0.1, checkpointing=True),
    "13b": Script(
        4, 4, 16, sft_rate=_LORA_RATE, ppo_rate=_LORA_RATE, zero_stage=3, lora_rank=128, tp_size=2, checkpointing=True
    ),
}
MULTI_NODE = Script(
    4,
    2,
    4,
    sft_rate=_LORA_RATE,
    ppo_rate=_LORA_RATE,
    sft_decay=0.1,
    ppo_decay=0.1,
    sft_epochs=2,
    zero_stage=3,
    lora_rank=128,
    tp_size=8,
    checkpointing=True,
)


def script_for(deployment: str, actor: str) -> Script:
    """Their script for a deployment type; on one node, the one for the nearest size of the actor that its name tells.
    (A name without a size counts as 6.7b.)"""
    if deployment == "single_gpu":
        return SINGLE_GPU
    if deployment == "multi_node":
        return MULTI_NODE
    found = re.search(r"(\d+(?:\.\d+)?)([mb])\b", actor.lower())
    billions = float(found[1]) * (1.0 if found[2] == "b" else 1e-3) if found else 6.7
    return SINGLE_NODE["1.3b" if billions < 3 else "6.7b" if billions < 10 else "13b"]


def default_sources(deployment: str) -> list[dict[str, object]]:
    """The datasets of their scripts, as `data.sources`."""
    sources: list[dict[str, object]] = [{"path": [_FIRST_DATASET]}]
    if deployment != "single_gpu":
        sources += [{"path": [name], "split": [2, 4, 0]} for name in _MORE_DATASETS]
    return sources


def settings_of(script: Script, processes: int) -> dict[str, object]:
    """A script as fields of the recipe, for a number of processes."""
    sft, reward, ppo = (
        batch * processes * passes
        for batch, passes in zip(
            (script.sft_batch, script.reward_batch, script.ppo_batch), script.accumulation, strict=True
        )
    )
    settings = _COMMON | {
        "sft.learning_rate": script.sft_rate,
        "sft.weight_decay": script.sft_decay,
        "sft.epochs": script.sft_epochs,
        "sft.batch_size": sft,
        "sft.micro_batch_size": script.sft_batch,
        "reward.batch_size": reward,
        "reward.micro_batch_size": script.reward_batch,
        "ppo.prompts_per_iteration": ppo,
        "ppo.micro_batch_size": script.ppo_batch,
        "ppo.actor_learning_rate": script.ppo_rate,
        "ppo.actor_weight_decay": script.ppo_decay,
        "ppo.critic_weight_decay": script.ppo_decay,
        "sft.gradient_checkpointing": script.checkpointing,
        "ppo.gradient_checkpointing": script.checkpointing,
        "ppo.ema.enabled": script.ema,
    }
    if script.lora_rank:
        for section in ("sft.lora", "ppo.actor_lora"):
            settings |= {f"{section}.rank": script.lora_rank, f"{section}.alpha": 1}
    if script.tp_size > 1 and processes % script.tp_size == 0:
        settings["generation.inference_tp_size"] = script.tp_size
    return settings


def parallel_settings(actor_stage: int, reward_stage: int, critic_stage: int, offload: bool) -> dict[str, object]:
    """ZeRO stages and offload: what is only read is sharded where the model that it was made from is (stage 3)."""
    settings: dict[str, object] = {}
    for name, stage in (("actor", actor_stage), ("reward", reward_stage), ("critic", critic_stage)):
        settings[f"parallel.{name}.zero_stage"] = stage
        if offload:
            settings[f"parallel.{name}.offload"] = "all" if stage == 3 else "optimizer"
    settings["parallel.reference.zero_stage"] = 3 if actor_stage == 3 else 0
    settings["parallel.scorer.zero_stage"] = 3 if critic_stage == 3 else 0
    return settings
