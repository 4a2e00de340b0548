"""What `threefold bench` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from threefold.errors import ConfigError

DEFAULT_ACTOR = "opt:hidden=512,layers=8,heads=8,ffn=2048,vocab=8000"
DEFAULT_CRITIC = "opt:hidden=384,layers=6,heads=6,ffn=1536,vocab=8000"
DEFAULT_LENGTH = 256
"""Tokens of a prompt and of an answer: DeepSpeed-Chat's published setting."""


@dataclass(frozen=True)
class BenchOptions:
    """Settings of one benchmark; a value that cannot work is a ConfigError that names its flag.

    Attributes:
        actor, critic: names of published shapes, or sizes (see `models.shapes.find_shape`). The reference has the
            actor's shape, the reward model the critic's.
        batch: prompts of an iteration.
        answers_per_prompt: answers to each.
        prompt_length, answer_length: tokens; None is 256, or what `lengths` says.
        lengths: file of answer lengths, or of prompt and answer lengths, to draw from.
        iterations: PPO iterations that are measured.
        warmup: iterations before them that are not.
        minibatches: optimizer steps of an iteration.
        micro_batch_tokens: tokens of a forward pass; 0 is what suits the device.
        gradient_checkpointing, offload_optimizer: as in the recipe's ppo section.
        lora_rank: rank of adapters on the actor; 0 trains all of it.
        dtype, device: as in the recipe's run section.
        threads: CPU threads; 0 leaves PyTorch's choice.
        seed: of weights, prompts, drawn lengths and sampling.
        json: file for all numbers; None writes none.
    """

    actor: str = DEFAULT_ACTOR
    critic: str = DEFAULT_CRITIC
    batch: int = 8
    answers_per_prompt: int = 1
    prompt_length: int | None = None
    answer_length: int | None = None
    lengths: Path | None = None
    iterations: int = 3
    warmup: int = 1
    minibatches: int = 1
    micro_batch_tokens: int = 0
    gradient_checkpointing: bool = False
    offload_optimizer: bool = False
    lora_rank: int = 0
    dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    seed: int = 1234
    json: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "answers_per_prompt", "iterations", "minibatches", "prompt_length", "answer_length"):
            self._at_least(name, 1)
        for name in ("warmup", "micro_batch_tokens", "lora_rank", "threads", "seed"):
            self._at_least(name, 0)
        if self.lengths is not None and self.answer_length is not None:
            raise ConfigError(f"--answer-length {self.answer_length}: --lengths gives them already; leave one out")
        answers = self.batch * self.answers_per_prompt
        if self.minibatches > answers:
            raise ConfigError(
                f"--minibatches {self.minibatches} is more than the {answers} answers of an iteration "
                "(--batch x --answers-per-prompt): lower it"
            )
        if self.json is not None and (self.json.is_dir() or not self.json.parent.is_dir()):
            what = "is a directory" if self.json.is_dir() else f"there is no directory {self.json.parent}"
            raise ConfigError(f"--json {self.json}: {what}; name a file in a directory that exists")

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {least}")
