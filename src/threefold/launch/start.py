"""Whether this process trains by itself, is one of several that train, or starts them."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence

from threefold.config.load import dump_recipe
from threefold.config.recipe import Recipe
from threefold.config.scale import LaunchSection
from threefold.engine.distributed import launched
from threefold.interrupt import heard_as_request
from threefold.launch.agent import launch
from threefold.launch.hostfile import Remotes
from threefold.launch.layout import check_launched, layout_of


def start(recipe: Recipe, work: Callable[[], None], arguments: Sequence[str]) -> None:
    """Train as recipe.launch says: here, or in processes of their own.

    Args:
        work: the training, which joins the other processes where torchrun has started this one.
        arguments: of the command `threefold` with which another process, here or on another machine, does the same.

    Raises:
        ConfigError: recipe.launch asks for what cannot be; else what `work` and `agent.launch` raise.
    """
    if launched():
        check_launched(recipe, int(os.environ["WORLD_SIZE"]))
        work()
        return
    layout = layout_of(recipe)
    if layout.total == 1:
        heard_as_request()
        work()
        return
    remotes = None
    if layout.others:
        remotes = Remotes(layout.others, recipe.launch.remote_shell, arguments, (layout.host, layout.port))
        remotes.check()
    command = [sys.executable, "-P", "-m", "threefold", *arguments]
    launch(command, layout, recipe.launch, _digest(recipe), remotes)


def _digest(recipe: Recipe) -> str:
    """Of all that must be the same on every machine."""
    text = dump_recipe(recipe.model_copy(update={"launch": LaunchSection()}))
    return hashlib.sha256(text.encode()).hexdigest()
