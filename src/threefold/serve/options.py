"""What a chat is asked to be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from threefold.errors import ConfigError


@dataclass(frozen=True)
class ChatOptions:
    """Settings of one terminal chat; a value that cannot work is a ConfigError that names it.

    Attributes:
        path: checkpoint directory, run directory or Hub id of a causal model.
        max_new_tokens: longest answer, tokens.
        temperature: softmax temperature; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p; 1 keeps all.
        seed: seed of the sampling.
        system: system message put before the conversation; "" is that of the checkpoint's template, if it has one.
        template: chat template, named as model.chat_template of the recipe; "" is the checkpoint's own.
        device: "auto", "cpu", "cuda" or "mps".
    """

    path: Path | str
    max_new_tokens: int = 128
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 42
    system: str = ""
    template: str = ""
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature} must be 0 (greedy) or above")
        if self.top_k < 0:
            raise ConfigError(f"top_k {self.top_k} must be 0 (keep all) or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} must be above 0 and at most 1 (keep all)")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} must be 0 or above")
