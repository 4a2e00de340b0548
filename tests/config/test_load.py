"""Recipes are read as written, and each mistake is one line that names place, field, value and remedy."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from threefold.config.data import SourceSection
from threefold.config.fields import (
    describe_fields,
    iterate_items,
    iterate_sections,
    nearest_names,
    recipe_markdown,
    recipe_paths,
)
from threefold.config.load import dump_recipe, load_recipe, split_overrides
from threefold.config.recipe import Recipe
from threefold.errors import ConfigError

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "threefold"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def sources(*paths: str) -> list[SourceSection]:
    return [SourceSection(path=[path]) for path in paths]


def message_of(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_file_and_overrides_it_is_the_default_recipe() -> None:
    assert load_recipe(None, []) == Recipe()


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "[ppo]\nkl_coef = 0.2\nppo_epochs = 3\n")
    recipe = load_recipe(path, ["--ppo.kl_coef", "0.05"])
    assert (recipe.ppo.kl_coef, recipe.ppo.ppo_epochs, recipe.ppo.minibatches) == (0.05, 3, 1)


def test_the_last_of_two_overrides_of_a_field_wins() -> None:
    assert load_recipe(None, ["--sft.epochs", "2", "--sft.epochs=5"]).sft.epochs == 5


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["--ppo.kl_coef", "0.05"], "ppo.kl_coef", 0.05),
        (["--ppo.kl_coef=1e-2"], "ppo.kl_coef", 0.01),
        (["--ppo.sampling.top_p", "0.9"], "ppo.sampling.top_p", 0.9),
        (["--ppo.ema.enabled", "false"], "ppo.ema.enabled", False),
        (["--ppo.ema.enabled=True"], "ppo.ema.enabled", True),
        (["--data.sources", "a.jsonl,b.jsonl"], "data.sources", sources("a.jsonl", "b.jsonl")),
        (["--data.sources", "a.jsonl, b.jsonl"], "data.sources", sources("a.jsonl", "b.jsonl")),
        (["--data.sources", '["a,b.jsonl", "c.jsonl"]'], "data.sources", sources("a,b.jsonl", "c.jsonl")),
        (
            ["--data.sources", '["a", {"path": ["b", "c"], "sft_only": true, "mapping": {"prompt": "q"}}]'],
            "data.sources",
            [*sources("a"), SourceSection(path=["b", "c"], sft_only=True, mapping={"prompt": "q"})],
        ),
        (["--data.split", "1,0,3"], "data.split", [1.0, 0.0, 3.0]),
        (["--sft.betas", "0.8,0.9"], "sft.betas", (0.8, 0.9)),
        (["--ppo.actor_lora.target_modules", "q_proj,v_proj"], "ppo.actor_lora.target_modules", ["q_proj", "v_proj"]),
        (["--sft.betas", "[0.8, 0.9]"], "sft.betas", (0.8, 0.9)),
        (["--model.actor=a=b"], "model.actor", "a=b"),
        (["--model.actor", ""], "model.actor", ""),
        (["--model.actor", "null"], "model.actor", "null"),
        (["--model.actor", "-x"], "model.actor", "-x"),
        (["--model.actor=--x"], "model.actor", "--x"),
        (["--run.name", "12"], "run.name", "12"),
    ],
)
def test_an_override_is_read_as_its_fields_type(overrides: list[str], path: str, value: object) -> None:
    read: object = load_recipe(None, overrides)
    for name in path.split("."):
        read = getattr(read, name)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[ppo]\nklcoef = 1", ["recipe.toml", "unknown field ppo.klcoef", "did you mean ppo.kl_coef?"]),
        ("kl_coef = 1", ["recipe.toml", "unknown field kl_coef", "did you mean ppo.kl_coef?"]),
        ("[sft]\nkl_coef = 1", ["unknown field sft.kl_coef", "did you mean ppo.kl_coef?"]),
        ("[pppo]\nkl_coef = 1", ["unknown section pppo", "did you mean ppo?"]),
        ("[sampling]\ntop_p = 1", ["unknown section sampling", "did you mean ppo.sampling?"]),
        ("zzzzqqq = 1", ["unknown field zzzzqqq", "--help"]),
        ("ppo = 3", ["ppo = 3", "ppo is a section", "[ppo]"]),
        ("[[ppo]]\nkl_coef = 1", ["ppo is a section", "[ppo]"]),
        ("[run.name]\nx = 1", ["[run.name] is a field", "name = VALUE under [run]"]),
        ('[ppo]\nkl_coef = "0.1"', ["recipe.toml", 'ppo.kl_coef = "0.1"', "must be a number"]),
        ("[sft]\nepochs = true", ["sft.epochs = true", "must be a whole number"]),
        ("[sft]\nepochs = 1.5", ["sft.epochs = 1.5", "must be a whole number"]),
        ("[ppo]\nkl_coef = -1", ["ppo.kl_coef = -1", "greater than or equal to 0"]),
        ("[ppo]\nkl_coef = inf", ["ppo.kl_coef", "finite"]),
        ('[run]\ndevice = "gpu"', ['run.device = "gpu"', "'auto', 'cpu', 'cuda' or 'mps'"]),
        ("[run]\nname = 2020-01-01", ["run.name", "2020-01-01", "date"]),
        ('[data]\nsources = "a"', ['data.sources = "a"', "must be a list"]),
        ("[data]\nsources = []", ["data.sources = []", "at least 1 item"]),
        ("[data]\nsplit = [1, 2, -3]", ["data.split[2] = -3", "greater than or equal to 0"]),
        ("[sft]\nbetas = [0.9]", ["sft.betas = [0.9]", "item 2 of the list is missing"]),
        ("[ppo.sampling]\nmin_new_tokens = 300", ["in ppo.sampling", "min_new_tokens 300", "max_new_tokens 256"]),
        ("[ppo.sampling]\ntemperature = 0", ["in ppo:", "sampling.temperature 0 is greedy"]),
        ("[ppo.actor_lora]\ndropout = 0.1", ["in ppo:", "actor_lora.dropout 0.1", "log-probs", "set it to 0"]),
        ("[ppo.critic_lora]\ndropout = 0.1", ["in ppo:", "critic_lora.dropout 0.1", "set it to 0"]),
        ("[sft.lora]\nrank = -1", ["sft.lora.rank = -1", "greater than or equal to 0"]),
        ('[sft.lora]\ntarget_modules = "q_proj"', ['sft.lora.target_modules = "q_proj"', "must be a list"]),
        ("[reward.lora]\ntarget_modules = []", ["reward.lora.target_modules = []", "at least 1 item"]),
        ("[ppo]\nkl_coef = ", ["recipe.toml", "not valid TOML", "line 2"]),
        ("[ppo]\nkl_coef = 1 2\n", ["recipe.toml", "not valid TOML", "line 2, column 13", "Expected newline"]),
        ("a = 1\na = 2", ["not valid TOML", "Cannot overwrite a value", "line 2"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = message_of(write(tmp_path, text))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["--kl_coef", "1"], ["command line", "unknown field kl_coef", "did you mean ppo.kl_coef?"]),
        (["--ppo.kl-coef", "1"], ["unknown field ppo.kl-coef", "did you mean ppo.kl_coef?"]),
        (["--learning_rate", "1"], ["did you mean sft.learning_rate or reward.learning_rate?"]),
        (["--ppo.learning_rate", "1"], ["did you mean ppo.actor_learning_rate?"]),
        (["--ppo", "3"], ["ppo is a section", "--ppo.epochs"]),
        (["--ppo.kl_coef"], ["--ppo.kl_coef has no value"]),
        (["--ppo.kl_coef", "--sft.epochs", "1"], ["--ppo.kl_coef has no value"]),
        (["stray"], ["command line", "unexpected 'stray'"]),
        (["--ppo.kl_coef", "-1e-3"], ["command line", 'ppo.kl_coef = "-1e-3"', "greater than or equal to 0"]),
        (["--ppo.kl_coef", "nan"], ["ppo.kl_coef", "finite"]),
        (["--sft.epochs", "ten"], ['sft.epochs = "ten"', "must be a whole number"]),
        (["--ppo.ema.enabled", "maybe"], ['ppo.ema.enabled = "maybe"', "must be true or false"]),
        (["--sft.betas", "0.9,x"], ['sft.betas[1] = "x"', "must be a number"]),
        (["--data.sources", ""], ["data.sources = []", "at least 1 item"]),
        (["--data.sources", "[a]"], ["data.sources", "JSON"]),
        (["--sft.lora.target_modules", "all-linear,q_proj"], ["in sft.lora:", '"all-linear"', "alone"]),
        (["--sft.lora.quantise_base", "nf4"], ["in sft.lora:", "quantise_base", "rank 0", "set rank above 0"]),
        (["--sft.lora.quantise_base", "int3", "--sft.lora.rank", "1"], ['sft.lora.quantise_base = "int3"', "nf4"]),
        (["--model.embedded.num_heads", "3"], ["command line", "num_heads 3 does not divide hidden_size 128"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(overrides: list[str], parts: list[str]) -> None:
    message = message_of(None, *overrides)
    assert all(part in message for part in parts), message


def test_two_settings_that_clash_name_both_places(tmp_path: Path) -> None:
    path = write(tmp_path, "[ppo.sampling]\nmin_new_tokens = 30\n")
    message = message_of(path, "--ppo.sampling.max_new_tokens", "20")
    assert message.startswith(f"{path} and command line: in ppo.sampling: min_new_tokens 30")


def test_of_several_mistakes_the_first_is_told_and_the_rest_counted(tmp_path: Path) -> None:
    path = write(tmp_path, "[sft]\nepochs = 0\nepoch = 1\n")
    message = message_of(path, "--ppo.clip", "1", "--ppo.ema.decay", "2")
    assert message.startswith(f"{path}: unknown field sft.epoch: did you mean sft.epochs?")
    assert message.endswith("(and 3 more mistakes)")


def test_a_missing_recipe_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "demo.toml").write_text("")
    message = message_of(tmp_path / "dmo.toml")
    assert "there is no recipe" in message
    assert message.endswith("demo.toml?")
    assert "there is no recipe" in message_of(tmp_path / "nowhere" / "demo.toml")
    assert "is a directory" in message_of(tmp_path)


def test_text_that_is_not_utf8_is_refused_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b'[run]\nname = "\xff"\n')
    assert "not UTF-8 text at byte 14" in message_of(path)
    path.write_bytes(b'\xef\xbb\xbf[run]\nname = "bom"\n')
    assert load_recipe(path, []).run.name == "bom"


@pytest.mark.parametrize("only_set", [False, True])
def test_dumping_and_loading_gives_the_same_recipe(tmp_path: Path, only_set: bool) -> None:
    overrides = ["--ppo.kl_coef=9.65e-6", "--data.sources", 'é "q"\\.jsonl,b', "--sft.betas=0.5,0.25", "--run.name=x"]
    recipe = load_recipe(None, overrides)
    text = dump_recipe(recipe, only_set=only_set)
    again = load_recipe(write(tmp_path, text), [])
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)
    assert ("minibatches" in text) is not only_set


def test_a_default_written_out_gives_the_same_text_as_the_default_left_out() -> None:
    """Hashes of stages are taken over this text, so [2, 4, 4] and [2.0, 4.0, 4.0] must not differ."""
    assert dump_recipe(load_recipe(None, ["--data.split", "2,4,4"])) == dump_recipe(Recipe())


def test_overrides_are_cut_into_names_and_texts() -> None:
    assert split_overrides(["--a.b", "-1", "--c=x=y", "--d="]) == [("a.b", "-1"), ("c", "x=y"), ("d", "")]


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("ppo.kl_coeff", "ppo.kl_coef"), ("top_p", "ppo.sampling.top_p"), ("ppo.ema_decay", "ppo.ema.decay")],
)
def test_the_nearest_name_is_found(given: str, nearest: str) -> None:
    assert nearest_names(given, recipe_paths()) == [nearest]


def test_each_field_has_a_docstring() -> None:
    assert [field.path for field in describe_fields() if not field.doc] == []
    paths = [*recipe_paths(), *(f"{path}.{name}" for path, item in iterate_items() for name in item.model_fields)]
    assert sorted(field.path for field in describe_fields()) == sorted(set(paths))
    assert len(paths) > 150


def test_descriptions_say_type_limits_and_default() -> None:
    described = {field.path: field for field in describe_fields()}
    assert described["ppo.clip_range"].type_text == "number, above 0"
    assert described["ppo.gamma"].type_text == "number from 0 to 1"
    assert described["data.split"].type_text == "list, 3 items, each: number, at least 0"
    assert described["run.device"].type_text == '"auto" | "cpu" | "cuda" | "mps"'
    assert described["ppo.ema.enabled"][1:3] == ("true or false", "true")
    assert described["sft.learning_rate"].doc.startswith("Peak learning rate.")


def test_the_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page == recipe_markdown(), "run: threefold recipe --markdown > docs/recipe.md"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda path: path.name)
def test_each_shipped_recipe_loads(path: Path) -> None:
    assert load_recipe(path, []).run.name


def test_each_field_is_read_by_the_code() -> None:
    """A setting that nothing reads is a promise that nothing keeps: its name must be an attribute outside config/,
    or in a method of the recipe that hands it on."""
    code = "".join(path.read_text() for path in SOURCE.rglob("*.py") if path.parent.name != "config")
    trees = [ast.parse((SOURCE / "config" / name).read_text()) for name in ("recipe.py", "data.py")]
    methods = [
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and not node.decorator_list
    ]
    read = set(re.findall(r"\.(\w+)\b", code))
    read |= {node.attr for method in methods for node in ast.walk(method) if isinstance(node, ast.Attribute)}
    paths = [field.path for field in describe_fields()] + [path for path, _ in iterate_sections()]
    assert [path for path in paths if path.rsplit(".", 1)[-1] not in read] == []
