"""What a run leaves behind when its weights are broken: where it happened, which weights, and the state itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from threefold.checkpoint import write_json
from threefold.data.prepare import PreparedPrompt
from threefold.errors import TrainingError
from threefold.inference.scheduler import NonFiniteLogits


@torch.no_grad()
def weight_norms(model: PreTrainedModel) -> dict[str, float]:
    """Euclidean norm of every weight, by its name; not finite where the weight is not."""
    return {name: float(parameter.float().norm()) for name, parameter in model.named_parameters()}


def diagnosed(
    where: str, error: NonFiniteLogits, model: PreTrainedModel, prompts: Sequence[PreparedPrompt], saved: Path
) -> TrainingError:
    """The error to raise: the place, the first broken weight or else the largest norm, and where the state lies.

    Writes weight_norms.json and prompts.json beside the weights that are in `saved` already.
    """
    norms = weight_norms(model)
    broken = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    write_json(saved / "weight_norms.json", {name: str(norm) for name, norm in norms.items()})
    write_json(saved / "prompts.json", [list(prompt.ids) for prompt in prompts])
    if broken:
        verdict = f"{len(broken)} weights are not finite, the first is {broken[0]} (norm {norms[broken[0]]:g})"
    else:
        largest = max(norms, key=lambda name: norms[name])
        verdict = f"all weights are finite, the largest norm is that of {largest} ({norms[largest]:g})"
    return TrainingError(
        f"{where}: {error}; {verdict}. The state is in {saved}; lower the learning rate, and start again from the last "
        "finished step"
    )
