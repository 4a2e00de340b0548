"""What a checkpoint consists of: manifest.json lists each of its files with length and sha256, and is written last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threefold.checkpoint.files import hash_of, write_json

MANIFEST_FILE = "manifest.json"


class DamagedError(Exception):
    """A checkpoint is not as it was written; the message says which file, and what is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says.

    Attributes:
        format: of the directory's layout; see training.FORMAT.
        key: of the settings that the checkpoint is of.
        step: that it was written after.
        world_size: processes that wrote it.
        files: name -> {"bytes", "sha256"}.
    """

    format: int
    key: str
    step: int
    world_size: int
    files: Mapping[str, Mapping[str, Any]]


def file_entry(path: Path) -> dict[str, Any]:
    """Length and sha256 of a file as it is on disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, with a hash of its own content."""
    content = vars(manifest) | {"files": {name: dict(entry) for name, entry in manifest.files.items()}}
    write_json(directory / MANIFEST_FILE, content | {"content_sha256": hash_of(content)})


def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json itself, not the files that it lists.

    Raises:
        DamagedError: it is missing, cut or changed.
    """
    try:
        content = json.loads((directory / MANIFEST_FILE).read_bytes())
        claimed = content.pop("content_sha256")
        manifest = Manifest(**content)
    except FileNotFoundError as error:
        raise DamagedError(f"has no {MANIFEST_FILE}") from error
    except OSError as error:
        raise DamagedError(f"{MANIFEST_FILE} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST_FILE} is cut or damaged") from error
    if claimed != hash_of(content) or directory.name != step_name(manifest.step):
        raise DamagedError(f"{MANIFEST_FILE} was changed after it was written")
    return manifest


def check_files(directory: Path, manifest: Manifest, share: int, num_shares: int) -> None:
    """Compare this share of the files with the manifest: it takes reading all of them, so each process does its share.

    Raises:
        DamagedError: one is missing, has another length or another content.
    """
    for name in sorted(manifest.files)[share::num_shares]:
        wanted = manifest.files[name]
        path = directory / name
        try:
            size = os.stat(path).st_size
            if size != wanted["bytes"]:
                raise DamagedError(f"{name} has {size} bytes instead of {wanted['bytes']}")
            if file_entry(path) != wanted:
                raise DamagedError(f"{name} was changed after it was written (its sha256 is another)")
        except FileNotFoundError as error:
            raise DamagedError(f"{name} is missing") from error
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from error


def step_name(step: int) -> str:
    """Name of the checkpoint after a step; in order of names is in order of steps."""
    return f"step-{step:08d}"
