"""Reading recipes: defaults < TOML file < dotted overrides, and one line for whoever gets a field wrong.

Overrides are `--section.field value` or `--section.field=value`. They are split here and not by pydantic-settings;
docs/decisions/0002-recipe-overrides.md says why.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import tomli_w
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from threefold.config.fields import (
    did_you_mean,
    item_class,
    iterate_fields,
    iterate_items,
    iterate_sections,
    recipe_paths,
    section_class,
)
from threefold.config.recipe import Recipe
from threefold.config.section import Section
from threefold.errors import ConfigError

COMMAND_LINE = "command line"
_SEE_HELP = "threefold train --help lists every field"
_PLAIN_TYPES = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid list": "a list",
    "a valid tuple": "a list",
    "a valid array": "a list",
}


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: the defaults, then the TOML file (None: no file), then the overrides in their order.

    A file is taken at its word ("3" is no number, true is no number); on the command line, where all is text, a value
    is read as the field's type. Lists are written `a,b` or as JSON.

    Raises:
        ConfigError: one line naming the file or the command line, the field, its value and what is allowed. Where there
            are several mistakes it is about the first, and says how many more there are.
    """
    where = str(path)
    table = {} if path is None else _read_toml(path)
    settings, mistakes = _known_fields(table, Recipe, where)
    from_file = set(_leaf_paths(settings))
    from_command_line = set()
    for name, text in split_overrides(overrides):
        try:
            value = _read_override(name, text)
        except ConfigError as error:
            mistakes.append(str(error))
            continue
        _set_path(settings, name, value)
        from_command_line.add(name)
    if path is not None and isinstance(run := settings.setdefault("run", {}), dict):
        run.setdefault("name", re.sub("[^A-Za-z0-9._-]+", "-", path.stem).strip("-.") or "run")
    try:
        recipe = Recipe.model_validate_json(json.dumps(settings), strict=True)
    except ValidationError as error:
        origins = {where: from_file - from_command_line, COMMAND_LINE: from_command_line}
        mistakes += [_plain_message(details, origins) for details in error.errors()]
    if mistakes:
        more = len(mistakes) - 1
        raise ConfigError(mistakes[0] + (f" (and {more} more mistake{'s' if more > 1 else ''})" if more else ""))
    return recipe


def dump_recipe(recipe: Recipe, only_set: bool = False) -> str:
    """The recipe as TOML; loading the text gives the same recipe. `only_set` leaves out untouched defaults."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_unset=only_set))


def split_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Cut `--a.b value --c.d=value` into ("a.b", "value"), ("c.d", "value").

    A value may start with one dash (a negative number), and with two only after an equals sign.

    Raises:
        ConfigError: a value without a name, or a name without a value.
    """
    pairs = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise ConfigError(
                f"{COMMAND_LINE}: unexpected {argument!r}: settings are written --section.field value, and lists a,b"
            )
        name, equals, text = argument[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{COMMAND_LINE}: --{name} has no value: write --{name} VALUE")
            text = rest.pop(0)
        pairs.append((name, text))
    return pairs


def _read_toml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"{path} is a directory, not a recipe: name a .toml file")
    if not path.is_file():
        neighbours = [str(other) for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        nearest = difflib.get_close_matches(str(path), neighbours, n=1, cutoff=0.8)
        raise ConfigError(f"there is no recipe {path}" + (f": did you mean {nearest[0]}?" if nearest else ""))
    try:
        # utf-8-sig: some editors put a byte-order mark before the text, which TOML itself does not allow
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}: save the recipe as UTF-8") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = " ".join(str(error).split()).replace("(at end", f"(at line {text.count(chr(10)) + 1}, end")
        raise ConfigError(f"{path}: not valid TOML: {message}") from error


def _known_fields(
    table: Mapping[str, Any], section: type[Section], where: str, prefix: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """The part of a file's table that the recipe has fields for, and one message for each thing that it has not."""
    known: dict[str, Any] = {}
    mistakes: list[str] = []
    for name, value in table.items():
        path = prefix + name
        field = section.model_fields.get(name)
        inner = section_class(field) if field else None
        if field is None:
            is_table = isinstance(value, dict)
            candidates = [path for path, _ in iterate_sections()] if is_table else recipe_paths()
            kind = "section" if is_table else "field"
            mistakes.append(f"{where}: unknown {kind} {path}: {did_you_mean(path, candidates, _SEE_HELP)}")
        elif inner is not None and isinstance(value, dict):
            known[name], inner_mistakes = _known_fields(value, inner, where, f"{path}.")
            mistakes += inner_mistakes
        elif inner is not None:
            mistakes.append(f"{where}: {path} = {_show(value)}: {path} is a section, not a field: write [{path}]")
        elif get_origin(field.annotation) is dict and isinstance(value, dict):
            known[name] = value
        elif isinstance(value, list) and (item := item_class(field)) is not None:
            known[name], inner_mistakes = _known_items(value, item, where, path)
            mistakes += inner_mistakes
        elif isinstance(value, dict) and item_class(field) is not None:
            mistakes.append(f"{where}: [{path}] is a list of tables: write [[{path}]] for each")
        elif isinstance(value, dict):
            mistakes.append(f"{where}: [{path}] is a field, not a section: write {name} = VALUE under [{prefix[:-1]}]")
        elif not _is_json(value):
            mistakes.append(f"{where}: {path} = {_show(value)} is not allowed: no field is a date or a table")
        else:
            known[name] = value
    return known, mistakes


def _known_items(values: list[Any], item: type[Section], where: str, path: str) -> tuple[list[Any], list[str]]:
    """`_known_fields` of a list, each item of which is a text or a table."""
    known: list[Any] = []
    mistakes: list[str] = []
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            known.append(value)
            continue
        fields = {}
        for name, inner in value.items():
            if name in item.model_fields:
                fields[name] = inner
            else:
                nearest = did_you_mean(name, item.model_fields, f"its fields are {', '.join(item.model_fields)}")
                mistakes.append(f"{where}: unknown field {path}[{index}].{name}: {nearest}")
        known.append(fields)
    return known, mistakes


def _is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    return isinstance(value, str | int | float | bool)


def _leaf_paths(table: Mapping[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for name, value in table.items():
        paths += _leaf_paths(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return paths


def _set_path(table: dict[str, Any], path: str, value: object) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        table = table.setdefault(section, {})
    table[leaf] = value


def _read_override(name: str, text: str) -> object:
    """The value of one override as its field's type."""
    sections = dict(iterate_sections())
    if name in sections:
        first = next(iter(sections[name].model_fields))
        raise ConfigError(f"{COMMAND_LINE}: {name} is a section, not a field: set its fields, as in --{name}.{first}")
    field = dict(iterate_fields()).get(name)
    in_list = next((path for path, _ in iterate_items() if name.startswith(f"{path}.")), None)
    if in_list is not None:
        leaf = name.removeprefix(f"{in_list}.")
        raise ConfigError(
            f"{COMMAND_LINE}: {name} is a field of each item of {in_list}: set it under [[{in_list}]], or "
            f'give the list as JSON, --{in_list} \'[{{"path": "...", "{leaf}": ...}}]\''
        )
    if field is None:
        raise ConfigError(f"{COMMAND_LINE}: unknown field {name}: {did_you_mean(name, recipe_paths(), _SEE_HELP)}")
    adapter: TypeAdapter[Any] = TypeAdapter(field.rebuild_annotation())
    try:
        if item_class(field) is not None:
            listed = text.lstrip().startswith("[")
            read = adapter.validate_json(text) if listed else adapter.validate_python(_cut_list(text))
            return adapter.dump_python(read, exclude_unset=True)
        if get_origin(field.annotation) not in (list, tuple):
            return adapter.validate_python(text)
        if text.lstrip().startswith("["):
            return adapter.validate_json(text)
        return adapter.validate_python(_cut_list(text))
    except ValidationError as error:
        raise ConfigError(_value_message(COMMAND_LINE, name, error.errors()[0], error.errors()[0]["loc"])) from error


def _cut_list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")] if text.strip() else []


def _plain_message(details: ErrorDetails, origins: Mapping[str, set[str]]) -> str:
    """Pydantic's report of one mistake as: where, field, value, what is allowed."""
    paths = set(recipe_paths())
    parts = [str(part) for part in details["loc"]]
    depth = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in paths), len(parts))
    path, item = ".".join(parts[:depth]), details["loc"][depth:]
    touched = [
        where
        for where, fields in origins.items()
        if any(field == path or field.startswith(f"{path}.") for field in fields)
    ]
    where = " and ".join(touched)
    if path not in paths:  # a rule between fields of one section, whose message names them
        return f"{where}: in {path}: {_allowed(details, ())}"
    return _value_message(where, path, details, item)


def _value_message(where: str, path: str, details: ErrorDetails, item: tuple[int | str, ...]) -> str:
    shown = path
    if item and details["type"] != "missing":
        shown += "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item)
    if details["type"] == "extra_forbidden" and item:
        fields = [name for _, item_section in iterate_items() for name in item_section.model_fields]
        known = f"its fields are {', '.join(fields)}"
        return f"{where}: unknown field {shown}: {did_you_mean(str(item[-1]), fields, known)}"
    return f"{where}: {shown} = {_show(details['input'])} is not allowed: {_allowed(details, item)}"


def _allowed(details: ErrorDetails, item: tuple[int | str, ...]) -> str:
    """What the field takes, from pydantic's message in plain words."""
    if details["type"] == "missing":
        return f"{item[-1]} is missing" if isinstance(item[-1], str) else f"item {item[-1] + 1} of the list is missing"
    if details["type"] == "json_invalid":
        return 'a list in brackets must be JSON, its texts in double quotes: ["a", "b"]'
    message = " ".join(details["msg"].split()).removeprefix("Value error, ")
    message = re.sub(r", unable to (parse|interpret).*", "", message).replace(" after validation", "")
    for theirs, plain in _PLAIN_TYPES.items():
        message = message.replace(theirs, plain)
    return re.sub(r"^(Input|List|Tuple|String) should ", "it must ", message)


def _show(value: object) -> str:
    """A value as TOML writes it, cut where it is long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
