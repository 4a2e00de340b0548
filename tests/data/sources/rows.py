"""Rows to write, and short ways to read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from threefold.config.data import DemoDataSection, SourceSection
from threefold.data.sources import SourceReading, open_source
from threefold.types import Example, Message

DEMO = DemoDataSection(num_prompts=30)
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": " Hello \n"}
GO = {"role": "assistant", "content": "Go"}
KIND = {"role": "system", "content": "Be kind."}
GOOD = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
ASKED = [{"from": "human", "value": "Hi"}]
ANSWERED = [*ASKED, {"from": "gpt", "value": "Hello"}]


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


def write(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def opened(tmp_path: Path, *rows: Any, **section: Any) -> SourceReading:
    return open_source(SourceSection(path=[write(tmp_path, *rows)], **section), DEMO, 0, "error")


def read(tmp_path: Path, *rows: Any, **section: Any) -> list[Example]:
    return list(opened(tmp_path, *rows, **section))
