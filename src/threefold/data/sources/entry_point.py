"""Rows that a user's own Python function gives: "python:MODULE:FUNCTION"."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from threefold.errors import DataError

PREFIX = "python:"
USER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What code of others may raise; MemoryError, KeyboardInterrupt and SystemExit are no faults of a dataset."""


def read_entry_point(spec: str) -> Iterator[dict[str, Any]]:
    """Rows of the iterable of dicts that the function returns when called without arguments.

    Raises:
        DataError: there is no such function, it raises, or what it gives is no iterable of dicts or empty.
    """
    function = _function(spec)
    number = 0
    try:
        rows = function()
        if not isinstance(rows, Iterable) or isinstance(rows, str | bytes | Mapping):
            raise DataError(f"{spec}: returned {type(rows).__name__}, and must return an iterable of dicts")
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, Mapping):
                raise DataError(f"{spec} row {number}: is {str(row)[:40]!r}, and must be a dict with named fields")
            yield dict(row)
    except DataError:
        raise
    except USER_ERRORS as error:
        raise _raised(spec, f"raised after {number} rows", error) from error
    if not number:
        raise DataError(f"{spec}: gave no rows; it must give at least one")


def entry_point_fingerprint(spec: str) -> str:
    """sha256 of the module's source and of all rows; where the function has an attribute `fingerprint` (a function that
    returns a text), of that in the place of the rows.

    Raises:
        DataError: there is no such function, or its `fingerprint` raises.
    """
    function = _function(spec)
    digest = hashlib.sha256(spec.encode())
    source = getattr(sys.modules[_names(spec)[0]], "__file__", None)
    if source is not None:
        digest.update(Path(source).read_bytes())
    own = getattr(function, "fingerprint", None)
    if own is None:  # what the function reads may have changed, which nothing but its rows can tell
        for row in read_entry_point(spec):
            digest.update(json.dumps(row, default=str).encode())
    else:
        try:
            digest.update(str(own()).encode())
        except USER_ERRORS as error:
            raise _raised(f"{spec}.fingerprint", "raised", error) from error
    return digest.hexdigest()


def _names(spec: str) -> tuple[str, str]:
    module, separator, function = spec.removeprefix(PREFIX).partition(":")
    if not separator or not module or not function.isidentifier():
        raise DataError(f"{spec}: must be {PREFIX}MODULE:FUNCTION, as in {PREFIX}my_data:rows for rows() in my_data.py")
    return module, function


def _function(spec: str) -> Callable[[], Any]:
    module_name, function_name = _names(spec)
    if os.getcwd() not in sys.path:
        # A module beside the recipe is found as `python -m` finds it; at the end, so that it hides no library.
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise DataError(
                f"{spec}: there is no module {error.name!r} in this directory or among the installed packages"
            ) from error
        raise _raised(spec, "cannot be imported, it raised", error) from error
    except USER_ERRORS as error:
        raise _raised(spec, "cannot be imported, it raised", error) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        what = "has no function" if function is None else "has no function (but a value)"
        raise DataError(f"{spec}: module {module_name!r} {what} {function_name!r}; it has {', '.join(known) or 'none'}")
    return function


def _raised(spec: str, what: str, error: BaseException) -> DataError:
    message = (str(error).splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name} line {frames[-1].lineno})" if frames else ""
    return DataError(f"{spec}: {what} {type(error).__name__}: {message}{place}")
