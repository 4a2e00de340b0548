"""Experience in a checkpoint: out come the bits that went in."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from threefold.checkpoint.training import Checkpointer, TrainingState
from threefold.config.scale import CheckpointSection
from threefold.engine.distributed import ALONE
from threefold.stages.pending import pack_batch, pack_rollouts, unpack_batch, unpack_rollouts
from threefold.stages.rollout import ScoredBatch
from threefold.types import Experience, Rollout

ODD = (float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 0.1, 1 / 3)
"""Numbers that do not survive a detour over text or another type."""

Shape = tuple[int, int, bool, int]
SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.booleans(), st.integers(0, 2**40)), min_size=1)


def numbers(count: int, start: int) -> Tensor:
    return torch.tensor([ODD[(start + n) % len(ODD)] * (1 + n // len(ODD)) for n in range(count)])


def rollout_of(shape: Shape, row: int) -> Rollout:
    prompt, answer, stopped, version = shape
    return Rollout(
        prompt_ids=torch.arange(prompt) + row,
        response_ids=torch.arange(answer) * (row + 1),
        logprobs=numbers(answer, row),
        sampled_logprobs=numbers(answer, row + 1),
        finish_reason="stop" if stopped else "length",
        policy_version=version,
    )


def batch_of(shapes: list[Shape]) -> ScoredBatch:
    experiences = [
        Experience(rollout_of(shape, row), 0.1 * row - 1 / 3, *(numbers(shape[1], row + part) for part in range(5)))
        for row, shape in enumerate(shapes)
    ]
    return ScoredBatch(experiences, *(numbers(len(shapes), part) for part in range(3)))


def same(one: object, other: object) -> bool:
    """Bit for bit, through all fields."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        integers = {4: torch.int32, 8: torch.int64}[one.element_size()]
        return one.dtype == other.dtype and torch.equal(one.view(integers), other.view(integers))
    if isinstance(one, list):
        assert isinstance(other, list)
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Rollout | Experience | ScoredBatch):
        return type(one) is type(other) and all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return type(one) is type(other) and one == other


@given(SHAPES)
def test_rollouts_come_back(shapes: list[Shape]) -> None:
    rollouts = [rollout_of(shape, row) for row, shape in enumerate(shapes)]
    assert same(unpack_rollouts(pack_rollouts(rollouts)), rollouts)


@given(SHAPES)
def test_a_batch_comes_back(shapes: list[Shape]) -> None:
    batch = batch_of(shapes)
    packed = pack_batch(batch)
    assert same(unpack_batch(packed), batch)
    assert same(unpack_rollouts(packed), [experience.rollout for experience in batch.experiences])
    assert len(packed) == len(fields(Rollout)) + 2 + len(fields(Experience)) - 1 + len(fields(ScoredBatch)) - 1, (
        "every field has a tensor of its own, prompts and answers their lengths besides"
    )


def test_scores_keep_all_their_digits() -> None:
    """They are Python's floats."""
    batch = batch_of([(1, 2, True, 0)] * 4)
    found = [experience.score for experience in unpack_batch(pack_batch(batch)).experiences]
    assert [score.hex() for score in found] == [experience.score.hex() for experience in batch.experiences]


def test_over_the_disk_too(tmp_path: Path) -> None:
    """Beside what else a checkpoint of step 3 has among its records."""
    batch = batch_of([(3, 4, True, 7), (1, 1, False, 7), (2, 6, True, 2**40)])
    sampler = torch.Generator().manual_seed(3).get_state()
    settings = CheckpointSection(every_steps=1, asynchronous=False)
    Checkpointer(tmp_path, "key", settings, ALONE, lambda _: None).save(
        1, TrainingState({}, {}, pack_batch(batch) | {"sampler": sampler})
    )
    saved = Checkpointer(tmp_path, "key", settings, ALONE, lambda _: None).load()
    assert saved is not None
    assert same(unpack_batch(saved.records), batch)
    assert torch.equal(saved.records["sampler"], sampler)
