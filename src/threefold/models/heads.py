"""A language-model head that is trained whole while its base model is not."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from threefold.errors import ConfigError
from threefold.machine.linear import RoutedLinear, linear


class TrainedHead(RoutedLinear):
    """A head that still has, frozen, what it was before: where it was tied to the embeddings, their matrix.

    Attributes:
        off: compute with what it was before.
    """

    untrained_weight: nn.Parameter
    untrained_bias: nn.Parameter | None
    off: bool

    def forward(self, input: Tensor) -> Tensor:
        if self.off:
            return linear(input, self.untrained_weight, self.untrained_bias)
        return linear(input, self.weight, self.bias)


def check_head(model: PreTrainedModel, field: str) -> nn.Linear:
    """The model's language-model head; ConfigError if it has none that could be trained.

    Args:
        field: the LoRA section's dotted path in the recipe, for the message.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"{field}.train_heads = true: {type(model).__name__} has no linear language-model head; set it to false"
        )
    return head


@torch.no_grad()
def train_head(model: PreTrainedModel, field: str) -> None:
    """Make the head of a causal model trainable, in place.

    One that is tied to the embeddings gets a matrix of its own, equal at first, and the config says so: tied, the
    embeddings would be trained with it.
    """
    head = check_head(model, field)
    tied = head.weight is model.get_input_embeddings().weight
    head.requires_grad_(False)
    before = dict(head.named_parameters(remove_duplicate=False))
    head.__class__ = TrainedHead
    for name, parameter in before.items():
        head.register_parameter(f"untrained_{name}", parameter)
        head.register_parameter(name, nn.Parameter(parameter.detach().clone()))
    if "bias" not in before:
        head.register_parameter("untrained_bias", None)
    cast(TrainedHead, head).off = False
    if tied:
        model.config.tie_word_embeddings = False
