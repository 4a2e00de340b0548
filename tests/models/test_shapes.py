"""Shapes: published sizes, sizes by hand, one-line mistakes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from threefold.errors import ConfigError
from threefold.models.shapes import BUILT_IN, find_shape, model_config

PUBLISHED = {
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-350m": 331_196_416,
    "facebook/opt-1.3b": 1_315_758_080,
    "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984,
    "facebook/opt-13b": 12_853_473_280,
    "facebook/opt-30b": 29_974_540_288,
    "meta-llama/Llama-2-7b": 6_738_415_616,
    "meta-llama/Llama-2-13b": 13_015_864_320,
    "meta-llama/Llama-2-70b": 68_976_648_192,
    "meta-llama/Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
}
"""Parameters of the published checkpoints, a tied head counted once."""

ROUNDED = {"facebook/opt-66b": 66e9, "facebook/opt-175b": 175e9}
"""Counted by nobody that we know of: the name is all that is published."""


def num_parameters(name: str) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(find_shape(name, "--actor")))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_built_in_shape_has_the_published_number_of_parameters(name: str) -> None:
    assert num_parameters(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_the_largest_opt_shapes_have_the_size_of_their_names(name: str) -> None:
    assert num_parameters(name) == pytest.approx(ROUNDED[name], rel=0.01)


def test_every_built_in_shape_is_checked_against_a_published_size() -> None:
    assert {shape.name for shape in BUILT_IN.values()} == {*PUBLISHED, *ROUNDED}


def test_opt_350m_is_post_norm_with_projected_embeddings() -> None:
    config = model_config(find_shape("opt-350m", "--critic"))
    assert (config.word_embed_proj_dim, config.do_layer_norm_before) == (512, False)


def test_llama_3_2_has_scaled_rotary_positions() -> None:
    config = model_config(find_shape("Llama-3.2-1B", "--actor"))
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("llama3", 32.0)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("opt-1.3b", "facebook/opt-1.3b"),
        ("OPT-1.3B", "facebook/opt-1.3b"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b"),
        ("meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3-8B"),
        ("qwen3-0.6b", "Qwen/Qwen3-0.6B"),
    ],
)
def test_names_may_be_short(text: str, name: str) -> None:
    assert find_shape(text, "--actor").name == name


def test_a_shape_by_its_sizes() -> None:
    """OPT: 2 layers of 4 * 8^2 + 2 * 8 * 16 weights and 9 * 8 + 16 biases and norms; embeddings 10 x 8 and 12 + 2
    positions; final norm 16. Llama with 2 of 4 heads as keys: 8 * (8 + 4 + 4 + 8) + 3 * 8 * 16 and two norms of 8 per
    layer; tied embeddings 10 x 8; final norm 8."""
    opt = "opt:hidden=8,layers=2,heads=2,ffn=16,vocab=10,positions=12"
    assert num_parameters(opt) == 2 * (4 * 64 + 256 + 9 * 8 + 16) + 80 + 14 * 8 + 16
    llama = "llama: hidden=8, layers=2, heads=4, kv_heads=2, ffn=16, vocab=10"
    assert num_parameters(llama) == 2 * (8 * 24 + 384 + 16) + 80 + 8
    assert num_parameters(f"{llama},tied=0") == num_parameters(llama) + 80
    config = model_config(
        find_shape("qwen3:hidden=8,layers=1,heads=4,head_dim=6,ffn=8,vocab=9,positions=99", "--actor")
    )
    assert (config.head_dim, config.max_position_embeddings) == (6, 99)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("opt-1.4b", ["--actor opt-1.4b", "no built-in shape", "facebook/opt-1.3b"]),
        ("zzz", ["--actor zzz", "built in are opt-125m", "opt:hidden=512"]),
        ("bert:hidden=8", ["'bert' is no family", "opt, llama, qwen2, qwen3"]),
        ("opt:hidden=8,layers=2,heads=2,ffn=16", ["vocab is missing", "vocab=NUMBER"]),
        ("opt:hiden=8,layers=2,heads=2,ffn=16,vocab=9", ["unknown size 'hiden'", "did you mean hidden?"]),
        ("opt:hidden=8,layers=2,heads=2,ffn=16,vocab=9,kv_heads=1", ["unknown size 'kv_heads'"]),
        ("opt:hidden=8,layers=0,heads=2,ffn=16,vocab=9", ["layers must be a whole number of 1 or more, not '0'"]),
        ("opt:hidden=8,layers=x,heads=2,ffn=16,vocab=9", ["layers must be", "'x'"]),
        ("opt:hidden=8,hidden=8", ["hidden is given twice"]),
        ("opt:hidden=8,layers=2,heads=3,ffn=16,vocab=9", ["heads 3 does not divide hidden 8"]),
        ("llama:hidden=8,layers=2,heads=4,kv_heads=3,ffn=16,vocab=9", ["kv_heads 3 does not divide heads 4"]),
        ("llama:hidden=6,layers=2,heads=2,ffn=16,vocab=9", ["heads 3 wide", "rotary"]),
        ("opt:hidden=8,layers=2,heads=2,ffn=16,vocab=1", ["vocab must be at least 2"]),
    ],
)
def test_a_mistake_is_one_line_with_the_flag(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        find_shape(text, "--actor")
    message = str(refused.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
