"""What a user can get wrong: exit code 2 and one line that names the field, file or row and says what to do.

Each case is a command line; afterwards nothing that was finished may be gone.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.tiny import copy_of, file_stamps, pair_rows, train, write_rows
from threefold import cli

Complain = Callable[..., str]


@pytest.fixture
def complaint(tiny_recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Complain:
    """Runs `threefold train` with arguments after the tiny recipe's and returns the one line that it prints."""

    def run(*arguments: str, output: Path = tmp_path / "output") -> str:
        capsys.readouterr()
        code = train(tiny_recipe_file, output, *arguments)
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.strip()]
        assert (code, len(lines)) == (2, 1), printed.err
        assert lines[0].startswith("threefold: ")
        assert "Traceback" not in printed.out + printed.err
        return lines[0]

    return run


def checkpoint_with(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a checkpoint that `change` has damaged."""
    shutil.copytree(source, target)
    change(target)
    return target


def has_all(line: str, *parts: object) -> bool:
    missing = [str(part) for part in parts if str(part) not in line]
    assert not missing, (missing, line)
    return True


# --- files and rows -------------------------------------------------------------------------------------------------


def test_a_missing_data_file(complaint: Complain, tmp_path: Path) -> None:
    assert has_all(complaint("--data.sources", str(tmp_path / "no.jsonl")), tmp_path / "no.jsonl", "no such file")


def test_a_missing_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["train", str(tmp_path / "no.toml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert has_all(line, "there is no recipe", tmp_path / "no.toml")


def test_a_missing_mixture_text(complaint: Complain, tmp_path: Path) -> None:
    line = complaint("--ppo.mixture.source", str(tmp_path / "no.txt"), "--ppo.mixture.chunk_length", "20")
    assert has_all(line, tmp_path / "no.txt", "no such file")


def test_a_text_that_is_all_held_out(complaint: Complain, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("One story.")
    text = ("--ppo.mixture.source", str(tmp_path / "short.txt"), "--ppo.mixture.chunk_length", "20")
    assert has_all(complaint(*text), "ppo.mixture.eval_documents", "lower it")


@pytest.mark.parametrize(("content", "wrong"), [("", "is empty"), ("[]", "holds no rows"), ("\n \n", "is empty")])
def test_an_empty_dataset(complaint: Complain, tmp_path: Path, content: str, wrong: str) -> None:
    (tmp_path / "empty.jsonl").write_text(content)
    line = complaint("--data.sources", str(tmp_path / "empty.jsonl"))
    assert has_all(line, tmp_path / "empty.jsonl", wrong, "at least one")


def test_a_dataset_too_small_for_the_split(complaint: Complain, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "few.jsonl", pair_rows(5))
    line = complaint("--data.sources", str(rows))
    assert has_all(line, "5 different prompts are too few for data.split [2, 4, 4]", "step 1, sft,", "give about 42")


BAD_ROWS = [
    ({"prompt": "p", "chosen": "a"}, ("'rejected'", "missing")),
    ({"prompt": "p", "chosen": "same", "rejected": "same"}, ("'chosen' and 'rejected' are the same",)),
    ({"prompt": "p", "chosen": 3, "rejected": "b"}, ("'chosen'", "a number", "must be")),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, ("'prompt' is empty",)),
    ({"prompt": "p", "chosen": "a", "rejected": " "}, ("'rejected'", "empty answer")),
]


@pytest.mark.parametrize(("row", "parts"), BAD_ROWS)
def test_a_row_that_cannot_be_used(
    complaint: Complain, tmp_path: Path, row: dict[str, object], parts: Sequence[str]
) -> None:
    rows = write_rows(tmp_path / "pairs.jsonl", [*pair_rows(20), row, *pair_rows(3)])
    line = complaint("--data.sources", str(rows))
    assert has_all(line, f"{rows} row 21", *parts, "mend the row", 'data.bad_rows = "drop"')


def test_a_row_that_is_no_json(complaint: Complain, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": }\n')
    assert has_all(complaint("--data.sources", str(tmp_path / "pairs.jsonl")), "pairs.jsonl line 2", "is not JSON")


def test_columns_that_are_not_known(complaint: Complain, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "odd.jsonl", [{"question": "q", "reply": "r"}])
    line = complaint("--data.sources", str(rows))
    mend = (
        'the nearest is question_answer (question, answer): say what yours are called with mapping = {answer = "reply"}'
    )
    assert has_all(line, f"{rows}: its columns (question, reply)", mend, "preference (prompt, chosen, rejected)")


def test_data_without_pairs(complaint: Complain, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"messages": [{"role": "user", "content": f"hi {n}"}, messages[1]]} for n in range(60)]
    line = complaint("--data.sources", str(write_rows(tmp_path / "talk.jsonl", rows)))
    assert has_all(line, "of step 2 has ranked answers", "split", "add a source")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("--data.max_prompt_length", "5"), "data.max_prompt_length = 5"),
        (("--data.max_length", "9"), "data.max_length = 9"),
    ],
)
def test_a_row_longer_than_the_limit(
    complaint: Complain, tmp_path: Path, arguments: tuple[str, ...], field: str
) -> None:
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(400))
    line = complaint("--data.sources", str(rows), "--data.long_rows", "error", *arguments)
    assert has_all(line, f"{rows} row ", f"more than {field}", 'data.long_rows = "drop"')


def test_rows_that_are_all_too_long(complaint: Complain) -> None:
    assert has_all(complaint("--data.max_length", "2"), "data.max_length = 2", "all", "raise data.max_length")


# --- lengths against the context ------------------------------------------------------------------------------------


def test_a_length_longer_than_the_context(complaint: Complain) -> None:
    assert has_all(complaint("--data.max_length", "300"), "data.max_length = 300", "288 tokens", "288 or less")


def test_a_prompt_longer_than_the_context(complaint: Complain) -> None:
    line = complaint("--data.max_prompt_length", "287")
    assert has_all(
        line, "data.max_prompt_length + ppo.sampling.max_new_tokens = 299", "288 tokens", "lower one of them"
    )


def test_a_chunk_longer_than_the_context(complaint: Complain, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(["Once upon a time. " * 20] * 70))
    line = complaint("--ppo.mixture.source", str(tmp_path / "text.txt"), "--ppo.mixture.chunk_length", "300")
    assert has_all(line, "ppo.mixture.chunk_length = 300", "288 tokens", "--ppo.mixture.chunk_length 288")


# --- checkpoints and tokenizers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["actor", "reward"])
def test_a_model_that_is_not_there(complaint: Complain, tmp_path: Path, field: str) -> None:
    assert has_all(complaint(f"--model.{field}", str(tmp_path / "no")), tmp_path / "no", "no such directory", "give")


@pytest.mark.parametrize("field", ["actor", "reward"])
def test_a_directory_that_is_no_checkpoint(complaint: Complain, tmp_path: Path, field: str) -> None:
    (tmp_path / "folder").mkdir()
    line = complaint(f"--model.{field}", str(tmp_path / "folder"))
    assert has_all(line, tmp_path / "folder", "no config.json", "save_pretrained")


def test_a_checkpoint_without_a_tokenizer(complaint: Complain, tiny_run: Path, tmp_path: Path) -> None:
    def change(directory: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (directory / name).unlink()

    model = checkpoint_with(tiny_run / "sft", tmp_path / "model", change)
    assert has_all(complaint("--model.actor", str(model)), model, "tokenizer")


def test_a_checkpoint_whose_weights_are_damaged(complaint: Complain, tiny_run: Path, tmp_path: Path) -> None:
    model = checkpoint_with(
        tiny_run / "sft", tmp_path / "model", lambda d: (d / "model.safetensors").write_bytes(b"nothing")
    )
    assert has_all(complaint("--model.actor", str(model)), model, "cannot load")


def test_a_tokenizer_without_a_pad_token(complaint: Complain, tiny_run: Path, tmp_path: Path) -> None:
    def change(directory: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(directory)

    model = checkpoint_with(tiny_run / "sft", tmp_path / "model", change)
    line = complaint("--model.actor", str(model))
    assert has_all(line, model, "no pad token", "--model.pad_token")


def test_a_tokenizer_that_pads_with_its_stop_token(complaint: Complain, tiny_run: Path, tmp_path: Path) -> None:
    def change(directory: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(directory)

    model = checkpoint_with(tiny_run / "sft", tmp_path / "model", change)
    assert has_all(complaint("--model.actor", str(model)), model, "<|end|>", "--model.pad_token")


def test_a_tokenizer_without_a_chat_template(complaint: Complain, tiny_run: Path, tmp_path: Path) -> None:
    model = checkpoint_with(tiny_run / "sft", tmp_path / "model", lambda d: (d / "chat_template.jinja").unlink())
    line = complaint("--model.actor", str(model))
    assert has_all(line, model, "no chat template", "--model.chat_template dialogue")


def test_a_chat_template_that_is_not_there(complaint: Complain, tmp_path: Path) -> None:
    line = complaint("--model.chat_template", str(tmp_path / "no.jinja"))
    assert has_all(line, "model.chat_template", tmp_path / "no.jinja", "dialogue")


@pytest.mark.real
def test_actor_and_reward_model_with_different_vocabularies(complaint: Complain, shared: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(400))
    models = ("--model.actor", str(shared / "models/stories260K"))
    judge = ("--model.reward", str(shared / "models/babyllama-char-1M"), "--model.chat_template", "dialogue")
    short = ("--data.max_length", "100", "--data.max_prompt_length", "60")
    line = complaint(*models, *judge, *short, "--data.sources", str(rows))
    assert has_all(line, "vocabulary", "105", "512", "--model.retokenise_for_reward true")


# --- run directories ------------------------------------------------------------------------------------------------


def test_an_output_directory_of_another_recipe(complaint: Complain, tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path / "run")
    before = file_stamps(run)
    line = complaint("--run.name", "other", output=run)
    assert has_all(line, run, "'tiny'", "'other'", "--output-dir")
    assert file_stamps(run) == before


def test_an_output_directory_that_is_a_file(complaint: Complain, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert has_all(complaint(output=tmp_path / "file"), tmp_path / "file", "is a file", "--output-dir")
    assert has_all(complaint(output=tmp_path / "file" / "below"), tmp_path / "file" / "below", "--output-dir")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_with_other_things_in_it(complaint: Complain, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    assert has_all(complaint(output=foreign), foreign, "not empty", "--output-dir")
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


DAMAGED = {
    "cut short": '{"key": "abc"',
    "another value": "[1, 2]",
    "a field is gone": '{"stage": "sft"}',
    "no text at all": "\x00\x01",
    "empty": "",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("file", ["sft/stage.json", "run.json", "evaluation.json"])
def test_a_damaged_record(complaint: Complain, tiny_run: Path, tmp_path: Path, file: str, content: str) -> None:
    run = copy_of(tiny_run, tmp_path / "run")
    (run / file).write_text(content)
    before = file_stamps(run)
    assert has_all(complaint(output=run), run / file, "is damaged", "delete it")
    assert file_stamps(run) == before


def test_a_record_with_bytes_that_are_no_text(complaint: Complain, tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path / "run")
    (run / "ppo/stage.json").write_bytes(b"\xff\xfe{}")
    assert has_all(complaint(output=run), run / "ppo/stage.json", "is damaged", "delete it")


def test_a_finished_stage_whose_weights_are_damaged(complaint: Complain, tiny_run: Path, tmp_path: Path) -> None:
    run = copy_of(tiny_run, tmp_path / "run")
    (run / "sft/model.safetensors").write_bytes(b"nothing")
    assert has_all(complaint("--reward.max_steps", "3", output=run), run / "sft", "cannot load")


# --- fields ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--ppo.kl_coeff", "0.1"), ("unknown field ppo.kl_coeff", "did you mean ppo.kl_coef?")),
        (("--ppo.kl_coef", "much"), ("ppo.kl_coef", '"much"', "a number")),
        (("--sft.epochs", "1.5"), ("sft.epochs", '"1.5"', "whole number")),
        (("--sft.epochs", "0"), ("sft.epochs", '"0"', "greater than or equal to 1")),
        (("--ppo.kl_estimator", "k4"), ("ppo.kl_estimator", '"k4"', "'k1', 'k2' or 'k3'")),
        (("--data.split", "1,2"), ("data.split", "3")),
        (("--data.split", "0,0,0"), ("split", "above 0")),
        (("--ppo.sampling.temperature", "0"), ("temperature 0 is greedy", "above 0")),
        (("--model.embedded.num_heads", "5"), ("num_heads 5", "hidden_size 32")),
        (("--model.embedded.vocab_size", "100"), ("model.embedded.vocab_size 100", "261 or more")),
        (("--ppo.sampling.top_q", "0.5"), ("unknown field ppo.sampling.top_q", "did you mean")),
        (("--ppo.actor_lora.dropout", "0.1", "--ppo.actor_lora.rank", "2"), ("dropout", "0")),
        (("--generation.kv_memory_gib", "1e-6"), ("generation.kv_memory_gib = 1e-06", "raise it", "max_new_tokens")),
        (("--run.device", "tpu"), ("run.device", '"tpu"', "'cpu'")),
        (("--data.demo.num_prompts", "4"), ("4 different prompts are too few", "data.split")),
    ],
)
def test_fields(complaint: Complain, arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert has_all(complaint(*arguments), *parts)


@pytest.mark.parametrize("field", ["sft.lora", "reward.lora", "ppo.actor_lora", "ppo.critic_lora"])
def test_adapters_for_layers_that_are_not_there(
    complaint: Complain, tiny_run: Path, tmp_path: Path, field: str
) -> None:
    """Refused before the first step, whichever step they are for."""
    actor = ("--model.actor", str(tiny_run / "sft"))
    line = complaint(*actor, f"--{field}.rank", "2", f"--{field}.target_modules", "k_projection")
    assert has_all(line, f"{field}.target_modules", "k_projection", "k_proj")
    assert not (tmp_path / "output" / "sft").exists()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("field", ["sft.lora", "ppo.critic_lora"])
def test_packed_weights_where_bitsandbytes_is_missing(complaint: Complain, tmp_path: Path, field: str) -> None:
    """Refused before the first step, whichever step they are for; an embedded model's, too."""
    line = complaint(f"--{field}.rank", "2", f"--{field}.quantise_base", "nf4")
    assert has_all(line, f"{field}.quantise_base", "bitsandbytes", "not installed", "threefold[qlora]")
    assert not (tmp_path / "output" / "sft").exists()


@pytest.mark.parametrize(
    ("toml", "parts"),
    [
        ("[ppo]\nklcoef = 1", ("unknown field ppo.klcoef", "did you mean ppo.kl_coef?")),
        ("[pop]\nkl_coef = 1", ("unknown section pop", "did you mean ppo?")),
        ('[sft]\nepochs = "3"', ("sft.epochs", '"3"', "whole number")),
        ("[sft\n", ("not valid TOML", "line 1")),
    ],
)
def test_fields_of_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, toml: str, parts: tuple[str, ...]
) -> None:
    recipe = tmp_path / "wrong.toml"
    recipe.write_text(toml)
    assert train(recipe, tmp_path / "output") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert has_all(line, recipe, *parts)
    assert not (tmp_path / "output").exists()


def test_what_was_finished_before_the_mistake_is_kept(
    complaint: Complain, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    """A judge that cannot be loaded stops step 2; step 1 is then skipped on the next run."""
    output = tmp_path / "output"
    assert train(tiny_recipe_file, output, "--step", "1") == 0
    before = file_stamps(output)
    complaint("--model.reward", str(tmp_path / "no"))
    assert file_stamps(output) == before
    assert train(tiny_recipe_file, output) == 0
    assert file_stamps(output)["sft"] == before["sft"]
    assert json.loads((output / "run.json").read_text())["name"] == "tiny"
