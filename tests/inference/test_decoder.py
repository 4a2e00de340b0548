"""The decoder against the forward of transformers on each sequence alone: same greedy tokens, same log-probabilities.

The bound of 1e-5 nats holds for the tokens that are decoded. It is about what float32 leaves of a log-probability: of
the unlikely tokens of the real models, whose logits are large, transformers' own float32 is 2.5e-5 from its float64
(and the decoder 1.2e-5), so the whole distribution is held to 3e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.models.families_under_test import (
    CONFIGS,
    CONTEXT,
    VARIANTS,
    ragged_ids,
    randomise,
    right_padded,
    tiny_causal_lm,
)
from threefold.inference.decoder import Decoder, make_decoder
from threefold.inference.kv_cache import KVCache
from threefold.models.loading import load_causal_lm, load_tokenizer

TOLERANCE_NATS = 1e-5
LENGTHS = [3, 17, 1, 9, 12, 5, 2, 20, 7, 8, 1]  # more than one group of rows
COVERED = [family for family in [*CONFIGS, *VARIANTS] if family not in {"falcon", "gemma2", "cohere"}]
SPREAD = 0.2
"""Of the weights: logits so large that float32 itself leaves more than the bound would test nothing."""


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    return randomise(tiny_causal_lm(family), seed, SPREAD)


def decoder_of(model: PreTrainedModel, cache_dtype: torch.dtype | None = None) -> Decoder:
    decoder = make_decoder(model, cache_dtype)
    assert decoder is not None
    return decoder


@dataclass
class Row:
    """A sequence that is being decoded: its tokens, and the log-probabilities of those that were decoded."""

    tokens: list[int]
    logprobs: list[Tensor] = field(default_factory=list)


class GreedyRows:
    """Decodes greedily by hand: the test says what happens to the rows between steps."""

    def __init__(self, decoder: Decoder, max_rows: int = 16, capacity: int = CONTEXT) -> None:
        self.decoder = decoder
        self.cache = decoder.new_cache(max_rows, capacity)
        self.rows: list[Row] = []
        self.finished: list[Row] = []

    def prefill(self, prompts: Sequence[Sequence[int]], first_row: int) -> None:
        ids, _ = right_padded([list(prompt) for prompt in prompts])
        logits = self.decoder.prefill(ids, [len(prompt) for prompt in prompts], self.cache, first_row)
        fresh = [Row(list(prompt)) for prompt in prompts]
        self.finished += self.rows[first_row : first_row + len(fresh)]
        self.rows[first_row : first_row + len(fresh)] = fresh
        self.cache.num_rows = len(self.rows)
        self._record(logits, fresh)

    def _record(self, logits: Tensor, rows: Sequence[Row]) -> None:
        assert logits.dtype == torch.float32
        for row, logprobs in zip(rows, logits.log_softmax(-1), strict=True):
            row.logprobs.append(logprobs)
            row.tokens.append(int(logprobs.argmax()))

    def step(self, times: int) -> None:
        for _ in range(times):
            last = torch.tensor([row.tokens[-1] for row in self.rows])
            self._record(self.decoder.step(last, self.cache), self.rows)

    def leave(self, row: int) -> None:
        """The last row takes the place of one that has finished."""
        self.finished.append(self.rows[row])
        self.cache.move(len(self.rows) - 1, row)
        self.rows[row] = self.rows[-1]
        self.rows.pop()
        self.cache.num_rows = len(self.rows)

    def fork(self, source: int, tokens: Sequence[int]) -> None:
        """Go on from a prefilled row in new rows, each with a first token of its own."""
        first = len(self.rows)
        self.cache.copy(source, range(first, first + len(tokens)))
        origin = self.rows[source]
        self.rows += [Row([*origin.tokens[:-1], token], [origin.logprobs[-1]]) for token in tokens]
        self.cache.num_rows = len(self.rows)

    def check(self, model: PreTrainedModel, tolerance: float = TOLERANCE_NATS, greedy: bool = True) -> None:
        for row in [*self.rows, *self.finished]:
            check_row(model, row, tolerance, greedy)


@torch.no_grad()
def check_row(model: PreTrainedModel, row: Row, tolerance: float, greedy: bool = True) -> None:
    """Compare a row with the model's own forward on that sequence alone."""
    count = len(row.logprobs)
    logits = model(input_ids=torch.tensor([row.tokens[:-1]])).logits[0, -count:]
    plain, ours = logits.float().log_softmax(-1), torch.stack(row.logprobs)
    if greedy:
        assert plain.argmax(-1).tolist() == row.tokens[-count:]
    chosen = torch.tensor(row.tokens[-count:])[:, None]
    torch.testing.assert_close(ours.gather(1, chosen), plain.gather(1, chosen), atol=tolerance, rtol=0)
    torch.testing.assert_close(ours, plain, atol=3 * tolerance, rtol=tolerance / 10)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", COVERED)
@torch.inference_mode()
def test_greedy_tokens_and_logprobs_are_those_of_transformers(family: str, packed: bool) -> None:
    model = tiny_model(family)
    decoder = decoder_of(model)
    if packed:
        decoder.pack(len(LENGTHS))
    rows = GreedyRows(decoder)
    rows.prefill(ragged_ids(1, LENGTHS), 0)
    rows.step(30)
    rows.check(model)
    assert len({tuple(row.tokens[-30:]) for row in rows.rows}) > 3


@pytest.mark.parametrize("family", COVERED)
@torch.inference_mode()
def test_rows_that_leave_are_refilled_and_forked(family: str) -> None:
    model = tiny_model(family)
    rows = GreedyRows(decoder_of(model))
    prompts = ragged_ids(2, LENGTHS)
    rows.prefill(prompts[:5], 0)
    rows.step(9)
    rows.leave(1)
    rows.step(3)
    rows.prefill([prompts[6]], 2)  # a short prompt in a slot that held more
    rows.step(5)
    rows.prefill([prompts[5]], 4)
    rows.fork(4, [5, 9, 11])
    rows.step(8)
    rows.prefill([prompts[7], prompts[8]], 0)  # two at once
    rows.step(8)
    for _ in range(len(rows.rows) - 1):
        rows.leave(0)
        rows.step(1)
    assert rows.cache.num_rows == 1
    for row in [*rows.rows, *rows.finished]:
        forked = row.tokens[len(prompts[5])] in (5, 9, 11) and row.tokens[: len(prompts[5])] == prompts[5]
        check_row(model, row, TOLERANCE_NATS, greedy=not forked)


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "mistral", "gpt-j"])
@torch.no_grad()
def test_one_row_up_to_the_last_position_of_the_context(family: str) -> None:
    model = tiny_model(family)
    rows = GreedyRows(decoder_of(model), max_rows=1)
    rows.prefill(ragged_ids(3, [CONTEXT - 20]), 0)
    rows.step(20)
    rows.check(model)
    assert rows.cache.lengths == [CONTEXT]
    with pytest.raises(ValueError, match="row 0 is full"):
        rows.step(1)


@pytest.mark.parametrize("family", COVERED)
def test_the_weights_are_the_models_own_and_none_is_left_out(family: str) -> None:
    model = tiny_model(family)
    sources = decoder_of(model).sources
    assert {source.data_ptr() for source in sources} == {p.data_ptr() for p in model.parameters()}
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {source.untyped_storage().data_ptr() for source in sources} == storages


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["opt-350m", "gpt2", "llama", "codegen"])
def test_decoding_follows_an_optimizer_step_and_a_replaced_parameter(family: str, packed: bool) -> None:
    model = tiny_model(family)
    decoder = decoder_of(model)
    if packed:
        decoder.pack(2)
    prompts = ragged_ids(4, [7, 4])

    def decode() -> Tensor:
        with torch.inference_mode():
            rows = GreedyRows(decoder)
            rows.prefill(prompts, 0)
            rows.step(6)
        rows.check(model)
        return torch.stack(rows.rows[0].logprobs)

    decoded = [decode()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ids = torch.tensor(ragged_ids(5, [12]))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    decoded.append(decode())
    bindings = decoder.bindings
    block = model.get_submodule(decoder.architecture.family.trunk).get_submodule(decoder.architecture.family.blocks)[1]
    linear = block.get_submodule(decoder.architecture.family.mlp[-1])
    linear.weight = torch.nn.Parameter(torch.randn_like(linear.weight))
    decoded.append(decode())
    assert decoder.bindings == bindings + 1
    for before, after in pairwise(decoded):
        assert (before - after).abs().max() > 0.01


def test_packing_writes_no_parameter() -> None:
    model = tiny_model("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    decoder = decoder_of(model)
    with torch.no_grad():
        for _ in range(50):
            decoder.pack(4)
            decoder.unpack()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter._version == versions[name]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["opt", "opt-350m", "gpt2", "llama", "bloom", "gpt-neo", "codegen"])
def test_adapters_count_without_being_merged(family: str, packed: bool) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(family)
    decoder = decoder_of(model)
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plain = GreedyRows(decoder)
    with torch.no_grad():
        plain.prefill(ragged_ids(6, [5, 9]), 0)
    mlp = [path.split(".")[-1] for path in decoder.architecture.family.mlp]
    attention = [path.split(".")[-1] for path in decoder.architecture.family.query_key_value]
    config = peft.LoraConfig(
        r=3, lora_alpha=7, lora_dropout=0.3, target_modules=[*mlp, attention[-1]], fan_in_fan_out=family == "gpt2"
    )
    peft.inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * SPREAD)
        model.eval()
        if packed:
            decoder.pack(2)
        rows = GreedyRows(decoder)
        rows.prefill(ragged_ids(6, [5, 9]), 0)
        rows.step(12)
        rows.check(model)
    assert (rows.rows[0].logprobs[0] - plain.rows[0].logprobs[0]).abs().max() > 0.1
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")])


@torch.no_grad()
def test_adapters_that_are_switched_off_do_not_count() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model)
    decoder = decoder_of(model)
    decoded = {}
    for packed in (False, True):
        for enabled in (True, False):
            for module in model.modules():
                if hasattr(module, "lora_A"):
                    module.enable_adapters(enabled)
            if packed:
                decoder.pack(1)
            rows = GreedyRows(decoder)
            rows.prefill(ragged_ids(6, [9]), 0)
            rows.step(3)
            rows.check(model)
            decoded[enabled] = rows.rows[0].logprobs[0]
    assert not torch.allclose(decoded[True], decoded[False])


@torch.no_grad()
def test_a_variant_of_lora_is_not_covered() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    peft.inject_adapter_in_model(config, model)
    assert make_decoder(model) is None


@pytest.mark.parametrize("family", COVERED)
@torch.inference_mode()
def test_a_step_of_device_tensors_equals_the_planned_one(family: str) -> None:
    """What a CUDA graph would record: more rows than are live, and a longer reach than any has."""
    model = tiny_model(family)
    decoder = decoder_of(model)
    prompts = ragged_ids(7, [4, 11, 1])
    planned, recorded = GreedyRows(decoder, 4), GreedyRows(decoder, 4)
    for rows in (planned, recorded):
        rows.prefill(prompts, 0)
    for _ in range(10):
        planned.step(1)
        last = torch.tensor([*(row.tokens[-1] for row in recorded.rows), 0])
        logits = decoder.device_step(last, recorded.cache, num_rows=4, reach=32)
        recorded.cache.advance_host()
        recorded._record(logits[:3], recorded.rows)
    assert recorded.cache.lengths == [*recorded.cache.device_lengths.tolist()[:3], 0] == [14, 21, 11, 0]
    for mine, theirs in zip(recorded.rows, planned.rows, strict=True):
        assert mine.tokens == theirs.tokens
        torch.testing.assert_close(torch.stack(mine.logprobs), torch.stack(theirs.logprobs), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_row_that_nobody_reads_stays_in_the_cache() -> None:
    decoder = decoder_of(tiny_model("opt"))
    cache = decoder.new_cache(2, 5)
    decoder.prefill(torch.tensor([[5, 6]]), [2], cache, 0)
    for _ in range(8):
        decoder.device_step(torch.tensor([7, 7]), cache, num_rows=2, reach=5)
    assert cache.device_lengths.tolist() == [5, 5]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["opt-350m", "llama", "qwen3", "bloom", "gpt-j", "gpt-neox"])
def test_lower_precision(family: str, packed: bool) -> None:
    """bfloat16 by autocast and as the weights' own type: float32 logits, near transformers' in the same type."""
    model = tiny_model(family)
    for own in (False, True):
        if own:
            model = model.bfloat16()
        decoder = decoder_of(model, torch.bfloat16)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=not own):
            if packed:
                decoder.pack(3)
            rows = GreedyRows(decoder)
            assert rows.cache.dtype == torch.bfloat16
            rows.prefill(ragged_ids(8, [6, 3, 9]), 0)
            rows.step(5)
            rows.check(model, tolerance=0.15, greedy=False)


@pytest.mark.parametrize(
    ("lengths", "first_row"), [([0, 2], 0), ([4, 2], 0), ([3], 0), ([3, 3], 1), ([3, 3], -1)]
)  # fmt: skip
def test_prompts_that_do_not_fit_are_refused(lengths: list[int], first_row: int) -> None:
    decoder = decoder_of(tiny_model("opt"))
    cache = decoder.new_cache(2, 8)
    with pytest.raises(ValueError, match="do not fit"), torch.no_grad():
        decoder.prefill(torch.zeros(2, 3, dtype=torch.int64), lengths, cache, first_row)
    with pytest.raises(ValueError, match="do not fit"), torch.no_grad():
        decoder.prefill(torch.zeros(1, 9, dtype=torch.int64), [9], cache, 0)


@pytest.mark.real
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["stories260K", "babyllama-char-1M"])
@torch.inference_mode()
def test_real_checkpoints(shared: Path, name: str, packed: bool) -> None:
    source = str(shared / "models" / name)
    model, tokenizer = load_causal_lm(source), load_tokenizer(source)
    decoder = decoder_of(model)
    if packed:
        decoder.pack(4)
    texts = ["Once upon a time", "Lily", "The dog was very sad.\nHe said:\nno", "One day, Tom and his mom went to the"]
    rows = GreedyRows(decoder, capacity=160)
    rows.prefill([tokenizer(text).input_ids for text in texts], 0)
    rows.step(80)
    rows.check(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["opt", "llama", "mistral", "bloom"])
def test_a_recorded_step_survives_an_optimizer_step(family: str) -> None:
    model = tiny_model(family).cuda()
    decoder = decoder_of(model)
    prompts = ragged_ids(9, [4, 11, 1])
    ids, _ = right_padded(prompts)
    last = torch.full((4,), 7, device="cuda")

    def prefilled() -> KVCache:
        decoder.pack(4)
        cache.num_rows = 3
        decoder.prefill(ids.cuda(), [4, 11, 1], cache, 0)
        return cache

    with torch.no_grad():
        cache = decoder.new_cache(4, 32)
        prefilled()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            decoder.device_step(last, cache, 4, 32)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = decoder.device_step(last, cache, 4, 32)
        bindings = decoder.bindings
        for parameter in model.parameters():
            parameter.mul_(1.1)
        prefilled()
        graph.replay()
        recorded = logits[:3].clone()
        eager = decoder.step(last[:3], prefilled())
        assert decoder.bindings == bindings
    torch.testing.assert_close(recorded, eager, atol=1e-4, rtol=1e-4)
