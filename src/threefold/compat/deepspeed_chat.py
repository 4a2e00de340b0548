"""The two commands that DeepSpeed-Chat's users know, as recipes of threefold.

`python train.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m --deployment-type single_gpu` stands
for a recipe with the hyper-parameters that DeepSpeed-Chat ships for one GPU, as far as threefold has the field, and so
do single_node and multi_node; compat/deployments.py says what differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from threefold.compat.deployments import (
    GPUS_PER_NODE,
    NODES,
    default_sources,
    parallel_settings,
    script_for,
    settings_of,
)
from threefold.config.arguments import CommandParser, add_step_flag, chosen_steps
from threefold.config.load import dump_recipe, load_recipe
from threefold.config.recipe import Recipe
from threefold.engine.distributed import launched
from threefold.errors import ConfigError
from threefold.launch.flags import add_machine_flags, with_machine_flags
from threefold.launch.start import start
from threefold.pipeline import run_pipeline
from threefold.serve.chat import run_chat
from threefold.serve.options import ChatOptions

_OPT_SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
_DEPLOYMENTS = ("single_gpu", "single_node", "multi_node")


def train(arguments: Sequence[str]) -> None:
    """`python train.py`: print the recipe that the flags stand for, then run it.

    Raises:
        ConfigError: a flag is unknown, lacks its value, or has a value that cannot work.
    """
    recipe, steps, output_dir = read_train_flags(arguments)
    if not launched():
        _print(recipe, output_dir)
    start(recipe, lambda: run_pipeline(recipe, steps, output_dir), ["deepspeed-chat", *arguments])


def _print(recipe: Recipe, output_dir: Path) -> None:
    sys.stdout.write(
        "# These flags stand for the recipe below. Saved as recipe.toml, it runs with:\n"
        f"#   threefold train recipe.toml --output-dir {output_dir}\n\n{dump_recipe(recipe, only_set=True)}\n"
    )
    sys.stdout.flush()


def chat(arguments: Sequence[str]) -> None:
    """`python chat.py --path DIR --max_new_tokens 256`: a terminal chat.

    Raises:
        ConfigError: a flag is unknown or lacks its value.
    """
    parser = CommandParser(prog="chat.py", description="Talk with a model; `threefold chat --help` has more flags.")
    parser.add_argument(
        "--path", required=True, metavar="DIR", help="checkpoint directory (output/ppo/actor) or Hub id"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    flags = parser.parse(arguments)
    run_chat(ChatOptions(path=flags.path, max_new_tokens=flags.max_new_tokens))


def read_train_flags(arguments: Sequence[str]) -> tuple[Recipe, tuple[int, ...], Path]:
    """What `python train.py` with these arguments stands for: the recipe, the steps, the run directory."""
    parser = _train_parser()
    own, overrides = parser.split(arguments)
    flags = parser.parse_own(own)
    actor, reward = _model_id("actor", flags.actor_model), _model_id("reward", flags.reward_model)
    settings = {
        "run.name": _run_name(actor, reward),
        "model.actor": actor,
        "model.reward": reward,
        **_deployment(flags, actor),
        "data.sources": _sources(flags.data_path, flags.sft_only_data_path, flags.deployment_type),
    }
    if flags.data_split:
        settings["data.split"] = _split(flags.data_split)
    stands_for = [
        f"--{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in settings.items()
    ]
    recipe = load_recipe(None, [*stands_for, *with_machine_flags(flags, overrides)])
    return recipe, chosen_steps(flags), flags.output_dir or Path(recipe.run.output_dir or "output")


def _train_parser() -> CommandParser:
    parser = CommandParser(
        prog="train.py",
        description="DeepSpeed-Chat's command. Every field of the recipe can be set beside it: --ppo.kl_coef 0.05 ...\n"
        "`threefold train --help` lists them.",
    )
    model_help = "Hub id, local directory, or a size of OPT such as 1.3b (default: %(default)s)"
    parser.add_argument("--actor-model", default="1.3b", metavar="MODEL", help=model_help)
    parser.add_argument("--reward-model", default="350m", metavar="MODEL", help=model_help)
    sets = "files, directories of save_to_disk, or Hub ids"
    parser.add_argument(
        "--data-path", nargs="+", default=[], metavar="DATA", help=f"{sets} (default: as their scripts have it)"
    )
    parser.add_argument("--sft-only-data-path", nargs="*", default=[], metavar="DATA", help=f"{sets}, for step 1 alone")
    parser.add_argument("--data-split", default="", metavar="A,B,C", help="shares of the three steps (default: 2,4,4)")
    deployments = "single_gpu (default), single_node: all GPUs here, or multi_node"
    parser.add_argument("--deployment-type", default="single_gpu", metavar="TYPE", help=deployments)
    parser.add_argument("--num-gpus", type=int, default=0, metavar="N", help="processes per machine (default: GPUs)")
    parser.add_argument("--num-nodes", type=int, default=0, metavar="N", help="machines of multi_node (default: 8)")
    add_machine_flags(parser)
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="default: output")
    stage = "0, 1, 2 or 3 (default: as DeepSpeed-Chat has it for the deployment type)"
    parser.add_argument("--actor-zero-stage", default="", metavar="N", help=stage)
    parser.add_argument("--reward-zero-stage", default="", metavar="N", help="of reward model and critic: " + stage)
    parser.add_argument("--offload", action="store_true", help="optimizer state, in stage 3 also weights, to the host")
    add_step_flag(parser)
    return parser


def _deployment(flags: argparse.Namespace, actor: str) -> dict[str, object]:
    """The fields that the deployment type stands for."""
    kind = flags.deployment_type
    if kind not in _DEPLOYMENTS:
        raise ConfigError(f"--deployment-type {kind!r} is not known: use {', '.join(_DEPLOYMENTS)}")
    for flag, value in (("--num-gpus", flags.num_gpus), ("--num-nodes", flags.num_nodes)):
        if value < 0:
            raise ConfigError(f"{flag} {value}: give a number above 0")
    if kind == "single_gpu" and flags.num_gpus > 1:
        raise ConfigError(f"--num-gpus {flags.num_gpus} needs --deployment-type single_node")
    if kind != "multi_node" and flags.num_nodes > 1:
        raise ConfigError(f"--num-nodes {flags.num_nodes} needs --deployment-type multi_node")
    script = script_for(kind, actor)
    per_node = 1 if kind == "single_gpu" else flags.num_gpus or GPUS_PER_NODE
    nodes = (flags.num_nodes or NODES) if kind == "multi_node" else 1
    actor_stage = _stage("--actor-zero-stage", flags.actor_zero_stage, script.zero_stage)
    reward_stage = _stage("--reward-zero-stage", flags.reward_zero_stage, 0)
    critic_stage = _stage("--reward-zero-stage", flags.reward_zero_stage, script.zero_stage)
    settings = settings_of(script, per_node * nodes)
    settings |= parallel_settings(actor_stage, reward_stage, critic_stage, flags.offload)
    settings["launch.deployment"] = kind
    if kind != "single_gpu" and flags.num_gpus and not flags.hostfile:
        settings["launch.processes_per_node"] = flags.num_gpus
    if kind == "multi_node" and not flags.hostfile:
        settings["launch.nodes"] = nodes
    return settings


def _stage(flag: str, given: str, default: int) -> int:
    if given not in ("", "0", "1", "2", "3"):
        raise ConfigError(f"{flag} {given} is no ZeRO stage: give 0, 1, 2 or 3")
    return int(given) if given else default


def _model_id(which: str, given: str) -> str:
    """A model as named by the user; a bare size means OPT of that size, as in DeepSpeed-Chat."""
    if not given:
        raise ConfigError(f"--{which}-model is empty: give a Hub id, a directory, or a size of OPT such as 1.3b")
    if not re.fullmatch(r"\d+(\.\d+)?[mbMB]", given):
        return given
    if given.lower() not in _OPT_SIZES:
        raise ConfigError(f"--{which}-model {given}: there is no OPT of that size: choose from {', '.join(_OPT_SIZES)}")
    return f"facebook/opt-{given.lower()}"


def _run_name(actor: str, reward: str) -> str:
    """A name for the run that changes with its models, so that another pair is not mixed into its directory."""
    last_parts = [re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name).strip("-._") for model in (actor, reward)]
    return "-".join(part or "model" for part in last_parts)


def _sources(data_path: list[str], sft_only: list[str], deployment: str) -> list[dict[str, object]]:
    """The datasets, those for step 1 alone last."""
    given: list[dict[str, object]] = [{"path": [source]} for source in data_path] or default_sources(deployment)
    return given + [{"path": [source], "sft_only": True} for source in sft_only]


def _split(given: str) -> list[float]:
    try:
        shares = [float(part) for part in given.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise ConfigError(f"--data-split {given}: give three numbers, one for each step, such as 2,4,4")
    return shares
