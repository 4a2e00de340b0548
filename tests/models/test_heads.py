"""A language-model head that is trained beside adapters: tied or not, off and on, saved both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models.families_under_test import CONFIGS, EOS, PAD, ragged_ids, tiny_causal_lm, tiny_scalar_model
from tests.models.families_under_test import tiny_tokenizer as tokenizer
from threefold.config.recipe import LoRASection
from threefold.errors import ConfigError
from threefold.models.adapters import adapters_off, add_lora, check_lora, merged_state_dict
from threefold.models.forward import CausalForward
from threefold.models.heads import TrainedHead
from threefold.models.loading import load_causal_lm, save_model

# What peft warns of when it loads.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to", "ignore:.*tie_word_embeddings.*")

SECTION = LoRASection(rank=2, train_heads=True)
IDS = torch.tensor(ragged_ids(8, [9, 9]))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def trained(family: str, **changes: Any) -> PreTrainedModel:
    """A model after a few large optimizer steps of its adapters and head."""
    model = tiny_causal_lm(family, **changes)
    add_lora(model, SECTION, 7, "sft.lora")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


def head_name(model: PreTrainedModel) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


@pytest.mark.parametrize("family", CONFIGS)
def test_the_head_is_trained_and_the_embeddings_are_not(family: str) -> None:
    before, model = tiny_causal_lm(family), tiny_causal_lm(family)
    add_lora(model, SECTION, 7, "sft.lora")
    assert torch.equal(logits(model), logits(before))
    others = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    head = head_name(model)
    assert others == {f"{head}.{name}" for name, _ in before.get_output_embeddings().named_parameters()}
    after = trained(family)
    assert torch.equal(after.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert not torch.equal(after.get_output_embeddings().weight, before.get_output_embeddings().weight)


@pytest.mark.parametrize("family", ["opt", "opt-350m", "gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_off_is_the_model_from_before_bit_for_bit(family: str, tied: bool) -> None:
    plain, model = (make(family, tie_word_embeddings=tied) for make in (tiny_causal_lm, trained))
    with adapters_off(model):
        assert torch.equal(logits(model), logits(plain))
        with adapters_off(model):
            assert torch.equal(logits(model), logits(plain))
        assert torch.equal(logits(model), logits(plain))
    assert not torch.allclose(logits(model), logits(plain), atol=1e-2)
    with pytest.raises(KeyboardInterrupt), adapters_off(model):
        raise KeyboardInterrupt
    assert not torch.allclose(logits(model), logits(plain), atol=1e-2)


def test_what_a_tied_head_was_takes_no_memory() -> None:
    model = trained("opt", tie_word_embeddings=True)
    head = model.get_output_embeddings()
    assert isinstance(head, TrainedHead)
    assert head.untrained_weight is model.get_input_embeddings().weight
    assert not head.untrained_weight.requires_grad
    twin = copy.deepcopy(model)
    assert twin.get_output_embeddings().untrained_weight is twin.get_input_embeddings().weight
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_forward_passes_by_role_see_the_head_that_is_on(family: str) -> None:
    plain, model = CausalForward(tiny_causal_lm(family)), CausalForward(trained(family))
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[:, 0] = False

    def logprobs(forward: CausalForward) -> Tensor:
        with torch.no_grad():
            return forward.target_logprobs(IDS, mask)[0]

    expected = torch.log_softmax(logits(model.model), -1)[:, :-1].gather(-1, IDS[:, 1:, None]).flatten()
    torch.testing.assert_close(logprobs(model), expected, atol=1e-5, rtol=0)
    with adapters_off(model.model):
        assert torch.equal(logprobs(model), logprobs(plain))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_saved_merged_and_with_the_adapters(family: str, tied: bool, tmp_path: Path) -> None:
    """transformers loads the one, peft the other on the model from before."""
    model = trained(family, tie_word_embeddings=tied)
    live = logits(model)
    size = max(1.0, float(live.abs().max()))
    merged = merged_state_dict(model)
    assert merged.keys() == tiny_causal_lm(family).state_dict().keys()
    save_model(model, tokenizer(), tmp_path, frozenset({EOS}), PAD)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum("embed" in name or "lm_head" in name or "wte" in name for name in stored) >= 2
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), live, atol=1e-5 * size, rtol=0)
    torch.testing.assert_close(logits(load_causal_lm(str(tmp_path))), live, atol=1e-5 * size, rtol=0)
    base = tiny_causal_lm(family, tie_word_embeddings=tied)
    embeddings = base.get_input_embeddings().weight.detach().clone()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs), live, atol=1e-5 * size, rtol=0)
    assert torch.equal(base.get_input_embeddings().weight, embeddings)


def test_a_score_head_needs_no_word(tmp_path: Path) -> None:
    models = [tiny_scalar_model("llama") for _ in range(2)]
    for model, train_heads in zip(models, (True, False), strict=True):
        add_lora(model, LoRASection(rank=2, train_heads=train_heads), 7, "reward.lora")
    one, two = ({name for name, p in model.named_parameters() if p.requires_grad} for model in models)
    assert one == two
    assert "score.weight" in one


def test_a_model_without_a_linear_head_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_causal_lm("llama")
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda _: None)
    with pytest.raises(ConfigError, match=r"^sft\.lora\.train_heads = true: LlamaForCausalLM has no linear"):
        check_lora(model, SECTION, "sft.lora")
