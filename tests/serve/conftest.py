"""A model that has learnt one answer by heart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import run_stage, tiny_recipe, write_rows


@pytest.fixture(scope="session")
def fox_answer() -> str:
    """Characters of two to four bytes, ends of lines, and what a console could take for markup or an emoji's name."""
    return "Schön: 🦊 und 你好 – [b]:cat:[/b]\n\n-  ok."


@pytest.fixture(scope="session")
def fox(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory, fox_answer: str) -> Path:
    """The tiny model, fine-tuned until it says `fox_answer`, which its tokenizer spells mostly in single bytes."""
    directory = tmp_path_factory.mktemp("fox")
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": fox_answer}]}
        for n in range(40)
    ]
    source = f"--data.sources={write_rows(directory / 'rows.jsonl', rows)}"
    training = ("--sft.max_steps=200", "--sft.epochs=200", "--sft.learning_rate=1e-2", "--sft.eval_every=200")
    recipe = tiny_recipe(source, f"--model.actor={tiny_run / 'sft'}", "--data.split=1,0,0", *training)
    return run_stage("sft", recipe, directory / "run").directory
