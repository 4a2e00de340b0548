"""Device, precision and seeds, on whatever machine runs this."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy
import pytest
import torch

from threefold.config.recipe import RunSection
from threefold.engine.device import make_repeatable, pick_device, pick_dtype, precision
from threefold.errors import ConfigError

AVAILABLE = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_pick_device() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if AVAILABLE["cuda"] else "cpu")


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_with_the_field_and_a_way_out(name: str) -> None:
    if AVAILABLE[name]:
        assert pick_device(name).type == name
        return
    with pytest.raises(ConfigError, match=f'run.device = "{name}": .* set run.device = "auto" or "cpu"') as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)


def test_pick_dtype() -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("float32", cpu) == torch.float32
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16


def test_precision_is_that_of_matrix_products_and_weights_stay_float32() -> None:
    model, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with precision(torch.device("cpu"), torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    with precision(torch.device("cpu"), torch.float32):
        assert model(x).dtype == torch.float32
    assert model(x).dtype == torch.float32
    assert model.weight.dtype == torch.float32


def draws() -> list[float]:
    return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]


def test_one_seed_repeats_every_global_generator(threads: None) -> None:
    make_repeatable(RunSection(seed=7))
    first = draws()
    make_repeatable(RunSection(seed=7))
    assert draws() == first
    make_repeatable(RunSection(seed=8))
    assert all(one != other for one, other in zip(draws(), first, strict=True))
    make_repeatable(RunSection(seed=2**32 + 7))  # NumPy takes 32 bits only
    assert draws()[1] == first[1]


def test_number_of_threads(threads: None) -> None:
    torch.set_num_threads(2)
    make_repeatable(RunSection(num_threads=0))
    assert torch.get_num_threads() == 2
    make_repeatable(RunSection(num_threads=1))
    assert torch.get_num_threads() == 1


def test_attention_is_left_to_kernels_that_take_any_shape(threads: None) -> None:
    make_repeatable(RunSection())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda")
    assert taken == [], "a process alone leaves the choice to PyTorch"
    monkeypatch.setenv("LOCAL_RANK", "1")
    pick_device("cuda")
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    pick_device("auto")
    assert taken == [1, 0], "of one that sees only its own, the first"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"process 3 of this machine has no GPU: there are 2"):
        pick_device("cuda")
