"""Command lines: a few flags of a command's own, and the recipe's fields as dotted overrides beside them."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from threefold.errors import ConfigError

_MIN_FLAG_LIKENESS = 0.75  # difflib's ratio from which an unknown flag is taken for a misspelt one of the command's own


class CommandParser(argparse.ArgumentParser):
    """argparse for the flags of one command, whose mistakes are one-line ConfigErrors with the nearest right flag.

    Flags may be spelled with hyphens or underscores. None may be abbreviated: a new flag must break nobody's script.
    """

    def __init__(self, **settings: Any) -> None:
        self.flags: list[str] = []
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        """As argparse's, and keeps the flag's names for `split` and for "did you mean"."""
        self.flags += [name for name in names if name.startswith("-")]
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise the one line that argparse would print after its usage text."""
        plain = message.replace("invalid int value", "not a whole number").replace(
            "invalid float value", "not a number"
        )
        raise ConfigError(f"{plain} ({self.prog} --help shows how)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse arguments that are all this command's own.

        Raises:
            ConfigError: an unknown flag, a missing or an ill-typed value.
        """
        own, unknown = self.split(arguments)
        if unknown:
            self.error(f"unknown flag {unknown[0].split('=')[0]}")
        return self.parse_own(own)

    def parse_own(self, own: Sequence[str]) -> argparse.Namespace:
        """Parse the first part of what `split` gives."""
        namespace, unexpected = self.parse_known_args(own)
        if unexpected:
            self.error(f"unexpected {unexpected[0]!r}")
        return namespace

    def split(self, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
        """Cut a command line into this command's own arguments and the dotted overrides, `--name [value]`, in it.

        Raises:
            ConfigError: an unknown flag that is nearly one of the command's own.
        """
        own: list[str] = []
        overrides: list[str] = []
        rest = list(arguments)
        while rest:
            argument = rest.pop(0)
            name, equals, value = argument.partition("=")
            if not argument.startswith("--"):
                own.append(argument)
            elif name.replace("_", "-") in self.flags:
                own.append(name.replace("_", "-") + equals + value)
            else:
                self._refuse_misspelt(name)
                overrides.append(argument)
                if not equals and rest and not rest[0].startswith("--"):
                    overrides.append(rest.pop(0))
        return own, overrides

    def _refuse_misspelt(self, name: str) -> None:
        nearest = difflib.get_close_matches(name.replace("_", "-"), self.flags, n=1, cutoff=_MIN_FLAG_LIKENESS)
        if "." not in name and nearest:
            raise ConfigError(f"unknown flag {name}: did you mean {nearest[0]}?")


def given_arguments(argv: Sequence[str] | None) -> list[str]:
    """The arguments that a caller passed, or those of this process."""
    return list(sys.argv[1:] if argv is None else argv)


def add_step_flag(parser: CommandParser) -> None:
    """Add `--step 1 2 3`; read it with `chosen_steps`."""
    parser.add_argument(
        "--step",
        type=_step_number,
        nargs="+",
        default=[1, 2, 3],
        metavar="N",
        help="steps to run: 1 supervised fine-tuning, 2 reward model, 3 PPO (default: 1 2 3)",
    )


def chosen_steps(namespace: argparse.Namespace) -> tuple[int, ...]:
    """The steps of `--step`, in order and each once."""
    return tuple(sorted(set(namespace.step)))


def _step_number(text: str) -> int:
    if text not in ("1", "2", "3"):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no step: give 1, 2 or 3 (a recipe's file name goes before --step)"
        )
    return int(text)
