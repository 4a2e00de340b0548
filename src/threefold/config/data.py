"""Settings of the data: which datasets, how they are read, split over the steps, blended and cut to length."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from threefold.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

DEMO = "demo"
_OF_FILES = ("format", "mapping", "subset", "hub_split", "revision", "streaming", "reasoning")

Names = Annotated[list[str], Field(min_length=1), BeforeValidator(lambda value: _listed(value))]


def _listed(value: Any) -> Any:
    """One text stands for a list of it."""
    return [value] if isinstance(value, str) else value


def _as_source(value: Any) -> Any:
    """A text stands for the source of that path."""
    return {"path": [value]} if isinstance(value, str) else value


class SourceSection(Section):
    """One dataset: a text in data.sources stands for one with this path and all else left as it is."""

    path: Names
    """Files (json, jsonl, csv, tsv, parquet, txt, also .gz and .zst), patterns such as data/*.jsonl, directories of
    datasets.save_to_disk, one Hub id, "demo", or one python:MODULE:FUNCTION; paths are relative to where the command
    is run."""
    name: str = ""
    """What messages and the manifest call it; empty means its path."""
    format: str = "auto"
    """auto detects it from the columns; or the name of a format or of a published dataset (docs/data.md lists
    them)."""
    mapping: dict[str, str] = {}
    """What a format calls a column = what your file calls it, as in {prompt = "question", chosen = "good"}."""
    subset: str = ""
    """Configuration of a Hub dataset that has several, as gsm8k's "main"."""
    hub_split: str = ""
    """Split of a Hub dataset; empty means train, or what the dataset calls it."""
    revision: str = "main"
    """Branch, tag or commit of a Hub dataset."""
    streaming: bool = False
    """Read the first max_rows rows and stop; a Hub dataset is then not downloaded whole."""
    split: Annotated[list[NonNegativeFloat], Field(max_length=3)] = []
    """Proportions of this dataset's prompts that steps 1, 2 and 3 get; empty means data.split."""
    sft_only: bool = False
    """All of it to step 1, the same as split = [1, 0, 0]."""
    max_rows: NonNegativeInt = 0
    """At most this many examples (most formats give one for each row), chosen by their content and the seed; with
    streaming, the first rows. 0 takes all."""
    epochs: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often a pass over the data takes each of its rows; not beside data.weights or data.temperature."""
    reasoning: Literal["none", "english", "chinese"] = "none"
    """Ask for the steps and a final answer (chain-of-thought prompting, Wei et al. 2022), in this language."""
    few_shot: NonNegativeInt = 0
    """Worked examples that are shown before each question, with reasoning."""
    few_shot_file: str = ""
    """File of question and answer rows to take them from; empty takes built-in ones."""

    @property
    def label(self) -> str:
        """Its name in messages."""
        return self.name or ",".join(self.path)

    def shares(self, default: list[float]) -> list[float]:
        """Proportions of the three steps."""
        return [1.0, 0.0, 0.0] if self.sft_only else self.split or default

    @model_validator(mode="after")
    def _consistent(self) -> SourceSection:
        if self.split and (len(self.split) != 3 or sum(self.split) <= 0):
            raise ValueError(f"split {self.split} must have three numbers, at least one of them above 0")
        if self.split and self.sft_only:
            raise ValueError("sft_only and split say two things: give one of them")
        if self.reasoning == "none" and (self.few_shot or self.few_shot_file):
            raise ValueError('few_shot needs reasoning = "english" or "chinese"')
        if DEMO in self.path and len(self.path) > 1:
            raise ValueError('"demo" is a source of its own: list it apart from files')
        if self.few_shot_file and not self.few_shot:
            raise ValueError("few_shot_file is given and few_shot is 0, so none of its examples would be shown")
        if DEMO in self.path:
            unused = [name for name in _OF_FILES if getattr(self, name) != type(self).model_fields[name].default]
            if unused:
                raise ValueError(
                    f'{unused[0]} is for datasets that are read, and does nothing for "demo": leave it out'
                )
        return self


Source = Annotated[SourceSection, BeforeValidator(_as_source)]


class DemoDataSection(Section):
    """The embedded conversations, when data.sources names "demo"."""

    num_prompts: PositiveInt = 12000
    """Different prompts to generate."""
    flawed_fraction: Fraction = 0.65
    """Share of the demonstrations that have a flaw, so that step 1 leaves something to win."""
    flip_rate: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Share of preference pairs labelled the wrong way round on average (Bradley-Terry noise)."""


class DataSection(Section):
    sources: Annotated[list[Source], Field(min_length=1)] = [SourceSection(path=[DEMO])]
    """Datasets: each a path, or a table [[data.sources]] with the fields listed there."""
    weights: list[PositiveFloat] = []
    """Share of the examples that each source gives, in the order of data.sources; empty is by their sizes."""
    temperature: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Above 1 gives small sources more: shares are proportional to size ** (1 / temperature)."""
    split: Annotated[list[NonNegativeFloat], Field(min_length=3, max_length=3)] = [2, 4, 4]
    """Proportions of the prompts that steps 1, 2 and 3 get; a prompt is in one of them only, whatever source it is
    from."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of each step's prompts that is held out for its evaluation."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Longest prompt plus answer, tokens, in steps 1 and 2."""
    max_prompt_length: PositiveInt = 256
    """Longest prompt, tokens, in step 3 (DeepSpeed-Chat: max_prompt_seq_len)."""
    long_rows: Literal["error", "drop", "truncate"] = "error"
    """What to do with a row longer than max_length or max_prompt_length: truncate leaves out whole turns and drops what
    cannot be shortened so; both are counted and shown."""
    truncate_side: Literal["left", "right"] = "left"
    """left leaves out the oldest turns, right the last ones; right is for step 1 only, as a prompt, or an answer that
    is compared, stands at the end of its conversation."""
    bad_rows: Literal["error", "drop"] = "error"
    """What to do with a row that cannot be used (a missing field, chosen equal to rejected, turns that the chat
    template refuses); drops are counted and shown."""
    doctor: Literal["fast", "off"] = "fast"
    """fast looks at some rows before training starts: what `threefold doctor` calls an error stops the run, warnings
    are shown."""
    cache_dir: str = ""
    """Where prepared data are kept; empty means $XDG_CACHE_HOME/threefold or ~/.cache/threefold."""
    demo: DemoDataSection = DemoDataSection()

    @model_validator(mode="after")
    def _split_is_not_empty(self) -> DataSection:
        if sum(self.split) <= 0:
            raise ValueError("split needs at least one share above 0")
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> DataSection:
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(f"weights has {len(self.weights)} numbers for {len(self.sources)} sources: give one each")
        if self.weights and self.temperature != 1:
            raise ValueError("weights and temperature both say how to blend the sources: give one of them")
        if (self.weights or self.temperature != 1) and any(source.epochs != 1 for source in self.sources):
            raise ValueError("a source's epochs says how often its rows are taken, and so do weights: give one of them")
        labels = [source.label for source in self.sources]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two sources are called {label!r}: give each a name of its own, or list it once")
        return self
