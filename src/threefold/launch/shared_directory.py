"""Whether all processes of a run see one output directory."""

from __future__ import annotations

import secrets
import socket
import time
from pathlib import Path

from threefold.checkpoint.files import TEMPORARY
from threefold.engine.distributed import World
from threefold.errors import ConfigError

APPEAR_SECONDS = 30.0
"""Network file systems show a new file on other machines only after a while."""
_POLL_SECONDS = 0.2


def check_shared(directory: Path, world: World) -> None:
    """Make sure that every process sees what the first one writes; collective, after the first has made the directory.

    Raises:
        ConfigError: on every process, with the hosts that do not.
    """
    if world.size == 1:
        return
    token: str = world.from_first(lambda: _write_token(directory))
    try:
        seen = world.gather((socket.gethostname(), _appears(directory / token)))
    finally:
        if world.is_first:
            (directory / token).unlink(missing_ok=True)
    blind = sorted({host for host, sees in seen if not sees})
    if blind:
        raise ConfigError(
            f"{directory}: {', '.join(blind)} does not see there what {seen[0][0]} has written: the output directory "
            "must be on a file system that all machines share"
        )


def _write_token(directory: Path) -> str:
    for left in directory.glob(f".shared-*{TEMPORARY}"):  # by a run that was killed meanwhile
        left.unlink(missing_ok=True)
    name = f".shared-{secrets.token_hex(8)}{TEMPORARY}"
    (directory / name).touch()
    return name


def _appears(path: Path) -> bool:
    end = time.monotonic() + APPEAR_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_SECONDS)
    return True
