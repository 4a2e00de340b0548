"""Adapters against peft's own wrapper and merge, a naive formula, and the model from before it had any."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import Linear as AdaptedLinear
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from tests.models.families_under_test import (
    CONFIGS,
    EOS,
    PAD,
    ragged_ids,
    right_padded,
    tiny_causal_lm,
    tiny_scalar_model,
    tiny_tokenizer,
)
from threefold.config.recipe import LoRASection
from threefold.errors import CheckpointError, ConfigError
from threefold.models.adapters import adapters_off, add_lora, has_lora, merged_state_dict, merged_weight
from threefold.models.loading import load_causal_lm, load_scalar_model, save_model, set_dropout

# What peft's own wrapper warns of; threefold does not use it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to", "ignore:.is_gradient_checkpointing. is deprecated"
)

SEED = 7
GATED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FUSED = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
LAYERS = {
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "opt-350m": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},  # and not project_in, project_out
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "llama": GATED, "mistral": GATED, "qwen2": GATED, "gemma2": GATED, "cohere": GATED,
    "gpt-neox": FUSED, "bloom": FUSED, "falcon": FUSED,
}  # fmt: skip
"""The linear layers of each family's blocks, by hand."""
SCALAR_FAMILIES = sorted(CONFIGS.keys() - {"cohere"})  # transformers has no Cohere for sequence classification

Make = Callable[[str], PreTrainedModel]


def draw_adapters(model: PreTrainedModel, seed: int = SEED) -> PreTrainedModel:
    """Every B drawn anew: new adapters do nothing, since their B is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(family: str, make: Make = tiny_causal_lm, **section: Any) -> PreTrainedModel:
    model = make(family)
    add_lora(model, LoRASection(**{"rank": 3, **section}), SEED, "sft.lora")
    return draw_adapters(model)


def outputs(model: torch.nn.Module) -> Tensor:
    ids, mask = right_padded([[t if t != PAD else 7 for t in row] for row in ragged_ids(8, [9, 3, 6])])
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=mask.long()).logits
    return found


def bits(model: PreTrainedModel, part: str) -> dict[str, Tensor]:
    """Copies of the parameters whose names hold `part`."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if part in name}


def trainable(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# -------------------------------------------------------------------------------------------------------- adding them


@pytest.mark.parametrize("family", CONFIGS)
def test_new_adapters_change_nothing_but_the_layers_of_the_blocks(family: str) -> None:
    model, plain = tiny_causal_lm(family), tiny_causal_lm(family)
    before = outputs(model)
    add_lora(model, LoRASection(rank=3), SEED, "sft.lora")
    assert type(model) is type(plain)
    assert type(model.base_model) is type(plain.base_model)
    assert type(model.get_output_embeddings()) is type(plain.get_output_embeddings())
    assert torch.equal(outputs(model), before)
    layers = {name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    assert {name.rpartition(".")[2] for name in layers} == LAYERS[family]
    copies = 3 if family == "gpt2" else len(LAYERS[family])  # c_proj is the name of two layers
    assert len(layers) == 2 * (copies + (family == "gpt2"))
    assert trainable(model) == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert has_lora(model)
    assert not has_lora(plain)


@pytest.mark.parametrize("family", SCALAR_FAMILIES)
def test_a_score_head_stays_trainable(family: str) -> None:
    model = adapted(family, tiny_scalar_model)
    assert {name for name in trainable(model) if ".lora_" not in name} == {"score.weight"}
    assert len(trainable(model)) == 2 * sum(isinstance(m, AdaptedLinear) for m in model.modules()) + 1


def test_rank_0_leaves_the_model_alone() -> None:
    model = tiny_causal_lm("opt")
    add_lora(model, LoRASection(target_modules=["nothing of the kind"]), SEED, "sft.lora")
    assert not has_lora(model)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_adapters_are_drawn_from_the_seed_and_from_nothing_else() -> None:
    found = []
    for global_seed, seed in ((0, SEED), (1, SEED), (0, SEED + 1)):
        model = tiny_causal_lm("llama")
        torch.manual_seed(global_seed)
        expected = torch.rand(3)
        torch.manual_seed(global_seed)
        add_lora(model, LoRASection(rank=3), seed, "sft.lora")
        assert torch.equal(torch.rand(3), expected)
        found.append(bits(model, ".lora_A."))
        assert not any(weight.any() for weight in bits(model, ".lora_B.").values())
    first, again, other = found
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    draws = torch.cat([weight.flatten() for name, weight in first.items() if "down_proj" not in name])
    bound = 32**-0.5  # uniform, 12 matrices [3, 32]: 1152 draws
    assert float(draws.abs().max()) == pytest.approx(bound, rel=0.02)
    assert float(draws.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("family", "names", "expected"),
    [
        ("llama", ["q_proj", "v_proj"], {"self_attn.q_proj", "self_attn.v_proj"}),
        ("llama", ["mlp.up_proj"], {"mlp.up_proj"}),
        ("gpt2", ["attn.c_proj"], {"attn.c_proj"}),
        ("gpt2", ["c_proj"], {"attn.c_proj", "mlp.c_proj"}),
        ("opt", ["layers.1.fc1"], {"1.fc1"}),
        ("llama", ["layers.*.q_proj"], {"self_attn.q_proj"}),
        ("llama", ["*attn*"], {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}),
        ("llama", ["[qv]_proj", "down_*"], {"self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"}),
        ("opt", ["fc?"], {"0.fc1", "0.fc2", "1.fc1", "1.fc2"}),
        ("gpt2", ["h.[!1].*.c_*"], {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    ],
)
def test_names_and_patterns_choose_layers_by_their_ends(family: str, names: list[str], expected: set[str]) -> None:
    model = adapted(family, target_modules=names)
    layers = [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    assert {".".join(name.split(".")[-2:]) for name in layers} == expected
    in_one_block = "1." in names[0] or "!1" in names[0] or names == ["fc?"]
    assert len(layers) == (1 if in_one_block else 2) * len(expected)


@pytest.mark.parametrize(
    ("family", "names", "wrong"),
    [
        ("opt", ["query"], "query"),
        ("opt", ["q_proj", "proj"], "proj"),  # a part of a name is no end of it
        ("opt-350m", ["project_in"], "project_in"),
        ("llama", ["lm_head"], "lm_head"),
        ("llama", [""], ""),
        ("llama", ["input_layernorm"], "input_layernorm"),
        ("llama", ["q_proj", "lm_*"], "lm_*"),
        ("llama", ["layers.7.*"], "layers.7.*"),
        ("llama", ["_proj*"], "_proj*"),
        ("llama", ["Q_PROJ"], "Q_PROJ"),
        ("opt-350m", ["project_*"], "project_*"),
    ],
)
def test_a_name_that_fits_nothing_is_refused_with_those_that_would(family: str, names: list[str], wrong: str) -> None:
    model = tiny_causal_lm(family)
    with pytest.raises(ConfigError) as caught:
        add_lora(model, LoRASection(rank=2, target_modules=names), SEED, "ppo.actor_lora")
    message = str(caught.value)
    assert message.startswith(f"ppo.actor_lora.target_modules = {names}: ")
    assert repr(wrong) in message
    assert all(name in message for name in LAYERS[family])
    assert "\n" not in message
    assert not has_lora(model)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_a_model_without_blocks_has_nothing_to_adapt() -> None:
    with pytest.raises(ConfigError, match=r"^sft\.lora\.rank = 2: OPTForCausalLM has no linear layers in blocks"):
        add_lora(tiny_causal_lm("opt", num_hidden_layers=0), LoRASection(rank=2), SEED, "sft.lora")


def test_dropout_acts_in_training_only_and_on_the_adapters_only() -> None:
    model = tiny_causal_lm("opt")
    set_dropout(model, 0.0)
    add_lora(model, LoRASection(rank=3, dropout=0.5), SEED, "sft.lora")
    draw_adapters(model)
    expected = outputs(model)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(outputs(model), outputs(model))
    with adapters_off(model):
        assert torch.equal(outputs(model), outputs(model))
    model.eval()
    assert torch.equal(outputs(model), expected)


# --------------------------------------------------------------------------------------------------- what they compute


def peft_model(model: PreTrainedModel, plain: PreTrainedModel, alpha: int) -> Any:
    """peft's own wrapper around `plain`, with the adapters of `model`."""
    layers = [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=layers))
    theirs = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, weight in bits(model, ".lora_").items():
            theirs[f"base_model.model.{name}"].copy_(weight)
    return wrapped.eval()


@pytest.mark.parametrize(("family", "alpha"), [("opt", 0), *((family, 5) for family in CONFIGS)])
def test_the_forward_pass_and_the_merge_are_those_of_peft(family: str, alpha: int) -> None:
    """Logits and merged weights to 1e-6 relative to their size; alpha 0 is twice the rank."""
    model, plain = adapted(family, alpha=alpha), tiny_causal_lm(family)
    names = list(plain.state_dict())
    with_adapters, without = outputs(model), outputs(plain)
    theirs = peft_model(model, plain, alpha or 6)
    size = float(with_adapters.abs().max())
    torch.testing.assert_close(with_adapters, outputs(theirs), atol=1e-6 * size, rtol=0)
    assert float((with_adapters - without).abs().max()) > 1e-2 * size
    ours, merged = merged_state_dict(model), theirs.merge_and_unload().state_dict()
    assert list(ours) == names
    assert ours.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("family", "layer"), [("llama", "mlp.up_proj"), ("gpt2", "mlp.c_fc"), ("gpt2", "attn.c_proj")])
def test_a_layer_is_the_formula(family: str, layer: str) -> None:
    """(W + alpha / rank * B A) x + b in float64, to 1e-5, from the adapted layer and from its merged weight."""
    model = adapted(family, target_modules=[layer], alpha=7)
    module: Any = next(module for module in model.modules() if isinstance(module, AdaptedLinear))
    weight, bias = module.base_layer.weight.double(), module.base_layer.bias
    if family == "gpt2":
        weight = weight.T  # Conv1D's is [in, out]
    a, b = (factors["default"].weight.double() for factors in (module.lora_A, module.lora_B))
    out_features, in_features = weight.shape
    assert (a.shape, b.shape) == ((3, in_features), (out_features, 3))
    x = torch.randn(5, in_features, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ (weight + 7 / 3 * b @ a).T + (0 if bias is None else bias.double())
    torch.testing.assert_close(module(x).double(), expected, atol=1e-5, rtol=0)
    merged = merged_weight(module)
    assert merged.shape == module.base_layer.weight.shape
    product = x @ (merged if family == "gpt2" else merged.T) + (0 if bias is None else bias)
    torch.testing.assert_close(product.double(), expected, atol=1e-5, rtol=0)


def test_the_weight_of_a_layer_without_an_adapter_is_its_own() -> None:
    model = adapted("llama")
    assert merged_weight(model.lm_head).data_ptr() == model.lm_head.weight.data_ptr()


def test_only_the_chosen_weights_are_new_and_their_difference_has_the_rank() -> None:
    model, plain = adapted("qwen2", target_modules=["q_proj", "down_proj"]), tiny_causal_lm("qwen2")
    merged, start = merged_state_dict(model), plain.state_dict()
    changed = {name for name in start if not torch.equal(merged[name], start[name])}
    assert changed == {name for name in start if name.endswith(("q_proj.weight", "down_proj.weight"))}
    for name in changed:
        difference = merged[name].double() - start[name].double()
        assert int(torch.linalg.matrix_rank(difference, rtol=1e-4)) == 3


def test_half_precision_weights_get_float32_adapters_and_are_rounded_once() -> None:
    model = tiny_causal_lm("llama").bfloat16()
    add_lora(model, LoRASection(rank=3), SEED, "sft.lora")
    draw_adapters(model)
    assert {(".lora_" in name, p.dtype) for name, p in model.named_parameters()} == {
        (True, torch.float32),
        (False, torch.bfloat16),
    }
    assert outputs(model).dtype == torch.bfloat16
    module: Any = next(module for module in model.modules() if isinstance(module, AdaptedLinear))
    a, b = (factors["default"].weight for factors in (module.lora_A, module.lora_B))
    expected = (module.base_layer.weight.double() + 2.0 * b.double() @ a.double()).bfloat16()
    equal = merged_weight(module) == expected  # a tie may fall the other way in float32
    assert float(equal.float().mean()) > 0.99
    torch.testing.assert_close(merged_weight(module), expected, atol=0, rtol=2**-7)


def test_under_autocast_the_merged_weight_is_still_float32() -> None:
    model = adapted("llama")
    module = next(module for module in model.modules() if isinstance(module, AdaptedLinear))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = merged_weight(module)
    assert torch.equal(inside, merged_weight(module))


def test_the_live_weights_are_bit_identical_after_a_thousand_merges() -> None:
    model = adapted("opt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = merged_state_dict(model)
    for _ in range(1000):
        last = merged_state_dict(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(last[name], first[name]) for name in first)


# ----------------------------------------------------------------------------------------------------- switching off


@pytest.mark.parametrize(("family", "make"), [("opt", tiny_causal_lm), ("gpt2", tiny_scalar_model)])
def test_off_is_the_model_from_before_bit_for_bit(family: str, make: Make) -> None:
    plain, model = make(family), adapted(family, make)
    without, with_adapters = outputs(plain), outputs(model)
    assert not torch.equal(without, with_adapters)
    for _ in range(3):
        with adapters_off(model):
            assert torch.equal(outputs(model), without)
            with adapters_off(model):
                assert torch.equal(outputs(model), without)
            assert torch.equal(outputs(model), without)  # the inner block does not switch them on
        assert torch.equal(outputs(model), with_adapters)


def test_they_are_on_again_after_an_exception() -> None:
    model = adapted("llama")
    expected = outputs(model)
    with pytest.raises(KeyboardInterrupt), adapters_off(model), adapters_off(model):
        raise KeyboardInterrupt
    assert torch.equal(outputs(model), expected)


def test_switching_leaves_what_is_trainable_and_the_gradients_alone() -> None:
    model = adapted("llama")
    frozen = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    model.get_parameter(frozen).requires_grad_(False)
    before, ids = trainable(model), torch.tensor([[5, 6, 7]])

    def gradients(switch: bool) -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(input_ids=ids).logits.square().mean()
        if switch:
            with adapters_off(model), torch.no_grad():
                model(input_ids=ids)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, switched = gradients(False), gradients(True)
    assert trainable(model) == before == plain.keys() == switched.keys()
    assert frozen not in before
    assert all(torch.equal(plain[name], switched[name]) for name in plain)


def test_of_a_model_without_adapters_nothing_is_switched() -> None:
    model = tiny_causal_lm("llama")
    expected = outputs(model)
    with adapters_off(model):
        assert torch.equal(outputs(model), expected)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


# -------------------------------------------------------------------------------------------------------------- saving


def save(model: PreTrainedModel, directory: Path) -> Path:
    save_model(model, tiny_tokenizer(), directory, frozenset({EOS}), PAD)
    return directory


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_saved_is_a_plain_model_that_computes_the_same(family: str, tmp_path: Path) -> None:
    save(tiny_causal_lm(family), tmp_path / "plain")
    model = adapted(family, lambda _: load_causal_lm(str(tmp_path / "plain")))
    save(model, tmp_path / "adapted")
    stored, usual = (load_file(tmp_path / name / "model.safetensors") for name in ("adapted", "plain"))
    assert {name: tensor.shape for name, tensor in stored.items()} == {name: t.shape for name, t in usual.items()}
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("adapted", "plain")]
    assert files[0] == files[1] | {"adapter"}
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "adapted" / name).read_text() == (tmp_path / "plain" / name).read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapted")
    assert not has_lora(loaded)
    live = outputs(model)
    size = max(1.0, float(live.abs().max()))
    torch.testing.assert_close(outputs(loaded), live, atol=1e-5 * size, rtol=0)
    torch.testing.assert_close(outputs(load_causal_lm(str(tmp_path / "adapted"))), live, atol=1e-5 * size, rtol=0)


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_a_saved_reward_model_scores_the_same(family: str, tmp_path: Path) -> None:
    model = adapted(family, tiny_scalar_model)
    save(model, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    live = outputs(model)
    torch.testing.assert_close(outputs(loaded), live, atol=1e-5 * max(1.0, float(live.abs().max())), rtol=0)
    assert torch.equal(load_scalar_model(str(tmp_path)).score.weight, model.score.weight)


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "bloom"])
def test_the_adapters_alone_load_with_peft_on_the_base_model(family: str, tmp_path: Path) -> None:
    save(adapted(family), tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_causal_lm(family), tmp_path / "adapter")
    torch.testing.assert_close(outputs(theirs), outputs(adapted(family)), atol=1e-5, rtol=1e-5)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(LAYERS[family])
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (3, 6, "CAUSAL_LM")


def test_the_adapters_of_a_reward_model_come_with_its_head(tmp_path: Path) -> None:
    model = adapted("llama", tiny_scalar_model)
    with torch.no_grad():
        model.score.weight.mul_(3)
    save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_scalar_model("llama"), tmp_path / "adapter")
    torch.testing.assert_close(outputs(theirs), outputs(model), atol=1e-5, rtol=1e-5)


def test_layers_that_share_their_last_name_with_others_are_written_in_full(tmp_path: Path) -> None:
    model = adapted("gpt2", target_modules=["attn.c_proj"])
    save(model, tmp_path)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]
    theirs = peft.PeftModel.from_pretrained(tiny_causal_lm("gpt2"), tmp_path / "adapter")
    torch.testing.assert_close(outputs(theirs), outputs(model), atol=1e-5, rtol=1e-5)


def test_layers_chosen_by_a_pattern_are_written_by_name(tmp_path: Path) -> None:
    """peft would read a pattern in another way."""
    model = adapted("llama", target_modules=["layers.1.*attn*"])
    save(model, tmp_path)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == [f"model.layers.1.self_attn.{n}_proj" for n in "koqv"]
    theirs = peft.PeftModel.from_pretrained(tiny_causal_lm("llama"), tmp_path / "adapter")
    torch.testing.assert_close(outputs(theirs), outputs(model), atol=1e-5, rtol=1e-5)


def test_tied_embeddings_are_stored_once(tmp_path: Path) -> None:
    model = adapted("opt")
    merged = merged_state_dict(model)
    assert merged["lm_head.weight"].data_ptr() == merged["model.decoder.embed_tokens.weight"].data_ptr()
    stored = load_file(save(model, tmp_path) / "model.safetensors")
    assert sum(tensor.shape == (40, 32) for tensor in stored.values()) == 1


def test_saving_leaves_the_model_as_it_is_and_can_be_repeated(tmp_path: Path) -> None:
    model = adapted("llama")
    before, expected = copy.deepcopy(model.state_dict()), outputs(model)
    for name in ("first", "second"):
        save(model, tmp_path / name)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("load", [load_causal_lm, load_scalar_model])
def test_adapters_alone_are_refused_where_a_model_is_wanted(
    load: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    save(adapted("llama"), tmp_path)
    with pytest.raises(CheckpointError, match=r"adapter: holds adapters \(LoRA\); merge them"):
        load(str(tmp_path / "adapter"))
    (tmp_path / "adapter_config.json").write_bytes((tmp_path / "adapter" / "adapter_config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"holds adapters \(LoRA\); merge them"):
        load(str(tmp_path))


def test_adapters_from_the_hub_are_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would load their base model and put them on it; here from a cache laid out as the Hub's."""
    plain = save(tiny_causal_lm("llama"), tmp_path / "plain")
    model = load_causal_lm(str(plain))
    add_lora(model, LoRASection(rank=2), SEED, "sft.lora")
    save(model, tmp_path / "adapted")
    repository = tmp_path / "cache" / "models--someone--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tmp_path / "adapted" / "adapter", repository / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert has_lora(AutoModelForCausalLM.from_pretrained("someone/adapter"))
    with pytest.raises(CheckpointError, match=r"someone/adapter: holds adapters \(LoRA\)"):
        load_causal_lm("someone/adapter")
