"""Every field of the recipe by its dotted path: what `--help`, docs/recipe.md and "did you mean" are made of."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from threefold.config.recipe import Recipe
from threefold.config.section import Section

_MIN_LIKENESS = 0.5  # below it a suggestion would mislead more than it helps


class FieldDescription(NamedTuple):
    """One field of the recipe as a reader sees it: dotted path, plain type, default as TOML writes it, docstring."""

    path: str
    type_text: str
    default: str
    doc: str


def section_class(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or None where the field is a value."""
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def item_class(field: FieldInfo) -> type[Section] | None:
    """The section that each item of a list is, or None where the field is no list of sections."""
    if get_origin(field.annotation) is not list:
        return None
    item = get_args(field.annotation)[0]
    item = get_args(item)[0] if get_origin(item) is Annotated else item
    return item if isinstance(item, type) and issubclass(item, Section) else None


def iterate_fields(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All values (not sections) with their dotted path; in each section its own values come before its sub-sections."""
    for name, field in section.model_fields.items():
        if section_class(field) is None:
            yield prefix + name, field
    for name, field in section.model_fields.items():
        inner = section_class(field)
        if inner is not None:
            yield from iterate_fields(inner, f"{prefix}{name}.")


def iterate_sections(section: type[Section] = Recipe, prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """All sections with their dotted path, in the recipe's order."""
    for name, field in section.model_fields.items():
        inner = section_class(field)
        if inner is not None:
            yield prefix + name, inner
            yield from iterate_sections(inner, f"{prefix}{name}.")


def recipe_paths() -> tuple[str, ...]:
    """Dotted path of every value of the recipe ("ppo.sampling.top_p"), in the recipe's order."""
    return tuple(path for path, _ in iterate_fields())


def describe_fields() -> list[FieldDescription]:
    """Path, type, default and docstring of every value of the recipe, in the recipe's order."""
    return [
        FieldDescription(
            path=path,
            type_text=_type_text(field.annotation, field.metadata),
            default=_default_text(field),
            doc=" ".join((field.description or "").split()),
        )
        for path, field in _documented_fields()
    ]


def _documented_fields() -> Iterator[tuple[str, FieldInfo]]:
    """All values, and after those of a section the fields that the items of its lists of sections have."""
    for path, field in iterate_fields():
        yield path, field
    for path, item in iterate_items():
        for name, inner in item.model_fields.items():
            yield f"{path}.{name}", inner


def iterate_items() -> Iterator[tuple[str, type[Section]]]:
    """Dotted path of each list of sections, and what its items are."""
    for path, field in iterate_fields():
        item = item_class(field)
        if item is not None:
            yield path, item


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if item_class(field) is not None:
        return json.dumps([",".join(item.path) for item in field.default])
    return json.dumps(field.get_default(call_default_factory=True))


def nearest_names(name: str, candidates: Iterable[str]) -> list[str]:
    """The dotted names most like `name`, best first: one, or up to three where a bare leaf fits several sections.

    Likeness is the mean of difflib's ratio on the whole path and on its last part, with a bonus for the same top
    section, so that both a misspelt field and a right field in the wrong section are found. Empty where nothing is
    alike.
    """
    given = name.lower().replace("-", "_")
    given_leaf = given.rsplit(".", 1)[-1]

    def likeness(candidate: str) -> float:
        leaf = candidate.rsplit(".", 1)[-1]
        whole = difflib.SequenceMatcher(None, given, candidate).ratio()
        same_section = "." in given and given.split(".")[0] == candidate.split(".")[0]
        return 0.5 * whole + 0.5 * difflib.SequenceMatcher(None, given_leaf, leaf).ratio() + 0.1 * same_section

    ranked = sorted(candidates, key=likeness, reverse=True)
    if "." not in given:
        same_leaf = [candidate for candidate in ranked if candidate.rsplit(".", 1)[-1] == given]
        if same_leaf:
            return same_leaf[:3]
    return ranked[:1] if ranked and likeness(ranked[0]) >= _MIN_LIKENESS else []


def did_you_mean(name: str, candidates: Iterable[str], otherwise: str) -> str:
    """The end of a message about an unknown name: the nearest right one, or `otherwise`."""
    nearest = nearest_names(name, candidates)
    return f"did you mean {' or '.join(nearest)}?" if nearest else otherwise


def fields_help(width: int = 100) -> str:
    """All fields for a terminal, grouped by section: path, default and type on a line, the docstring below it."""
    blocks = []
    for title, doc, fields in _grouped_fields():
        lines = textwrap.wrap(f"[{title}]  {doc}".rstrip(), width, subsequent_indent="  ")
        for field in fields:
            head = f"  --{field.path} {field.default}"
            lines += textwrap.wrap(f"{head}  ({field.type_text})", width, subsequent_indent=" " * 6)
            lines += textwrap.wrap(field.doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def recipe_markdown() -> str:
    """The reference of all fields as one Markdown page: docs/recipe.md."""
    lines = [
        "# The recipe",
        "",
        "A recipe is one TOML file; a field that it leaves out has the default below. Each field can also be set on",
        "the command line, `--ppo.kl_coef 0.05`, where it wins over the file. Lists are written `a,b` or as JSON.",
        "",
        "This page is written by `threefold recipe --markdown`; the text comes from `src/threefold/config/recipe.py`.",
    ]
    for title, doc, fields in _grouped_fields():
        lines += ["", f"## [{title}]", ""]
        if doc:
            lines += [doc, ""]
        lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
        for field in fields:
            leaf = field.path.rsplit(".", 1)[-1]
            lines.append(f"| `{leaf}` | {_cell(field.type_text)} | `{field.default}` | {_cell(field.doc)} |")
    return "\n".join(lines) + "\n"


def _grouped_fields() -> Iterator[tuple[str, str, list[FieldDescription]]]:
    """Section path, its docstring ("" where it has none) and its own values."""
    described = describe_fields()
    items = dict(iterate_items())
    for title, section in iterate_sections():
        yield title, _doc(section), [field for field in described if field.path.rsplit(".", 1)[0] == title]
        for path, item in items.items():
            if path.rsplit(".", 1)[0] == title:
                fields = [field for field in described if field.path.rsplit(".", 1)[0] == path]
                yield f"[{path}]", _doc(item), fields


def _doc(section: type[Section]) -> str:
    return " ".join((section.__dict__.get("__doc__") or "").split())


def _cell(text: str) -> str:
    """Text that is safe in a cell of a Markdown table: no column ends, no HTML tags."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _type_text(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type with its limits in plain words: "number from 0 to 1", "list of texts, at least 1"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner_metadata = [item for extra in arguments[1:] for item in getattr(extra, "metadata", [extra])]
        return _type_text(arguments[0], [*inner_metadata, *metadata])
    if origin is Literal:
        return " | ".join(json.dumps(choice) for choice in arguments)
    if origin is dict:
        return "table of texts"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "text or table"
    if origin is list:
        return f"list{_limits_text(metadata, ' items')}, each: {_type_text(arguments[0])}"
    if origin is tuple:
        return f"list, {len(arguments)} items, each: {_type_text(arguments[0])}"
    if origin in (Union, UnionType):
        return " or ".join(_type_text(choice) for choice in arguments)
    plain = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return plain[annotation] + _limits_text(metadata)


def _limits_text(metadata: Iterable[Any], unit: str = "") -> str:
    limits: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, annotated_types.Ge | annotated_types.Gt | annotated_types.Le | annotated_types.Lt):
            limits.update({key: getattr(item, key) for key in ("ge", "gt", "le", "lt") if hasattr(item, key)})
        elif isinstance(item, annotated_types.MinLen):
            limits["ge"] = item.min_length
        elif isinstance(item, annotated_types.MaxLen):
            limits["le"] = item.max_length
        elif getattr(item, "pattern", None):
            return f" that matches {item.pattern}"
    if "ge" in limits and limits["ge"] == limits.get("le"):
        return f", {limits['ge']}{unit}"
    if "ge" in limits and "le" in limits:
        return f" from {limits['ge']} to {limits['le']}{unit}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [f"{words[key]} {limits[key]}{unit}" for key in words if key in limits]
    return f", {' and '.join(parts)}" if parts else ""
