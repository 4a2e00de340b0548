"""Recorded decode steps on a GPU: what is replayed is what the decoder computes, and what it leaves behind.

tests/inference/test_cuda_graphs.py tests the same class with a recorder for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.models.families_under_test import CONTEXT, VOCAB, ragged_ids, randomise, right_padded, tiny_causal_lm
from threefold.config.recipe import OptimizerSection
from threefold.engine.device import precision
from threefold.engine.train import TrainEngine
from threefold.inference import cuda_graphs
from threefold.inference.attention import _attend_rows, _attend_rows_cpu, attend_prompt, step_mask
from threefold.inference.cuda_graphs import CudaGraphs, GraphedDecoder, recorder_for
from threefold.inference.decoder import Decoder, make_decoder
from threefold.inference.kv_cache import CacheLayout, KVCache
from threefold.models.loading import use_fast_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CUDA = torch.device("cuda")
FAMILIES = ["opt", "opt-350m", "llama", "mistral", "bloom", "gpt-j"]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Nats. Graph and eager run the same products, but over other numbers of rows and positions, so kernels may differ."""
SPREAD = 0.2


class Counting(CudaGraphs):
    """Counts what it records."""

    recorded = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return super().record(work)


def decoder_of(family: str, dtype: torch.dtype) -> Decoder:
    model = use_fast_kernels(randomise(tiny_causal_lm(family), 0, SPREAD)).cuda()
    decoder = make_decoder(model, dtype)
    assert decoder is not None
    return decoder


class SideBySide:
    """A graphed and a plain decoder are fed the same tokens."""

    def __init__(self, decoder: Decoder, recorder: CudaGraphs) -> None:
        self.plain, self.graphed = decoder, GraphedDecoder(decoder, recorder)
        self.caches: list[tuple[Decoder | GraphedDecoder, KVCache]] = [
            (one, one.new_cache(9, CONTEXT)) for one in (self.graphed, self.plain)
        ]
        self.dtype = decoder.dtype
        self.generator = torch.Generator(CUDA).manual_seed(0)

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]], first_row: int = 0) -> None:
        ids, _ = right_padded(prompts)
        for decoder, cache in self.caches:
            with precision(CUDA, self.dtype):
                decoder.prefill(ids.cuda(), [len(prompt) for prompt in prompts], cache, first_row)
            cache.num_rows = max(cache.num_rows, first_row + len(prompts))

    def leave(self, row: int) -> None:
        for _, cache in self.caches:
            cache.move(cache.num_rows - 1, row)
            cache.num_rows -= 1

    @torch.no_grad()
    def step(self, times: int) -> Tensor:
        num_rows = self.caches[0][1].num_rows
        for _ in range(times):
            ids = torch.randint(VOCAB, (num_rows,), generator=self.generator, device=CUDA)
            with precision(CUDA, self.dtype):
                graphed, plain = (decoder.step(ids, cache) for decoder, cache in self.caches)
            assert graphed.dtype == torch.float32
            torch.testing.assert_close(
                graphed.log_softmax(-1), plain.log_softmax(-1), atol=TOLERANCE[self.dtype], rtol=0
            )
        return graphed.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_follow_rows_that_come_and_go_and_optimizer_steps(
    family: str, packed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "SMALLEST_REACH", 16)
    decoder, recorder = decoder_of(family, dtype), Counting(CUDA)
    rows = SideBySide(decoder, recorder)
    trainer = TrainEngine(decoder.model, OptimizerSection(learning_rate=0.02, grad_clip=0), 9, CUDA, dtype, "a test")
    prompts = ragged_ids(1, [4, 11, 1, 20, 7])
    recorded, last = 0, None
    for _ in range(3):
        if packed:
            decoder.pack(5)
        rows.prefill(prompts)
        rows.step(6)
        rows.leave(1)
        rows.leave(0)
        rows.step(4)
        rows.prefill([prompts[3]], 3)
        found = rows.step(3)
        assert last is None or (found - last).abs().max() > 0.01, "the update moved the logits"
        assert recorded in (0, recorder.recorded), "and nothing was recorded anew for it"
        recorded, last = recorder.recorded, found
        trainer.backward(lambda: decoder.model(torch.tensor([[5, 6, 7, 8]], device=CUDA)).logits.square().mean())
        trainer.step()
    assert recorded > 2


def test_a_replay_does_not_make_the_host_wait() -> None:
    decoder = decoder_of("llama", torch.bfloat16)
    decoder.pack(2)
    graphed = GraphedDecoder(decoder, CudaGraphs(CUDA))
    cache = graphed.new_cache(2, CONTEXT)
    ids = torch.tensor([5, 6], device=CUDA)
    with torch.no_grad():
        graphed.prefill(torch.tensor([[5, 6], [7, 8]], device=CUDA), [2, 2], cache, 0)
        cache.num_rows = 2
        graphed.step(ids, cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            graphed.step(ids, cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.lengths == cache.device_lengths.tolist() == [4, 4]


def test_graphs_share_a_pool_and_a_new_one_after_they_are_dropped() -> None:
    recorder = recorder_for(CUDA)
    assert isinstance(recorder, CudaGraphs)
    x = torch.zeros(1000, device=CUDA)
    for start in range(3):
        x.fill_(start)
        add, double = recorder.record(lambda: x.add_(x * 0 + 1)), recorder.record(lambda: x.mul_(2))
        assert x.tolist() == [2 * (start + 1)] * 1000, "recording is doing it once"
        double()
        add()
        add()
        assert x.tolist() == [4 * (start + 1) + 2] * 1000
        del add, double
        recorder.forget()


def test_a_replaced_parameter_is_recorded_anew() -> None:
    decoder, recorder = decoder_of("llama", torch.float32), Counting(CUDA)
    rows = SideBySide(decoder, recorder)
    for expected in (1, 2):
        decoder.pack(2)
        rows.prefill(ragged_ids(2, [3, 5]))
        rows.step(2)
        assert recorder.recorded == expected
        norm = decoder.model.model.norm
        norm.weight = torch.nn.Parameter(torch.rand_like(norm.weight) + 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (8, 2)])
def test_a_step_attends_by_the_memory_efficient_kernel(num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> None:
    """It alone is allowed, and takes the mask without a copy; compared with two products in float32."""
    cache = KVCache(CacheLayout(1, num_kv_heads, 64), 6, 64, CUDA, dtype)
    cache.set_lengths(0, [1, 64, 13, 40, 7, 57])
    for part in (cache.keys[0], cache.values[0]):
        part.normal_()
    mask = step_mask(cache, slice(0, 6), 0, 64, None, None)
    keys, values = cache.views(slice(0, 6), 0, 64)[0]
    heads = torch.randn(6, num_heads + 2 * num_kv_heads, 64, device=CUDA).to(dtype)
    queries = heads[:, :num_heads]
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        found = _attend_rows(queries, keys, values, mask, 0.125)
    expected = _attend_rows_cpu(*(x.float() for x in (queries, keys, values, mask)), 0.125)
    torch.testing.assert_close(found.float(), expected, atol=1e-4 if dtype == torch.float32 else 0.03, rtol=0)


def test_prompts_attend_by_the_flash_kernel() -> None:
    queries, keys, values = (torch.randn(3, 100, n, 64, device=CUDA, dtype=torch.bfloat16) for n in (8, 2, 2))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        found = attend_prompt(queries, keys, values, None, 0.125)
    with sdpa_kernel([SDPBackend.MATH]):
        expected = attend_prompt(queries.float(), keys.float(), values.float(), None, 0.125)
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0)
