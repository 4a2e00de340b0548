"""Recorded decode steps against `Decoder.step`, with a recorder that repeats PyTorch's calls on the CPU.

tests/gpu runs the same class with real graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.inference.recorded_operations import PlainCalls, RecordedOperations
from tests.models.families_under_test import CONTEXT, VOCAB, ragged_ids, randomise, right_padded, tiny_causal_lm
from threefold.config.recipe import SamplingSection
from threefold.inference import cuda_graphs
from threefold.inference.attention import step_mask
from threefold.inference.cuda_graphs import GraphedDecoder, bucket, recorder_for
from threefold.inference.decoder import Decoder, make_decoder
from threefold.inference.generate import generate
from threefold.inference.kv_cache import KVCache
from threefold.inference.projections import DenseImage
from threefold.machine.linear import PackedLinear

FAMILIES = ["opt", "llama", "mistral", "bloom"]
TOLERANCE = 1e-5
SPREAD = 0.2


def decoder_of(family: str, dtype: torch.dtype | None = None) -> Decoder:
    decoder = make_decoder(randomise(tiny_causal_lm(family), 0, SPREAD), dtype)
    assert decoder is not None
    return decoder


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that the tiny models meet many."""
    monkeypatch.setattr(cuda_graphs, "SMALLEST_ROWS", 2)
    monkeypatch.setattr(cuda_graphs, "SMALLEST_REACH", 8)


@pytest.fixture
def images_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights in the decoder's dtype, rewritten in place, instead of the layout of this CPU's kernel."""
    monkeypatch.setattr(PackedLinear, "suits", staticmethod(lambda weight: False))


class SideBySide:
    """A graphed decoder and a plain one that are led through the same; every step's logits are compared."""

    def __init__(self, decoder: Decoder, recorder: RecordedOperations, max_rows: int = 7, capacity: int = CONTEXT):
        self.plain, self.graphed, self.recorder = decoder, GraphedDecoder(decoder, recorder), recorder
        self.size = (max_rows, capacity)
        self.start()

    def start(self) -> None:
        """A new rollout."""
        self.graphed.release()
        self.caches: list[tuple[Decoder | GraphedDecoder, KVCache]] = [
            (decoder, decoder.new_cache(*self.size)) for decoder in (self.graphed, self.plain)
        ]
        self.num_rows = 0
        self.generator = torch.Generator().manual_seed(1)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], first_row: int = 0) -> None:
        ids, _ = right_padded([list(prompt) for prompt in prompts])
        self.num_rows = max(self.num_rows, first_row + len(prompts))
        for decoder, cache in self.caches:
            decoder.prefill(ids, [len(prompt) for prompt in prompts], cache, first_row)
            cache.num_rows = self.num_rows

    def leave(self, row: int) -> None:
        self.num_rows -= 1
        for _, cache in self.caches:
            cache.move(self.num_rows, row)
            cache.num_rows = self.num_rows

    def fork(self, source: int, count: int) -> None:
        rows = range(self.num_rows, self.num_rows + count)
        self.num_rows += count
        for _, cache in self.caches:
            cache.copy(source, rows)
            cache.num_rows = self.num_rows

    @torch.no_grad()
    def step(self, times: int = 1, tolerance: float = TOLERANCE) -> Tensor:
        for _ in range(times):
            ids = torch.randint(VOCAB, (self.num_rows,), generator=self.generator)
            graphed, plain = (decoder.step(ids, cache) for decoder, cache in self.caches)
            assert graphed.dtype == torch.float32
            assert graphed.shape == (self.num_rows, VOCAB)
            torch.testing.assert_close(graphed.log_softmax(-1), plain.log_softmax(-1), atol=tolerance, rtol=0)
        (_, mine), (_, theirs) = self.caches
        assert mine.lengths[: self.num_rows] == theirs.lengths[: self.num_rows]
        assert mine.device_lengths.tolist()[: self.num_rows] == mine.lengths[: self.num_rows]
        return graphed.clone()


@pytest.mark.parametrize(
    ("count", "smallest", "expected"),
    [(1, 4, 4), (4, 4, 4), (5, 4, 8), (32, 4, 32), (33, 4, 40), (64, 4, 64), (65, 4, 80), (129, 4, 160), (256, 4, 256),
     (1, 64, 64), (65, 64, 128), (257, 64, 320), (512, 64, 512), (513, 64, 640), (1500, 64, 1536)],
)  # fmt: skip
def test_buckets_by_hand(count: int, smallest: int, expected: int) -> None:
    assert bucket(count, smallest) == expected


@given(count=st.integers(1, 5000), power=st.integers(0, 8))
def test_buckets_serve_and_waste_a_quarter_at_most(count: int, power: int) -> None:
    smallest = 2**power
    size = bucket(count, smallest)
    assert count <= size < max(count + smallest, 1.25 * count + 1)
    assert size % smallest == 0
    assert bucket(size, smallest) == size, "which is a size itself"


def test_there_are_few_buckets() -> None:
    assert len({bucket(rows, cuda_graphs.SMALLEST_ROWS) for rows in range(1, 257)}) == 20
    assert len({bucket(reach, cuda_graphs.SMALLEST_REACH) for reach in range(1, 2049)}) == 16


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("recorder", [RecordedOperations, PlainCalls])
@pytest.mark.parametrize("family", [*FAMILIES, "opt-350m", "gpt-j", "gpt-neo", "qwen3"])
def test_steps_are_those_of_the_decoder_whatever_rows_come_and_go(
    family: str, recorder: type[RecordedOperations]
) -> None:
    """Padding rows of every kind: never used, left behind, holding more than any live row."""
    rows = SideBySide(decoder_of(family), recorder())
    prompts = ragged_ids(2, [3, 17, 1, 9, 30])
    rows.prefill(prompts[:4])
    rows.step(9)
    rows.leave(1)
    rows.step(3)
    rows.prefill([prompts[4]], 3)
    rows.fork(3, 3)
    rows.step(4)
    for _ in range(6):
        rows.leave(0)
        rows.step(2)
    rows.prefill(prompts[1:4], 1)
    rows.step(5)
    recorded = rows.recorder.recorded
    assert 6 < recorded < 20, "several buckets, each of them recorded once"
    rows.start()
    rows.prefill(prompts[:2])
    rows.step(2)


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("family", ["mistral", "qwen3-window", "gpt-neo"])
def test_a_row_that_was_left_with_more_than_is_read_spoils_nothing(family: str) -> None:
    """Its window would lie behind what is read; NaN there would stay in its slot for the next sequence."""
    rows = SideBySide(decoder_of(family), RecordedOperations())
    long, short = ragged_ids(3, [50, 2])
    rows.prefill([short, long])
    rows.step()
    rows.leave(1)
    rows.step(6)
    rows.prefill([long[:40]], 1)
    assert bool(rows.step(12).isfinite().all())
    for _, cache in rows.caches:
        assert all(bool(part.isfinite().all()) for part in (*cache.keys, *cache.values))


@pytest.mark.usefixtures("small_buckets")
def test_a_bucket_is_recorded_once_and_repeated_after_that() -> None:
    recorder = RecordedOperations()
    rows = SideBySide(decoder_of("llama"), recorder)
    rows.prefill(ragged_ids(4, [3, 5]))
    counts = []
    for _ in range(20):  # 6 .. 25 positions, so 8, 16, 24, 32 of them are read
        rows.step()
        counts.append(recorder.recorded)
    assert counts == [1] * 3 + [2] * 8 + [3] * 8 + [4]
    rows.leave(0)  # the bucket of rows is the same
    rows.step()
    assert recorder.recorded == 4
    assert sorted(rows.graphed._kept[0].graphs) == [(2, 8), (2, 16), (2, 24), (2, 32)]


@pytest.mark.usefixtures("images_as_on_a_gpu")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_recorded_steps_survive_an_optimizer_step(family: str, packed: bool) -> None:
    decoder, recorder = decoder_of(family), RecordedOperations()
    model = decoder.model
    rows = SideBySide(decoder, recorder)
    prompts = ragged_ids(5, [7, 4])

    def rollout() -> Tensor:
        if packed:
            decoder.pack(2)
        rows.prefill(prompts)
        return rows.step(4)

    before = rollout()
    bindings = decoder.bindings
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ids = torch.tensor(ragged_ids(5, [12]))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = rollout()
    assert (after - before).abs().max() > 0.01
    assert decoder.bindings == bindings
    assert recorder.recorded == 1


@pytest.mark.usefixtures("images_as_on_a_gpu")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("what", ["norm", "matrix", "embedding"])
def test_a_replaced_parameter_is_recorded_anew(what: str, packed: bool) -> None:
    """A norm and an embedding are read where they are, also while the matrices are packed."""
    decoder, recorder = decoder_of("llama"), RecordedOperations()
    rows = SideBySide(decoder, recorder)
    prompts = ragged_ids(6, [7, 4])
    trunk = decoder.model.model
    module = {"norm": trunk.norm, "matrix": trunk.layers[0].mlp.up_proj, "embedding": trunk.embed_tokens}[what]
    for expected in (1, 2):
        if packed:
            decoder.pack(2)
        rows.prefill(prompts)
        rows.step(3)
        assert recorder.recorded == expected
        module.weight = torch.nn.Parameter(torch.randn_like(module.weight) * SPREAD)


def test_images_that_are_made_anew_are_recorded_anew() -> None:
    """As on a CPU whose kernel has a layout of its own, and after `unpack`."""
    decoder, recorder = decoder_of("opt"), PlainCalls()
    rows = SideBySide(decoder, recorder)
    for pack in (True, False, True):
        if pack:
            decoder.pack(2)
        else:
            decoder.unpack()
        rows.prefill(ragged_ids(7, [3]))
        rows.step(2)
    assert recorder.recorded == 3


def test_the_memory_of_a_cache_is_given_back_and_its_place_may_change() -> None:
    recorder = RecordedOperations()
    graphed = GraphedDecoder(decoder_of("llama"), recorder)
    prompts = ragged_ids(8, [7, 4])

    def rollout() -> KVCache:
        cache = graphed.new_cache(2, 20)
        assert (cache.num_rows, cache.lengths, cache.device_lengths.tolist()) == (0, [0, 0], [0, 0])
        assert not any(bool(part.any()) for part in (*cache.keys, *cache.values))
        ids, _ = right_padded(prompts)
        with torch.no_grad():
            graphed.prefill(ids, [7, 4], cache, 0)
            cache.num_rows = 2
            graphed.step(torch.tensor([5, 6]), cache)
        return cache

    first = rollout()
    assert first.nbytes > 0
    graphed.release()
    graphed.release()
    assert first.nbytes == 0
    places = [first.addresses]
    elsewhere = []
    for _ in range(4):
        assert rollout() is first
        places.append(first.addresses)
        graphed.release()
        elsewhere.append(torch.empty(1000))
    moved = sum(one != other for one, other in pairwise(places))
    assert recorder.recorded == 1 + moved


def test_graphs_are_dropped_when_keys_and_values_lie_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = RecordedOperations()
    rows = SideBySide(decoder_of("opt"), recorder)
    for expected, places in ((1, (1, 2)), (1, (1, 2)), (2, (3, 2)), (3, (3, 4))):
        monkeypatch.setattr(KVCache, "addresses", places)
        rows.start()
        rows.prefill(ragged_ids(9, [3, 4]))
        rows.step(2)
        assert recorder.recorded == expected


@torch.no_grad()
def one_step(graphed: GraphedDecoder, cache: KVCache) -> None:
    graphed.prefill(torch.tensor([[5, 6]]), [2], cache, 0)
    cache.num_rows = 1
    assert graphed.step(torch.tensor([7]), cache).shape == (1, VOCAB)
    assert cache.lengths[0] == int(cache.device_lengths[0]) == 3


def test_rollouts_of_a_few_sizes_keep_what_was_recorded() -> None:
    recorder = RecordedOperations()
    graphed = GraphedDecoder(decoder_of("opt"), recorder)
    caches = []
    for expected, rows in ((1, 3), (2, 5), (3, 4), (3, 3), (3, 5)):
        caches.append(graphed.new_cache(rows, 20))
        one_step(graphed, caches[-1])
        graphed.release()
        assert (caches[-1].max_rows, caches[-1].capacity) == (rows, cuda_graphs.SMALLEST_REACH)
        assert recorder.recorded >= expected
    assert caches[3] is caches[0]
    assert caches[4] is caches[1]
    again = recorder.recorded - 3  # where keys and values have come to lie elsewhere
    assert graphed.new_cache(6, 20).max_rows == 6  # the fourth: the one that was not used for longest gives way
    assert graphed.new_cache(4, 20) is not caches[2]
    assert again <= 2
    assert graphed.bytes_per_row(20) == graphed.bytes_per_row(64) > 0


def test_a_cache_that_is_in_use_is_not_lent_again() -> None:
    recorder = RecordedOperations()
    graphed = GraphedDecoder(decoder_of("opt"), recorder)
    caches = [graphed.new_cache(3, 20) for _ in range(cuda_graphs.MOST_CACHES + 1)]
    assert len({id(cache) for cache in caches}) == len(caches)
    for cache in caches:
        one_step(graphed, cache)
    assert recorder.recorded == cuda_graphs.MOST_CACHES, "the first had to give way"
    one_step(graphed, graphed._decoder.new_cache(3, 20))
    assert recorder.recorded == cuda_graphs.MOST_CACHES, "nor is another's cache recorded"


def test_the_recorder_is_told_when_no_graph_is_left_and_not_before() -> None:
    recorder = RecordedOperations()
    graphed = GraphedDecoder(decoder_of("opt"), recorder)
    one, other = graphed.new_cache(3, 20), graphed.new_cache(4, 20)
    one_step(graphed, one)
    forgotten = recorder.times_forgotten
    one_step(graphed, other)
    assert recorder.times_forgotten == forgotten, "the graphs of one are still there"
    graphed._decoder.bindings += 1
    one_step(graphed, one)
    assert recorder.times_forgotten == forgotten, "those of the other are, though of no use any more"
    graphed._decoder.bindings += 1
    for kept in graphed._kept:
        graphed._drop_graphs(kept)
    assert recorder.times_forgotten == forgotten + 1


@torch.no_grad()
def test_a_full_row_is_refused_before_anything_is_done() -> None:
    graphed = GraphedDecoder(decoder_of("bloom"), RecordedOperations())  # the one without a last position
    cache = graphed.new_cache(1, 20)
    graphed.prefill(torch.tensor([[5] * 63]), [63], cache, 0)
    cache.num_rows = 1
    graphed.step(torch.tensor([7]), cache)
    with pytest.raises(ValueError, match="row 0 is full"):
        graphed.step(torch.tensor([7]), cache)
    assert (cache.lengths, cache.device_lengths.tolist()) == ([64], [64])


@pytest.mark.usefixtures("small_buckets", "images_as_on_a_gpu")
@pytest.mark.parametrize("answers_per_prompt", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_rollouts_are_those_of_the_decoder(family: str, answers_per_prompt: int) -> None:
    decoder, recorder = decoder_of(family), RecordedOperations()
    graphed = GraphedDecoder(decoder, recorder)
    prompts = ragged_ids(10, [3, 9, 1, 20, 5])
    sampling, stops = SamplingSection(max_new_tokens=24, temperature=1.3), frozenset({3, 4, 11})
    lengths = set()
    for seed in range(3):
        answers = [
            generate(
                one,
                prompts,
                sampling,
                stops,
                torch.Generator().manual_seed(seed),
                answers_per_prompt=answers_per_prompt,
            )
            for one in (graphed, decoder)
        ]
        graphed.release()
        lengths |= {len(rollout.response_ids) for rollout in answers[1]}
        for ours, theirs in zip(*answers, strict=True):
            assert torch.equal(ours.response_ids, theirs.response_ids)
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=TOLERANCE, rtol=0)
    assert recorder.recorded > 4
    assert len(lengths) > 3, "rows come and go"


class Conversions(TorchDispatchMode):
    """Sizes of what is converted to another type."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func.overloadpacket is torch.ops.aten._to_copy and kwargs.get("dtype") not in (None, args[0].dtype):
            self.sizes.append(args[0].numel())
        return func(*args, **kwargs)


@pytest.mark.usefixtures("images_as_on_a_gpu")
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2", "qwen3", "gpt-neox"])
def test_packed_in_bfloat16_neither_prompts_nor_steps_convert_a_weight(family: str) -> None:
    decoder = decoder_of(family, torch.bfloat16)
    decoder.pack(1)
    smallest = min(parameter.numel() for parameter in decoder.model.parameters() if parameter.ndim == 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = decoder.new_cache(1, 16)
        assert cache.dtype == torch.bfloat16
        with Conversions() as conversions:
            logits = decoder.prefill(torch.tensor([[5, 6]]), [2], cache, 0)
            cache.num_rows = 1
            logits = decoder.step(logits.argmax(-1), cache)
            logits = decoder.device_step(logits.argmax(-1), cache, 1, 16)
    assert logits.dtype == torch.float32
    assert conversions.sizes, "activations are"
    assert max(conversions.sizes) < smallest


@pytest.mark.usefixtures("images_as_on_a_gpu", "small_buckets")
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_under_autocast(family: str) -> None:
    recorder = RecordedOperations()
    rows = SideBySide(decoder_of(family, torch.bfloat16), recorder)
    rows.plain.pack(3)
    rows.prefill(ragged_ids(11, [3, 9, 5]))
    with torch.autocast("cpu", torch.bfloat16):
        rows.step(3, tolerance=0.05)
    recorded = recorder.recorded
    rows.step(1, tolerance=0.05)
    assert recorder.recorded == recorded + 1, "another precision is another recording"


@pytest.mark.usefixtures("images_as_on_a_gpu")
def test_images_stay_at_their_addresses_and_follow_the_weights() -> None:
    decoder = decoder_of("llama", torch.bfloat16)
    decoder.pack(2)
    head = decoder._step_maps.head
    assert isinstance(head, DenseImage)
    place = head._weight.data_ptr()
    with torch.no_grad():
        for parameter in decoder.model.parameters():
            parameter.add_(0.5)
    decoder.pack(2)
    head = decoder._step_maps.head
    assert isinstance(head, DenseImage)
    assert head._weight.data_ptr() == place
    assert torch.equal(head._weight, decoder.model.lm_head.weight.bfloat16())


def test_the_mask_of_a_step_suits_the_kernels_of_a_gpu() -> None:
    """Rows that begin at multiples of 8 numbers, without a step between neighbours: else each layer copies it."""
    layout = decoder_of("llama").layout
    for capacity, stop in ((64, 13), (64, 64), (64, 57)):
        cache = KVCache(layout, 3, capacity, "meta", torch.bfloat16)
        mask = step_mask(cache, slice(0, 3), 0, stop, None, None)
        assert mask.shape == (3, 1, 1, stop)
        assert mask.dtype == torch.bfloat16
        assert mask.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
        keys, values = cache.views(slice(0, 3), 0, stop)[0]
        assert keys.transpose(-1, -2).stride(-1) == values.stride(-1) == 1


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert recorder_for(torch.device("cpu")) is None
