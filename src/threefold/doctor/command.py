"""`threefold doctor RECIPE`: opens the data, makes the tokenizers, examines, shows, writes files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from threefold.config.recipe import Recipe
from threefold.data.chat import BUILT_IN_TEMPLATES, ChatFormat, build_chat_format, ensure_pad_token
from threefold.data.demo import train_tokenizer
from threefold.data.doctor import FAST, FULL, Examined, Finding, Report, examine, open_for_doctor, source_rows
from threefold.data.library import Library
from threefold.data.split import Step
from threefold.doctor.console import show
from threefold.doctor.page import page
from threefold.errors import CheckpointError, ConfigError, DataError
from threefold.models.loading import generation_stop_ids, load_tokenizer
from threefold.stages.context import EMBEDDED


@dataclass(frozen=True)
class DoctorOptions:
    """Flags of the command.

    Attributes:
        json: file for all findings and statistics; None writes none.
        html: file for the page of samples; None writes none.
        full: look at all rows instead of some.
    """

    json: Path | None = None
    html: Path | None = None
    full: bool = False


def run_doctor(recipe: Recipe, options: DoctorOptions, tell: Callable[[str], None]) -> None:
    """Examine a recipe's data and show what was found.

    Raises:
        DataError: there are errors; they have been shown.
        ConfigError: a file cannot be written.
    """
    examined = diagnose(recipe, options.full, tell)
    report = examined.report
    if options.json:
        _write(options.json, json.dumps(report.as_dict(), indent=2, ensure_ascii=False) + "\n", "--json")
    if options.html:
        _write(options.html, page(recipe.run.name, examined), "--html")
    show(examined)
    for path, what in ((options.json, "findings and statistics"), (options.html, "page of samples")):
        if path:
            tell(f"{what}: {path}")
    if report.errors:
        first = report.errors[0]
        more = f", and {len(report.errors) - 1} more" if len(report.errors) > 1 else ""
        raise DataError(
            f"the data have {len(report.errors)} errors: {first.message}{more}".replace("1 errors", "1 error")
        )


def diagnose(recipe: Recipe, full: bool, tell: Callable[[str], None]) -> Examined:
    """All that the doctor finds; what keeps it from looking further is a finding too."""
    opened = open_for_doctor(recipe, tell)
    if opened.library is None:
        return Examined(Report("full" if full else "fast", opened.findings, {}, ()), ())
    chats, problems = _chat_formats(recipe, opened.library)
    allow_bad = recipe.data.bad_rows == "drop"
    sources = source_rows(opened.library, opened.bad_rows, allow_bad)
    examined = examine(sources, chats, recipe, FULL if full else FAST)
    found = sorted([*opened.findings, *problems, *examined.report.findings], key=lambda one: one.severity != "error")
    return replace(examined, report=replace(examined.report, findings=tuple(found)))


def _chat_formats(recipe: Recipe, library: Library) -> tuple[dict[Step, ChatFormat], list[Finding]]:
    """The chat format of each step that has data, and what is wrong with the tokenizers and templates."""
    chats: dict[Step, ChatFormat] = {}
    problems: list[Finding] = []
    steps: dict[str, tuple[Step, ...]] = {recipe.model.actor: ("sft", "reward", "ppo")}
    if recipe.model.reward:
        steps = {recipe.model.actor: ("sft", "ppo"), recipe.model.reward: ("reward",)}
        if recipe.model.reward == recipe.model.actor:
            steps = {recipe.model.actor: ("sft", "reward", "ppo")}
    for source, its_steps in steps.items():
        try:
            chat = _chat_format(source, recipe, library)
        except (CheckpointError, ConfigError) as error:
            problems.append(Finding("error", "chat_template", str(error), source))
            continue
        chats |= dict.fromkeys(its_steps, chat)
    return chats, problems


def _chat_format(source: str, recipe: Recipe, library: Library) -> ChatFormat:
    settings = recipe.model
    stop_ids: tuple[int, ...] = ()
    if source == EMBEDDED:
        examples = library.examples("sft", "train")
        if not len(examples):
            raise ConfigError('model.actor "embedded" trains its tokenizer on the data of step 1, which has none')
        tokenizer = train_tokenizer(examples, settings.embedded.vocab_size)
        tokenizer.chat_template = BUILT_IN_TEMPLATES["tags"]
    else:
        tokenizer = load_tokenizer(source)
        stop_ids = generation_stop_ids(source)
    ensure_pad_token(tokenizer, settings.pad_token, settings.chat_template, source, settings.system_prompt)
    return build_chat_format(tokenizer, settings.chat_template, stop_ids, source, settings.system_prompt)


def _write(path: Path, text: str, flag: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be written ({error.strerror}): give another path") from error
