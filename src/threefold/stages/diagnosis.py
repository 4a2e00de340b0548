"""What a run leaves behind when its numbers are broken: where it happened, which weights, and the state itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from threefold.checkpoint.files import write_json
from threefold.engine.parallel import ParallelModel
from threefold.errors import NonFiniteError

SaveState = Callable[[Path], None]


def weight_norms(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Euclidean norm of every weight, by its name; not finite where the weight is not."""
    return {name: float(weight.float().norm()) for name, weight in weights.items()}


def describe_weights(weights: Mapping[str, Tensor], norms: Mapping[str, float]) -> str:
    """The first weight that is not finite and how many are not, or else the weight of the largest norm."""
    broken = [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]
    if broken:
        first = f"{broken[0]} (norm {norms[broken[0]]:g})"
        return f"{len(broken)} weights of the actor are not finite, the first is {first}"
    largest = max(norms, key=lambda name: norms[name])
    return f"all weights of the actor are finite, the largest norm is that of {largest} ({norms[largest]:g})"


def _each_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a state, tied ones under their first name only."""
    once: dict[int, tuple[str, Tensor]] = {}
    for name, weight in state.items():
        if weight.is_floating_point():
            once.setdefault(weight.data_ptr(), (name, weight))
    return dict(once.values())


@contextmanager
def state_kept_if_broken(
    where: Callable[[], str], actor: ParallelModel, directory: Callable[[], Path], save: SaveState
) -> Iterator[None]:
    """Where numbers stop being finite inside the block: save the models, name the place and the weight, and stop.
    Collective: numbers are found broken on every process or on none.

    Args:
        where: the place, for the message, as it is when it happens.
        directory: a new directory for the state, likewise.
        save: writes the models into it; weight_norms.json, of the actor, is written beside them.
    """
    try:
        yield
    except NonFiniteError as error:
        target = actor.world.from_first(directory)
        save(target)
        weights = _each_once(actor.full_state())
        if not actor.world.is_first:
            raise
        norms = weight_norms(weights)
        write_json(target / "weight_norms.json", {name: str(norm) for name, norm in norms.items()})
        raise NonFiniteError(
            f"{where()}: {error}; {describe_weights(weights, norms)}. The models are in {target}; lower the learning "
            "rate and run the command again: finished steps are kept"
        ) from error


def unused(directory: Path) -> Path:
    """The directory, or if it is there already, the first of NAME-2, NAME-3, … that is not."""
    number, candidate = 1, directory
    while candidate.exists():
        number += 1
        candidate = directory.with_name(f"{directory.name}-{number}")
    return candidate
