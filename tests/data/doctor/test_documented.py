"""docs/doctor.md lists every check that there is, and none that there is not."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCES = [*(ROOT / "src/threefold/data/doctor").glob("*.py"), ROOT / "src/threefold/doctor/command.py"]


def names_in_code() -> set[str]:
    """Texts that are the name of a check: what follows a severity, and the first field of a rule."""
    names = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                place = {"Finding": 1, "TextRule": 0, "RowRule": 0, "_about_all": 0, "_finding": 0, "_leak": 1,
                         "_one_for_many": 2, "finding": 1}.get(called)  # fmt: skip
                if place is not None and place < len(node.args) and isinstance(node.args[place], ast.Constant):
                    names.add(node.args[place].value)
            if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "_FAULTS":
                assert isinstance(node.value, ast.Dict)
                names |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
    return names


def test_every_check_is_documented() -> None:
    rows = [line.split("|")[1] for line in (ROOT / "docs/doctor.md").read_text("utf-8").splitlines() if "|" in line]
    documented = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    assert len(documented) > 45
    assert names_in_code() == documented
