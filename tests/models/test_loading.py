"""Checkpoints in and out: what is refused, and that what is saved means the same to transformers alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

from tests.models.families_under_test import (
    BOS,
    CONFIGS,
    EOS,
    PAD,
    SECOND_STOP,
    VOCAB,
    ragged_ids,
    right_padded,
    tiny_causal_lm,
    tiny_scalar_model,
    tiny_tokenizer,
)
from threefold.errors import CheckpointError
from threefold.models.forward import answer_scores
from threefold.models.loading import (
    context_length,
    generation_stop_ids,
    grow_embeddings,
    load_causal_lm,
    load_config,
    load_scalar_model,
    load_tokenizer,
    save_model,
    score_statistics,
    set_dropout,
    set_score_statistics,
)

SCALAR_FAMILIES = [family for family in CONFIGS if family != "cohere"]  # transformers has no classifier for it


def save(model: PreTrainedModel, directory: Path, stops: frozenset[int] = frozenset({EOS, SECOND_STOP})) -> Path:
    save_model(model, tiny_tokenizer(), directory, stops, PAD)
    return directory


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_causal_lm("llama"), tmp_path_factory.mktemp("saved") / "llama")


@pytest.fixture
def llama(saved_llama: Path, tmp_path: Path) -> Path:
    """A saved model that a test may damage."""
    return Path(shutil.copytree(saved_llama, tmp_path / "llama"))


def change_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --------------------------------------------------------------------------------------------------- what is refused

LOADERS: list[Callable[[str], object]] = [
    load_config,
    load_tokenizer,
    load_causal_lm,
    load_scalar_model,
    generation_stop_ids,
]


@pytest.mark.parametrize("load", LOADERS)
def test_a_place_that_holds_no_checkpoint(load: Callable[[str], object], tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("")
    refusals = {
        str(tmp_path / "absent"): "no such directory",
        "./absent": "no such directory",
        "": "no such directory",
        str(tmp_path): "no config.json in this directory",
        str(file): "is a file; give the checkpoint's directory",
        "nobody/has-this-model": "no such directory, and the Hub gave no .* of that name",
        "no such name": "no such directory, and the Hub gave no .* of that name",
    }
    for source, message in refusals.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            load(source)
        assert source in str(caught.value)
        assert "\n" not in str(caught.value)


def cut_file(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-200])


def empty_file(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def overwritten_file(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"not a tensor in sight " * 50)


def absent_file(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def absent_shard(directory: Path) -> None:
    absent_file(directory)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def overwritten_pickle(directory: Path) -> None:
    absent_file(directory)
    (directory / "pytorch_model.bin").write_bytes(b"not a pickle either " * 50)


def empty_pickle(directory: Path) -> None:
    absent_file(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")


def cut_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "llama", ')


def unknown_kind(directory: Path) -> None:
    change_json(directory / "config.json", model_type="a-model-of-next-year")


def field_of_another_type(directory: Path) -> None:
    change_json(directory / "config.json", hidden_size="wide")


def fields_that_contradict(directory: Path) -> None:
    change_json(directory / "config.json", num_attention_heads=5)


@pytest.mark.parametrize(
    "damage",
    [
        cut_file, empty_file, overwritten_file, absent_file, absent_shard, overwritten_pickle, empty_pickle,
        cut_config, unknown_kind, field_of_another_type, fields_that_contradict,
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_gives_one_line(damage: Callable[[Path], None], llama: Path) -> None:
    damage(llama)
    for load in (load_causal_lm, lambda source: load_scalar_model(source, new_head_seed=0)):
        with pytest.raises(CheckpointError, match=r"cannot load the (causal language|reward) model: \S+") as caught:
            load(str(llama))
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(llama))


def test_weights_that_are_missing_are_named_instead_of_left_random(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights are not .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(str(llama))
    with pytest.raises(CheckpointError, match=r"1 weights are not .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load_scalar_model(str(llama), new_head_seed=0)


def test_weights_of_another_shape_are_named(llama: Path) -> None:
    change_json(llama / "config.json", vocab_size=VOCAB + 1)
    with pytest.raises(CheckpointError, match=r"weight lm_head\.weight has shape \(40, 32\), .* asks for \(41, 32\)"):
        load_causal_lm(str(llama))


def test_a_causal_model_is_no_reward_model(saved_llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"1 weights are not in the checkpoint .* score\.weight"):
        load_scalar_model(str(saved_llama))


def test_a_reward_model_without_its_head_weights_is_no_causal_model(tmp_path: Path) -> None:
    directory = save(tiny_scalar_model("llama"), tmp_path / "reward")
    with pytest.raises(CheckpointError, match=r"1 weights are not in the checkpoint .* lm_head\.weight"):
        load_causal_lm(str(directory))


def test_a_model_without_a_score_head_is_refused_as_reward_model(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="BertForSequenceClassification has no `score` head"):
        load_scalar_model(str(tmp_path))


def test_a_tokenizer_that_is_not_there(llama: Path) -> None:
    (llama / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot load the tokenizer"):
        load_tokenizer(str(llama))
    for file in llama.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(str(llama))


# --------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_causal_model_is_the_same_to_transformers(family: str, tmp_path: Path) -> None:
    model = tiny_causal_lm(family)
    save(model, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model)
    loaded = load_causal_lm(str(tmp_path / "model"))
    assert same_weights(loaded, model)
    assert not loaded.training


@pytest.mark.parametrize("family", SCALAR_FAMILIES)
def test_a_saved_reward_model_scores_the_same_in_transformers(family: str, tmp_path: Path) -> None:
    model = tiny_scalar_model(family)
    set_score_statistics(model, -0.75, 2.5)
    save(model, tmp_path / "reward")
    sequences = [[token if token != PAD else 7 for token in row] for row in ragged_ids(8, [9, 3, 6])]
    ids, mask = right_padded(sequences)
    with torch.no_grad():
        ours = answer_scores(model, ids, mask.sum(dim=1))
        for arguments in ({"num_labels": 1}, {}):
            theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", **arguments)
            logits = theirs.eval()(input_ids=ids, attention_mask=mask.long()).logits
            torch.testing.assert_close(logits[:, 0], ours, atol=1e-5, rtol=0)
    loaded = load_scalar_model(str(tmp_path / "reward"))
    assert same_weights(loaded, model)
    assert score_statistics(loaded) == (-0.75, 2.5)
    assert not loaded.training


def test_the_tokenizer_and_its_template_are_saved_too(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_model(tiny_causal_lm("opt"), tokenizer, tmp_path, frozenset({EOS}), PAD)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("w7 w9 </s>").input_ids == [7, 9, EOS]
    assert theirs.chat_template == tokenizer.chat_template
    assert theirs.pad_token_id == PAD
    assert load_tokenizer(str(tmp_path)).padding_side == "right"


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    model = tiny_causal_lm("opt")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.shape == (VOCAB, 32) for tensor in stored.values()) == 1
    loaded = load_causal_lm(str(tmp_path))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert same_weights(loaded, model)


def test_weights_in_half_precision_are_loaded_as_float32(tmp_path: Path) -> None:
    save(tiny_causal_lm("llama").bfloat16(), tmp_path)
    assert {parameter.dtype for parameter in load_causal_lm(str(tmp_path)).parameters()} == {torch.float32}
    assert {p.dtype for p in load_scalar_model(str(tmp_path), new_head_seed=0).parameters()} == {torch.float32}


def test_an_older_checkpoint_with_a_pickle_loads(llama: Path) -> None:
    model = load_causal_lm(str(llama))
    (llama / "model.safetensors").unlink()
    torch.save(model.state_dict(), llama / "pytorch_model.bin")
    assert same_weights(load_causal_lm(str(llama)), model)


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_new_score_head_is_normal_repeatable_and_all_that_is_new(family: str, tmp_path: Path) -> None:
    causal = tiny_causal_lm(family)
    save(causal, tmp_path)
    first, second, other = (load_scalar_model(str(tmp_path), new_head_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.score.weight, second.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    assert first.score.weight.shape == (1, 32)
    draws = torch.cat([load_scalar_model(str(tmp_path), new_head_seed=s).score.weight.flatten() for s in range(12)])
    # 384 draws: the standard deviation is known to about 4 %.
    assert float(draws.detach().std()) * math.sqrt(33) == pytest.approx(1.0, abs=0.15)
    for name, weight in causal.base_model.state_dict().items():
        assert torch.equal(first.base_model.state_dict()[name], weight)
    assert score_statistics(first) == (0.0, 1.0)


def test_a_new_head_forgets_the_statistics_of_the_old_one(tmp_path: Path) -> None:
    model = tiny_scalar_model("llama")
    set_score_statistics(model, 3.0, 2.0)
    save(model, tmp_path)
    assert score_statistics(load_scalar_model(str(tmp_path))) == (3.0, 2.0)
    assert score_statistics(load_scalar_model(str(tmp_path), new_head_seed=0)) == (0.0, 1.0)


def test_loading_draws_nothing_from_the_global_generator_for_the_new_head(saved_llama: Path) -> None:
    torch.manual_seed(0)
    first = load_scalar_model(str(saved_llama), new_head_seed=5)
    torch.manual_seed(99)
    assert same_weights(load_scalar_model(str(saved_llama), new_head_seed=5), first)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_cannot_be_divided_by_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be positive"):
        set_score_statistics(tiny_scalar_model("opt"), 0.0, scale)


# ------------------------------------------------------------------------------------------------------------ stop ids


def test_stop_ids_survive_saving_as_a_list(tmp_path: Path) -> None:
    save(tiny_causal_lm("llama"), tmp_path, frozenset({SECOND_STOP, EOS, BOS}))
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [BOS, EOS, SECOND_STOP]
    assert generation_stop_ids(str(tmp_path)) == (BOS, EOS, SECOND_STOP)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.eos_token_id == [BOS, EOS, SECOND_STOP]
    save(load_causal_lm(str(tmp_path)), tmp_path / "again", frozenset(generation_stop_ids(str(tmp_path))))
    assert generation_stop_ids(str(tmp_path / "again")) == (BOS, EOS, SECOND_STOP)


def test_where_stop_ids_come_from(llama: Path) -> None:
    file = llama / "generation_config.json"
    change_json(file, eos_token_id=7)
    assert generation_stop_ids(str(llama)) == (7,)
    change_json(file, eos_token_id=None)
    assert generation_stop_ids(str(llama)) == (EOS,)  # config.json's
    file.unlink()
    assert generation_stop_ids(str(llama)) == (EOS,)
    change_json(llama / "config.json", eos_token_id=[5, 6])
    assert generation_stop_ids(str(llama)) == (5, 6)
    change_json(llama / "config.json", eos_token_id=None)
    assert generation_stop_ids(str(llama)) == ()


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [2, null]}'])
def test_a_damaged_generation_config_is_no_reason_to_stop_elsewhere(text: str, llama: Path) -> None:
    (llama / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        generation_stop_ids(str(llama))


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260K", "babyllama-char-1M"])
def test_real_checkpoints(shared: Path, name: str, tmp_path: Path) -> None:
    source = str(shared / "models" / name)
    assert generation_stop_ids(source) == (1, 2)
    model, tokenizer = load_causal_lm(source), load_tokenizer(source)
    save_model(model, tokenizer, tmp_path, frozenset({1, 2}), 0)
    assert generation_stop_ids(str(tmp_path)) == (1, 2)
    assert same_weights(load_causal_lm(str(tmp_path)), model)
    assert context_length(model) == {"stories260K": 512, "babyllama-char-1M": 256}[name]
    assert load_scalar_model(source, new_head_seed=0).score.weight.shape[0] == 1


# --------------------------------------------------------------------------------------- context, dropout, vocabulary


def test_context_length() -> None:
    found = {family: context_length(tiny_causal_lm(family)) for family in CONFIGS}
    assert found.pop("bloom") is None
    assert set(found.values()) == {64}


@pytest.mark.parametrize("family", CONFIGS)
def test_without_dropout_training_mode_computes_what_eval_mode_does(family: str) -> None:
    """Whatever is random there: modules, functional dropout, numbers read from the config, dropped layers."""
    model = tiny_causal_lm(family)
    ids, mask = right_padded(ragged_ids(3, [9, 4]))

    def logits() -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask.long()).logits.detach()  # type: ignore[no-any-return]

    def is_random() -> bool:
        first = logits()
        return any(not torch.equal(logits(), first) for _ in range(5))

    torch.manual_seed(0)
    expected = logits()
    model.train()
    assert is_random()  # there is something to turn off
    set_dropout(model, 0.0)
    for _ in range(3):
        torch.testing.assert_close(logits(), expected, atol=1e-6, rtol=0)
    set_dropout(model, 0.5)
    assert is_random()
    model.eval()
    torch.testing.assert_close(logits(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["opt", "llama", "falcon"])
def test_dropout_of_one_probability_everywhere(family: str) -> None:
    model = tiny_causal_lm(family)
    set_dropout(model, 0.125)
    modules = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    numbers = [
        value
        for holder in (model.config, *model.modules())
        for name, value in vars(holder).items()
        if name.endswith("dropout") and isinstance(value, int | float)
    ]
    assert set(modules + numbers) == {0.125}
    # A layer that is left out whole is no dropout: it stays out of training, whatever the checkpoint's config says.
    assert {value for m in model.modules() for name, value in vars(m).items() if name == "layerdrop"} <= {0.0}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_new", [1, 3])
def test_new_tokens_start_at_the_mean_of_the_old(tied: bool, num_new: int) -> None:
    model = tiny_causal_lm("llama", tie_word_embeddings=tied)
    tokenizer = tiny_tokenizer()
    old_input = model.get_input_embeddings().weight.detach().clone()
    old_output = model.get_output_embeddings().weight.detach().clone()
    assert torch.equal(old_input, old_output) == tied
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(input_ids=ids).logits.detach()

    tokenizer.add_tokens([f"<new{index}>" for index in range(num_new)])
    grow_embeddings(model, tokenizer)
    assert model.config.vocab_size == VOCAB + num_new
    for embedding, old in (
        (model.get_input_embeddings(), old_input),
        (model.get_output_embeddings(), old_output),
    ):
        assert embedding.weight.shape == (VOCAB + num_new, 32)
        assert torch.equal(embedding.weight[:VOCAB], old)
        for row in embedding.weight[VOCAB:]:
            torch.testing.assert_close(row, old.mean(dim=0), atol=1e-6, rtol=0)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    after = model(input_ids=ids).logits
    torch.testing.assert_close(after[..., :VOCAB], before, atol=1e-5, rtol=0)
    # A mean row's logit is the mean logit: at most as likely as the average token.
    torch.testing.assert_close(
        after[..., VOCAB:], before.mean(dim=-1, keepdim=True).expand(-1, -1, num_new), atol=1e-5, rtol=0
    )


def test_a_vocabulary_with_room_does_not_grow(tmp_path: Path) -> None:
    model = tiny_causal_lm("llama")
    grow_embeddings(model, tiny_tokenizer())
    grow_embeddings(model, tiny_tokenizer(VOCAB - 5))  # many checkpoints pad their embeddings to a round number
    assert model.config.vocab_size == VOCAB
    assert same_weights(model, tiny_causal_lm("llama"))


def test_a_grown_reward_model_saves_and_loads(tmp_path: Path) -> None:
    model, tokenizer = tiny_scalar_model("opt"), tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    grow_embeddings(model, tokenizer)
    save_model(model, tokenizer, tmp_path, frozenset({EOS}), tokenizer.pad_token_id)
    loaded = load_scalar_model(str(tmp_path))
    assert same_weights(loaded, model)
    assert loaded.config.pad_token_id == VOCAB
