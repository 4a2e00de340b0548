"""The rules of CONTRIBUTING.md that a machine can check, each proven on an example that breaks it.

A checker takes sources (path relative to src/threefold -> text) and returns its findings as lines for a reader.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "threefold"

LEVELS = {
    "types": 0, "errors": 0, "algo": 0, "interrupt": 0,
    "config": 1, "metrics": 1, "machine": 1,
    "data": 2, "models": 2, "inference": 2,
    "engine": 3, "checkpoint": 3,
    "stages": 4, "plan": 4, "report": 4, "summary": 4,
    "pipeline": 5, "doctor": 5, "serve": 5, "compat": 5, "bench": 5, "launch": 5,
    "cli": 6, "__main__": 7,
}  # fmt: skip

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

OPTIONAL_DEPENDENCIES: frozenset[str] = frozenset()
"""Libraries of an extra that is not always installed: only these may be imported inside a function."""

Sources = dict[str, str]


@dataclass(frozen=True)
class Owner:
    """An act that only some files may do.

    `names` is matched against a whole dotted name with import aliases resolved (`F.pad` -> `torch.nn.functional.pad`);
    what a name hangs on that is no plain name (a call, an index) reads `?`.
    """

    act: str
    files: tuple[str, ...]
    names: str


OWNERS = (
    Owner(
        "reads the command line or a file of settings",
        ("config/",),
        r"sys\.(orig_)?argv|tomllib(\..+)?|argparse\.ArgumentParser",
    ),
    Owner(
        "pads",
        ("data/collate.py",),
        r"(.+\.)?(pad_sequence|pad_packed_sequence)|torch\.nn\.functional\.pad|torch\.constant_pad_nd|(.+\.)?\w*tokenizer\.pad",
    ),
    Owner(
        "draws a token",
        ("inference/sampling.py",),
        r"(.+\.)?(multinomial|exponential_|gumbel_softmax|Categorical)|(.+\.)?\w*model\.generate",
    ),
    Owner(
        "names a backend of collective operations",
        ("engine/distributed.py",),
        r"torch\.distributed\.(init_process_group|new_group|destroy_process_group)",
    ),
    Owner(
        "renders a conversation as text", ("data/rendering.py",), r"(.+\.)?(apply_chat_template|render_jinja_template)"
    ),
    Owner(
        "replaces files of a run",
        ("checkpoint.py", "checkpoint/", "data/cache.py"),
        r"(os|shutil)\.(replace|rename|renames|move)|torch\.save",
    ),
)


def project_sources() -> Sources:
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    assert {"types.py", "cli.py", "algo/losses.py"} <= sources.keys()
    return sources


def project_texts() -> Sources:
    """Everything of the repository that a person reads, tests included."""
    roots = ["src", "tests", "docs", "recipes", "benchmarks", ".ci"]
    kinds = {".py", ".md", ".toml", ".txt", ".jinja", ".sh", ""}
    paths = [path for root in roots for path in (ROOT / root).rglob("*") if "egg-info" not in str(path)]
    paths += ROOT.iterdir()
    return {
        path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
        for path in sorted(paths)
        if path.is_file() and path.suffix in kinds and not path.name.startswith(".coverage")
    }


# ---------------------------------------------------------------------------------------------------- import levels


def package_of(path: str) -> str:
    """The folder or module directly under threefold that a file belongs to; "" for threefold/__init__.py."""
    top = path.split("/")[0].removesuffix(".py")
    return "" if top == "__init__" else top


def imported_modules(path: str, node: ast.Import | ast.ImportFrom) -> list[str]:
    """Full dotted names of what one import statement may load; for `from a import b` that is a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        folders = ["threefold", *path.split("/")[:-1]]
        base = ".".join([*folders[: len(folders) - node.level + 1], *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for module in imported_modules(path, node):
                yield node.lineno, module


def packages_imported(path: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, package) of each import of another package of threefold."""
    for line, module in imports(path, ast.parse(text)):
        parts = module.split(".")
        if (
            parts[0] == "threefold"
            and len(parts) > 1
            and parts[1] != package_of(path)
            and not parts[1].startswith("__v")
        ):
            yield line, parts[1]


def check_levels(sources: Sources) -> list[str]:
    """Imports go to a lower level; among packages of one level they may not go round in a circle."""
    findings = [
        f"{path}: '{package_of(path)}' has no level" for path in sources if package_of(path) not in {"", *LEVELS}
    ]
    same_level: dict[str, set[str]] = {}
    for path, text in sources.items():
        package = package_of(path)
        for line, other in packages_imported(path, text):
            if other not in LEVELS:
                findings.append(f"{path}:{line}: imports '{other}', which has no level")
            elif package not in LEVELS or LEVELS[other] > LEVELS[package]:
                findings.append(f"{path}:{line}: '{package}' imports '{other}' from above")
            elif LEVELS[other] == LEVELS[package]:
                same_level.setdefault(package, set()).add(other)
    circular = [start for start in sorted(same_level) if start in reachable(same_level, start)]
    return findings + [f"'{package}' and a package of its level import each other" for package in circular]


def reachable(edges: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(edges.get(start, ()))
    while waiting:
        package = waiting.pop()
        if package not in seen:
            seen.add(package)
            waiting += edges.get(package, ())
    return seen


def test_imports_go_down_only() -> None:
    assert check_levels(project_sources()) == []


@pytest.mark.parametrize(
    "bad",
    [
        {"algo/kl.py": "from threefold.config.recipe import Recipe"},
        {"algo/kl.py": "import threefold.stages.ppo as ppo"},
        {"data/split.py": "from threefold import cli"},
        {"data/sources/demo.py": "from ...stages import sft"},
        {"engine/train.py": "if True:\n    def f():\n        from threefold.pipeline import run"},
        {"__init__.py": "from threefold.types import Message"},
        {"data/chat.py": "import threefold.models.loading", "models/loading.py": "from ..data import chat"},
        {
            "data/a.py": "import threefold.models",
            "models/a.py": "import threefold.inference",
            "inference/a.py": "import threefold.data",
        },
        {"helpers.py": ""},
        {"cli.py": "import threefold.helpers"},
    ],
)  # fmt: skip
def test_check_levels_finds(bad: Sources) -> None:
    assert check_levels(bad) != []


def test_check_levels_allows_what_is_meant() -> None:
    good = {
        "stages/ppo.py": "from threefold.types import Rollout\nfrom threefold.stages import rollout\nimport torch",
        "stages/sft.py": "from . import rollout\nfrom ..errors import DataError",
        "inference/generate.py": "from threefold.data.collate import pad_left",
        "cli.py": "from threefold import __version__, pipeline",
    }
    assert check_levels(good) == []


# ------------------------------------------------------------------------------------------ imports inside functions


def check_imports_inside_functions(sources: Sources) -> list[str]:
    findings = set()
    for path, text in sources.items():
        for function in functions(ast.parse(text)):
            for line, module in imports(path, function):
                if module.split(".")[0] not in OPTIONAL_DEPENDENCIES:
                    findings.add(f"{path}:{line}: imports {module} inside a function")
    return sorted(findings)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_import_inside_a_function() -> None:
    assert check_imports_inside_functions(project_sources()) == []


def test_check_imports_inside_functions_finds() -> None:
    bad = {
        "data/a.py": "class A:\n  def f(self):\n    if self:\n      from . import chat\n    import json\n",
    }
    assert len(check_imports_inside_functions(bad)) == 2
    assert check_imports_inside_functions({"data/a.py": "import json\ndef f(): ..."}) == []


# ---------------------------------------------------------------------------------------------- declared libraries

COME_WITH = {"pydantic_core": "pydantic", "annotated_types": "pydantic", "huggingface_hub": "transformers"}
"""Parts of a declared library that have a name of their own, and what it raises errors of."""

NEEDED_UNSEEN = {"tensorboard"}
"""Imported for us by another library (torch.utils.tensorboard)."""


def check_declared(sources: Sources, requirements: list[str]) -> list[str]:
    """Each library that is imported is declared; each that is declared is imported, or is known to be needed unseen."""
    declared = {re.split(r"[^\w.-]", requirement)[0].replace("-", "_").lower() for requirement in requirements}
    imported: dict[str, str] = {}
    for path, text in sources.items():
        for line, module in imports(path, ast.parse(text)):
            top = module.split(".")[0]
            if top not in sys.stdlib_module_names | {"threefold"}:
                imported.setdefault(COME_WITH.get(top, top), f"{path}:{line}")
    return [f"{where}: {name} is not declared" for name, where in imported.items() if name not in declared] + [
        f"{name} is declared and nothing imports it" for name in sorted(declared - imported.keys() - NEEDED_UNSEEN)
    ]


def test_libraries_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert check_declared(project_sources(), project["dependencies"]) == []


def test_check_declared_finds() -> None:
    sources = {"a.py": "import os, json\nfrom tomli_w import dumps\nimport pydantic_core\nfrom . import b"}
    assert check_declared(sources, ["tomli-w>=1", "pydantic>=2,<3"]) == []
    assert check_declared(sources, ["tomli-w>=1"]) == ["a.py:3: pydantic is not declared"]
    assert check_declared(sources, ["tomli-w", "pydantic", "rich>=1"]) == ["rich is declared and nothing imports it"]


# -------------------------------------------------------------------------------------------------------------- size


def check_sizes(sources: Sources) -> list[str]:
    findings = []
    for path, text in sources.items():
        lines = len(text.splitlines())
        if lines > MAX_FILE_LINES:
            findings.append(f"{path}: {lines} lines, at most {MAX_FILE_LINES}")
        for function in functions(ast.parse(text)):
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                findings.append(
                    f"{path}:{function.lineno}: {function.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"
                )
    return findings


def test_files_and_functions_stay_small() -> None:
    assert check_sizes(project_sources()) == []


def test_check_sizes_finds() -> None:
    def function(lines: int) -> str:
        return "async def f():\n" + "    x = 1\n" * (lines - 1)

    assert len(check_sizes({"a.py": "x = 1\n" * 501})) == 1
    assert check_sizes({"a.py": "x = 1\n" * 500}) == []
    assert len(check_sizes({"a.py": function(61)})) == 1
    assert check_sizes({"a.py": function(60)}) == []


# ------------------------------------------------------------------------------------------------ one owner per act


def names_used(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every name, attribute and import, with the names that imports bind resolved."""
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias, module in zip(node.names, imported_modules(path, node), strict=True):
                yield node.lineno, module
                if alias.asname or isinstance(node, ast.ImportFrom):
                    bound[alias.asname or alias.name] = module
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            yield node.lineno, dotted(node, bound)


def dotted(node: ast.expr, bound: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return bound.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, bound)}.{node.attr}"
    return "?"


def check_owners(sources: Sources) -> list[str]:
    findings = set()
    for path, text in sources.items():
        for line, name in names_used(path, ast.parse(text)):
            for owner in OWNERS:
                if re.fullmatch(owner.names, name) and not path.startswith(owner.files):
                    findings.add(f"{path}:{line}: {name} {owner.act}: only {' and '.join(owner.files)} may")
    return sorted(findings)


def test_each_act_has_one_owner() -> None:
    assert check_owners(project_sources()) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("cli.py", "import sys\nmain(sys.argv[1:])"),
        ("cli.py", "from sys import argv"),
        ("cli.py", "import argparse\nparser = argparse.ArgumentParser()"),
        ("stages/sft.py", "import tomllib"),
        ("stages/sft.py", "from tomllib import load"),
        ("stages/ppo.py", "import torch.nn.functional as F\nF.pad(x, (0, 1))"),
        ("stages/ppo.py", "import torch\ntorch.nn.functional.pad(x, (0, 1))"),
        ("data/split.py", "from torch.nn.utils.rnn import pad_sequence as p"),
        ("data/split.py", "batch = self.tokenizer.pad(rows)"),
        ("inference/generate.py", "import torch\nids = torch.multinomial(p, 1)"),
        ("inference/generate.py", "ids = logits.softmax(-1).multinomial(1)"),
        ("serve/chat.py", "self.model.generate(ids)"),
        ("serve/chat.py", "text = tokenizers[0].apply_chat_template(messages)"),
        ("pipeline.py", "import os\nos.replace(a, b)"),
        ("stages/ppo.py", "import torch\ntorch.save(state, path)"),
        ("checkpoint/training.py", "import torch.distributed as dist\ngroup = dist.new_group(backend='gloo')"),
    ],
)
def test_check_owners_finds(path: str, text: str) -> None:
    assert check_owners({path: text}) != []


def test_check_owners_allows_the_owner_and_names_that_only_look_alike() -> None:
    good = {
        "config/load.py": "import sys, tomllib\nsys.argv; tomllib.load(f)",
        "data/collate.py": "import torch.nn.functional as F\nF.pad(x, (0, 1))",
        "inference/sampling.py": "p.multinomial(1)",
        "checkpoint.py": "import os\nos.replace(a, b)",
        "stages/ppo.py": "text.replace('a', 'b'); tokenizer.pad_token_id; collate.pad_left(x); generate(model, ids)",
    }
    assert check_owners(good) == []


# ---------------------------------------------------------------------- engine and inference do not know the stages


def check_stage_names(sources: Sources) -> list[str]:
    """The engine trains and inference samples; for which stage is the business of who calls them."""
    return [
        f"{path}:{line}: {name} names a stage"
        for path, text in sources.items()
        if package_of(path) in {"engine", "inference"}
        for line, name in identifiers(ast.parse(text))
        if {"sft", "ppo"} & {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    ]


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "module"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield getattr(node, "lineno", 0), name


def test_engine_and_inference_name_no_stage() -> None:
    assert check_stage_names(project_sources()) == []


@pytest.mark.parametrize("text", ["recipe.ppo", "def sft_loss(): ...", "class PPOTrainer: ...", "def f(*, sft): ..."])
def test_check_stage_names_finds(text: str) -> None:
    assert len(check_stage_names({"engine/train.py": text})) == 1
    assert check_stage_names({"stages/sft.py": text}) == []
    assert check_stage_names({"engine/train.py": "'sft'; supports, shifted"}) == []


# ------------------------------------------------------------------------------------------------------ broad except


def check_broad_except(sources: Sources) -> list[str]:
    findings = []
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler):
                caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            elif isinstance(node, ast.Call) and dotted(node.func, {}).split(".")[-1] == "suppress":
                caught = list(node.args)
            else:
                continue
            if any(name is None or dotted(name, {}) in {"Exception", "BaseException"} for name in caught):
                findings.append(f"{path}:{node.lineno}: catches everything; name the errors that are expected")
    return findings


def test_no_broad_except() -> None:
    assert check_broad_except(project_sources()) == []


@pytest.mark.parametrize("clause", ["except:", "except Exception:", "except (OSError, BaseException) as e:"])
def test_check_broad_except_finds(clause: str) -> None:
    assert len(check_broad_except({"a.py": f"try:\n    f()\n{clause}\n    pass\n"})) == 1
    assert len(check_broad_except({"a.py": "with contextlib.suppress(Exception):\n    f()"})) == 1
    assert check_broad_except({"a.py": "try:\n    f()\nexcept (OSError, KeyboardInterrupt):\n    pass"}) == []


# ------------------------------------------------------------------------------------------- paths of one machine

MACHINE_PATH = re.compile(r"(?<![\w./}*-])/(?:work|root|tmp|home|Users)/")


def check_machine_paths(texts: Sources) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()[:80]}"
        for path, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]


def test_no_path_of_one_machine() -> None:
    texts = project_texts()
    assert {"pyproject.toml", "src/threefold/types.py", "tests/test_structure.py"} <= texts.keys()
    assert check_machine_paths(texts) == []


def test_check_machine_paths_finds() -> None:
    for folder in ("root", "tmp", "home", "work"):
        assert len(check_machine_paths({"a.md": f"first\nsee `{'/' + folder}/model` for it"})) == 1
    assert check_machine_paths({"a.md": "data/work/a.txt, ../tmp/b, $HOME/x and /usr/bin/python3"}) == []
