"""Padding against naive loops; masks against the records, with a pad id that is a real token too."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from threefold.data.collate import (
    collate_experience,
    collate_rollouts,
    collate_sequences,
    epoch_order,
    left_pad_prompts,
    pad_ragged,
)
from threefold.types import Experience, Rollout, TokenSequence

PAD_ID = 2  # also drawn as a token below, as where unk, stop and pad share an id
ids = st.lists(st.integers(0, 4), min_size=1, max_size=6)


def rollout(prompt: list[int], response: list[int]) -> Rollout:
    logprobs = -torch.arange(1, len(response) + 1, dtype=torch.float32)
    return Rollout(torch.tensor(prompt), torch.tensor(response), logprobs, logprobs, "stop", policy_version=0)


@given(
    rows=st.lists(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=4)
)
@settings(max_examples=60, deadline=None)
def test_sequences(rows: list[list[tuple[int, bool]]]) -> None:
    sequences = [
        TokenSequence(tuple(t for t, _ in row), tuple(flag for _, flag in row), prompt_length=len(row) // 2)
        for row in rows
    ]
    batch = collate_sequences(sequences, PAD_ID)
    width = max(map(len, rows))
    assert batch.input_ids.dtype == torch.int64
    assert batch.attention_mask.dtype == batch.target_mask.dtype == torch.bool
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.target_mask.shape == (len(rows), width)
    assert batch.lengths.tolist() == [len(row) for row in rows]
    assert batch.prompt_lengths.tolist() == [len(row) // 2 for row in rows]
    for b, row in enumerate(rows):
        for t in range(width):
            real = t < len(row)
            assert batch.input_ids[b, t] == (row[t][0] if real else PAD_ID)
            assert batch.attention_mask[b, t] == real
            # Nothing predicts a first token, so it is never a target.
            assert batch.target_mask[b, t] == (real and t > 0 and row[t][1])


@given(prompts=st.lists(ids, min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_prompts_end_in_the_last_column(prompts: list[list[int]]) -> None:
    input_ids, attention_mask = left_pad_prompts(prompts, PAD_ID)
    width = max(map(len, prompts))
    assert attention_mask.dtype == torch.bool
    assert input_ids.tolist() == [[PAD_ID] * (width - len(prompt)) + prompt for prompt in prompts]
    assert attention_mask.tolist() == [[False] * (width - len(prompt)) + [True] * len(prompt) for prompt in prompts]


@given(rows=st.lists(st.tuples(ids, ids), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_rollouts_and_experience(rows: list[tuple[list[int], list[int]]]) -> None:
    rollouts = [rollout(prompt, response) for prompt, response in rows]
    batch = collate_rollouts(rollouts, PAD_ID)
    width = max(len(prompt) + len(response) for prompt, response in rows)
    response_width = max(len(response) for _, response in rows)
    whole = [prompt + response for prompt, response in rows]
    assert batch.input_ids.tolist() == [row + [PAD_ID] * (width - len(row)) for row in whole]
    assert batch.attention_mask.tolist() == [[t < len(row) for t in range(width)] for row in whole]
    assert batch.response_ids.tolist() == [r + [PAD_ID] * (response_width - len(r)) for _, r in rows]
    assert batch.response_mask.tolist() == [[t < len(r) for t in range(response_width)] for _, r in rows]
    assert batch.prompt_lengths.tolist() == [len(prompt) for prompt, _ in rows]
    assert batch.response_lengths.tolist() == [len(response) for _, response in rows]

    fields = ("ref_logprobs", "values", "rewards", "advantages", "returns")
    experiences = [
        Experience(each, 0.5, **{name: each.logprobs * (k + 2) for k, name in enumerate(fields)}) for each in rollouts
    ]
    full = collate_experience(experiences, PAD_ID)
    for factor, name in enumerate(("old_logprobs", *fields), start=1):
        expected = [[-factor * (t + 1) if t < len(r) else 0 for t in range(response_width)] for _, r in rows]
        assert getattr(full, name).tolist() == expected
        assert getattr(full, name).dtype == torch.float32
    for name in ("input_ids", "attention_mask", "prompt_lengths", "response_lengths", "response_ids", "response_mask"):
        assert torch.equal(getattr(full, name), getattr(batch, name))


def test_pad_ragged_fills_with_the_value() -> None:
    padded, mask = pad_ragged([torch.tensor([1.0]), torch.tensor([2.0, 3.0])], value=-7.0)
    assert padded.tolist() == [[1.0, -7.0], [2.0, 3.0]]
    assert mask.tolist() == [[True, False], [True, True]]


def test_epoch_order_is_a_permutation_of_its_arguments_only() -> None:
    torch.manual_seed(1)
    first = epoch_order(50, seed=3, epoch=0)
    torch.manual_seed(2)
    assert epoch_order(50, seed=3, epoch=0) == first
    assert sorted(first) == list(range(50))
    others = [epoch_order(50, 3, 1), epoch_order(50, 4, 0), epoch_order(50, 0, 3)]
    assert all(other != first for other in others)
    assert epoch_order(0, 3, 0) == []
