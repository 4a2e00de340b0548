"""Published datasets by name: the 16 that DeepSpeed-Chat knows, and some of today's; one small function each.

What it reads differently from DeepSpeed-Chat: prompts become messages, so that all datasets share one template (its
whitespace differs from set to set); WebGPT loses its [1] citations only, not all that stands in brackets; equal scores
are ties; and held-out prompts come from data.eval_fraction, so that of a dataset with several splits one is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from threefold.config.data import SourceSection
from threefold.data.sources.fields import (
    LAST_ANSWER,
    BadRowError,
    UnansweredRowError,
    checked_prompt,
    conversation,
    field,
    number,
    one_line_turns,
    optional_text,
    pair,
    prompt_of,
    ranking,
    text_field,
    wrong_type,
)
from threefold.data.sources.formats import FORMATS, RowFormat
from threefold.data.sources.tables import Row
from threefold.types import Example, Message, Prompt, Role

CITATION = re.compile(r"[ \t]?(?<![\w=])(?<!=[ \t])\[\s?[1-9]\d?(?:(?:\s?[,–]\s?|\s)[1-9]\d?)*\s?\]")
"""[1], [2, 3] or [1–3] of sources, which are few and counted from 1; no index, year, interval or assigned list."""
VICUNA_TURN = re.compile(r"(?:^|</s>|(?<=\s))\s{0,8}(USER|ASSISTANT):")
VICUNA_ROLES: dict[str, Role] = {"USER": "user", "ASSISTANT": "assistant"}


@dataclass(frozen=True)
class PublishedDataset:
    """Where a dataset is published, and how its rows are read.

    Attributes:
        row_format: columns and reader; its name is that of the dataset.
        hub_id: where that is another than the name.
        subset: configuration to load, where there are several.
        hub_split: split to load, where it is not train.
    """

    row_format: RowFormat
    hub_id: str = ""
    subset: str = ""
    hub_split: str = ""


# ------------------------------------------------------------------------------------------ those of DeepSpeed-Chat


def read_yitingxie(row: Row, origin: str) -> list[Example]:
    """`prompt` is a dialogue up to the question, `chosen` and `rejected` begin with "Assistant:"."""
    text = text_field(row, "prompt").removesuffix("Assistant:").rstrip()
    end = LAST_ANSWER if "\n\n" in text else " Assistant:"
    prompt = prompt_of(text + end if text.startswith("Human:") else text)
    answers = [text_field(row, name).removeprefix("Assistant:").strip() for name in ("chosen", "rejected")]
    return [pair(prompt, answers[0], answers[1], origin)]


def read_webgpt(row: Row, origin: str) -> list[Example]:
    """`question.full_text` with two answers, `answer_0` and `answer_1`, and their scores, of which 0 is a tie."""
    question = field(row, "question")
    if not isinstance(question, dict):
        raise wrong_type(question, "question", "an object with full_text")
    prompt = _question(text_field(question, "full_text"))
    answers = [CITATION.sub("", text_field(row, name)).strip() for name in ("answer_0", "answer_1")]
    places = [-number(field(row, name), name) for name in ("score_0", "score_1")]
    return [ranking(prompt, answers, places, origin)]


def read_shp(row: Row, origin: str) -> list[Example]:
    """`history` with two comments, of which `human_ref_A` is preferred where `labels` is 1, else `human_ref_B`."""
    first_is_better = number(field(row, "labels"), "labels") == 1
    names = ("human_ref_A", "human_ref_B") if first_is_better else ("human_ref_B", "human_ref_A")
    chosen, rejected = (text_field(row, name) for name in names)
    return [pair(_question(text_field(row, "history")), chosen, rejected, origin)]


def read_sharegpt_vicuna(row: Row, origin: str) -> list[Example]:
    """`prompt` in the form "USER: … ASSISTANT: … USER: … ASSISTANT:", and in `label` the answer."""
    text, answer = optional_text(row, "prompt"), optional_text(row, "label")
    if not text or not answer:
        raise UnansweredRowError("without prompt or label", "field 'prompt' or 'label' is empty")
    opening, turns = one_line_turns(text, VICUNA_TURN, VICUNA_ROLES, "ASSISTANT")
    turns = tuple(Message(turn.role, turn.content.removesuffix("</s>").rstrip()) for turn in turns)
    if not turns:
        return [Example(Prompt(_question(text)), answer, (), origin)]
    prompt = (Message("system", opening), *turns) if opening else turns
    return [Example(Prompt(checked_prompt(prompt, "prompt")), answer, (), origin)]


def read_zhihu(row: Row, origin: str) -> list[Example]:
    """`INSTRUCTION` with a `RESPONSE`."""
    return [_answered(text_field(row, "INSTRUCTION"), text_field(row, "RESPONSE"), origin)]


def read_miracl(row: Row, origin: str) -> list[Example]:
    """`query` with the first of `positive_passages` before the first of `negative_passages`, where there is one."""
    query, positive, negative = text_field(row, "query"), row.get("positive_passages"), row.get("negative_passages")
    if not positive:
        raise UnansweredRowError("without a positive passage", "field 'positive_passages' is empty")
    chosen = text_field(_first(positive, "positive_passages"), "text")
    if not negative:
        return [_answered(query, chosen, origin)]
    rejected = text_field(_first(negative, "negative_passages"), "text")
    return [pair(_question(query), chosen, rejected, origin)]


def read_hc3(row: Row, origin: str) -> list[Example]:
    """`question` with the first of `human_answers`."""
    answers = row.get("human_answers")
    if not answers:
        raise UnansweredRowError("without an answer of a person", "field 'human_answers' is empty")
    return [_answered(text_field(row, "question"), _first_text(answers, "human_answers"), origin)]


def read_mkqa(language: str) -> Callable[[Row, str], list[Example]]:
    """The reader of one language: `queries.LANGUAGE` with the first of `answers.LANGUAGE`."""

    def read(row: Row, origin: str) -> list[Example]:
        answers = _objects(_part(row, "answers", language))
        if not answers or not answers[0].get("text"):
            raise UnansweredRowError("that MKQA calls unanswerable", f"field 'answers.{language}' has no text")
        query = text_field({"queries": _part(row, "queries", language)}, "queries")
        return [_answered(query, text_field(answers[0], "text"), origin)]

    return read


def read_qg_jaquad(row: Row, origin: str) -> list[Example]:
    """`question` with the `sentence` that answers it."""
    return [_answered(text_field(row, "question"), text_field(row, "sentence"), origin)]


def read_qag_jaquad(row: Row, origin: str) -> list[Example]:
    """The first of `questions` with the `paragraph` that answers it."""
    questions = row.get("questions")
    if not questions:
        raise UnansweredRowError("without a question", "field 'questions' is empty")
    return [_answered(_first_text(questions, "questions"), text_field(row, "paragraph"), origin)]


def read_local_jsonfile(row: Row, origin: str) -> list[Example]:
    """`prompt` in the form "Human: … Assistant:" with `chosen` and, for step 2, `rejected`."""
    prompt, chosen = prompt_of(field(row, "prompt")), text_field(row, "chosen")
    if row.get("rejected") is None:
        return [Example(Prompt(prompt), chosen, (), origin)]
    return [pair(prompt, chosen, text_field(row, "rejected"), origin)]


# ------------------------------------------------------------------------------------------------- those of today


def read_ultrafeedback(row: Row, origin: str) -> list[Example]:
    """`chosen` and `rejected` as messages after the same prompt; where their scores are equal they are a tie."""
    prompt, chosen = conversation(field(row, "chosen"), "chosen")
    _, rejected = conversation(field(row, "rejected"), "rejected")
    scores = [row.get("score_chosen"), row.get("score_rejected")]
    if None not in scores and scores[0] == scores[1] and chosen:
        return [Example(Prompt(checked_prompt(prompt, "chosen")), chosen, (), origin)]
    return [pair(checked_prompt(prompt, "chosen"), chosen, rejected, origin)]


# ------------------------------------------------------------------------------------------------ parts of readers


def _question(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def _answered(question: str, answer: str, origin: str) -> Example:
    return Example(Prompt(_question(question)), answer, (), origin)


def _first(value: Any, name: str) -> Row:
    """The first object of a list of them (or of lists by field, as older versions of `datasets` have it)."""
    objects = _objects(value)
    if not objects:
        raise wrong_type(value, name, "a list of objects")
    return objects[0]


def _first_text(value: Any, name: str) -> str:
    if not isinstance(value, list):
        raise wrong_type(value, name, "a list of texts")
    return text_field({name: value[0]}, name)


def _objects(value: Any) -> list[Row]:
    if isinstance(value, dict) and all(isinstance(values, list) for values in value.values()):
        return [dict(zip(value, values, strict=True)) for values in zip(*value.values(), strict=False)]
    return value if isinstance(value, list) and all(isinstance(item, dict) for item in value) else []


def _part(row: Row, name: str, key: str) -> Any:
    value = field(row, name)
    if not isinstance(value, dict):
        raise wrong_type(value, name, "an object with a field for each language")
    if key not in value:
        raise BadRowError(f"without '{name}.{key}'", f"field '{name}.{key}' is missing")
    return value[key]


# ------------------------------------------------------------------------------------------------------- the names


def _same_as(format_name: str, name: str) -> RowFormat:
    """A dataset whose rows are of a known format."""
    return replace(FORMATS[format_name], name=name)


def _own(name: str, columns: str, read: Callable[[Row, str], list[Example]], optional: str = "") -> RowFormat:
    """A dataset with columns of its own."""
    return RowFormat(name, (tuple(columns.split()),), f"the rows of {name}", read, tuple(optional.split()))


_DATASETS = (
    PublishedDataset(_same_as("preference", "Dahoas/rm-static")),
    PublishedDataset(_same_as("preference", "Dahoas/full-hh-rlhf")),
    PublishedDataset(_same_as("preference", "Dahoas/synthetic-instruct-gptj-pairwise")),
    PublishedDataset(_own("yitingxie/rlhf-reward-datasets", "prompt chosen rejected", read_yitingxie)),
    PublishedDataset(
        _own("openai/webgpt_comparisons", "question answer_0 score_0 answer_1 score_1", read_webgpt),
    ),
    PublishedDataset(_own("stanfordnlp/SHP", "history human_ref_A human_ref_B labels", read_shp)),
    PublishedDataset(_own("pvduy/sharegpt_alpaca_oa_vicuna_format", "prompt label", read_sharegpt_vicuna)),
    PublishedDataset(_own("local/jsonfile", "prompt chosen", read_local_jsonfile, "rejected")),
    PublishedDataset(_own("wangrui6/Zhihu-KOL", "INSTRUCTION RESPONSE", read_zhihu)),
    PublishedDataset(
        _own("Cohere/miracl-zh-queries-22-12", "query positive_passages", read_miracl, "negative_passages")
    ),
    PublishedDataset(
        _own("Cohere/miracl-ja-queries-22-12", "query positive_passages", read_miracl, "negative_passages")
    ),
    PublishedDataset(_own("Hello-SimpleAI/HC3-Chinese", "question human_answers", read_hc3), subset="all"),
    PublishedDataset(_own("mkqa-Chinese", "queries answers", read_mkqa("zh_cn")), hub_id="apple/mkqa"),
    PublishedDataset(_own("mkqa-Japanese", "queries answers", read_mkqa("ja")), hub_id="apple/mkqa"),
    PublishedDataset(_own("lmqg/qg_jaquad", "question sentence", read_qg_jaquad)),
    PublishedDataset(_own("lmqg/qag_jaquad", "questions paragraph", read_qag_jaquad)),
    PublishedDataset(_same_as("implicit_preference", "Anthropic/hh-rlhf")),
    PublishedDataset(
        _own(
            "HuggingFaceH4/ultrafeedback_binarized",
            "chosen rejected",
            read_ultrafeedback,
            "score_chosen score_rejected",
        ),
        hub_split="train_prefs",
    ),
    PublishedDataset(_same_as("question_answer", "openai/gsm8k"), subset="main"),
    PublishedDataset(_same_as("alpaca", "tatsu-lab/alpaca")),
    PublishedDataset(_same_as("oasst_messages", "OpenAssistant/oasst1")),
    PublishedDataset(_same_as("messages", "HuggingFaceH4/ultrachat_200k"), hub_split="train_sft"),
)

PUBLISHED: dict[str, PublishedDataset] = {dataset.row_format.name: dataset for dataset in _DATASETS}


def published_of(section: SourceSection) -> PublishedDataset | None:
    """The published dataset that a source names in `format`, or whose name its path is or ends with."""
    if section.format != "auto":
        return PUBLISHED.get(section.format)
    if len(section.path) != 1:
        return None
    path = section.path[0].replace("\\", "/").rstrip("/")
    return next((known for name, known in PUBLISHED.items() if path == name or path.endswith(f"/{name}")), None)


def located(section: SourceSection) -> SourceSection:
    """The section with what a published name leaves out: the Hub id, the configuration, and the split.

    A path that exists here is left as it is, and so is what the section says itself.
    """
    known = published_of(section)
    if known is None or Path(section.path[0]).exists():
        return section
    name = known.row_format.name
    hub_id = known.hub_id or name
    if section.path not in ([name], [hub_id]):
        return section
    return section.model_copy(
        update={
            "path": [hub_id],
            "name": section.label,
            "subset": section.subset or known.subset,
            "hub_split": section.hub_split or known.hub_split,
            "format": name,
        }
    )
