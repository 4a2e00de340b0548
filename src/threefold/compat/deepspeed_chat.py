"""The two commands that DeepSpeed-Chat's users know, as recipes of threefold.

`python train.py --actor-model facebook/opt-1.3b --reward-model facebook/opt-350m --deployment-type single_gpu` stands
for a recipe with the hyper-parameters that DeepSpeed-Chat ships for one GPU, as far as threefold has the field. What
differs, and why:

- Step 1 trains the whole model at 9.65e-6, the rate of their whole-model scripts: their one-GPU script trains a LoRA
  at 1e-3.
- Their gradient accumulation (8, 4 and 2 micro-batches of 16) is the batch size here. In step 3 two of their generation
  batches come from the same weights before one optimizer step, which is one iteration of 32 prompts.
- Step 1 trains on the assistant's tokens (theirs: on all), with dropout 0 (theirs: as the model has it).
- Answers are sampled, rewards normalised and advantages whitened, as threefold's defaults have it.
- Their scripts drop prompts that are too long, so this does (data.long_rows).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from threefold.config.arguments import CommandParser, add_step_flag, chosen_steps
from threefold.config.load import dump_recipe, load_recipe
from threefold.config.recipe import Recipe
from threefold.errors import ConfigError
from threefold.pipeline import run_pipeline
from threefold.serve.chat import run_chat
from threefold.serve.options import ChatOptions

_OPT_SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
_NO_DATA = "PAIRS.jsonl"
"""What the printed recipe says where no data were given; it is not run."""
_SINGLE_GPU: dict[str, object] = {
    "run.seed": 1234,
    "model.chat_template": "dialogue",
    "data.split": [2, 4, 4],
    "data.max_length": 512,
    "data.max_prompt_length": 256,
    "data.long_rows": "drop",
    "sft.learning_rate": 9.65e-6,
    "sft.weight_decay": 0.0,
    "sft.scheduler": "cosine",
    "sft.warmup_steps": 0,
    "sft.epochs": 1,
    "sft.batch_size": 128,
    "sft.micro_batch_size": 16,
    "reward.learning_rate": 5e-5,
    "reward.weight_decay": 0.1,
    "reward.scheduler": "cosine",
    "reward.warmup_steps": 0,
    "reward.epochs": 1,
    "reward.batch_size": 64,
    "reward.micro_batch_size": 16,
    "reward.dropout": 0.0,
    "ppo.epochs": 1,
    "ppo.prompts_per_iteration": 32,
    "ppo.ppo_epochs": 1,
    "ppo.minibatches": 1,
    "ppo.micro_batch_size": 16,
    "ppo.actor_learning_rate": 9.65e-6,
    "ppo.critic_learning_rate": 5e-6,
    "ppo.actor_weight_decay": 0.0,
    "ppo.critic_weight_decay": 0.0,
    "ppo.scheduler": "cosine",
    "ppo.warmup_steps": 100,
    "ppo.sampling.max_new_tokens": 256,
    "ppo.ema.enabled": False,
}


def train(arguments: Sequence[str]) -> None:
    """`python train.py`: print the recipe that the flags stand for, then run it.

    Raises:
        ConfigError: a flag is unknown, lacks its value, or asks for what threefold has not yet.
    """
    recipe, steps, output_dir = read_train_flags(arguments)
    without_data = recipe.data.sources == [_NO_DATA]
    sys.stdout.write(
        "# These flags stand for the recipe below. Saved as recipe.toml, it runs with:\n"
        f"#   threefold train recipe.toml --output-dir {output_dir}\n\n{dump_recipe(recipe, only_set=True)}\n"
    )
    sys.stdout.flush()
    if without_data:
        raise ConfigError(
            "no data: give --data-path FILE ... (json, jsonl or jsonl.gz with prompt, chosen and rejected); "
            "Dahoas/rm-static, DeepSpeed-Chat's default, cannot be fetched from the Hub yet"
        )
    run_pipeline(recipe, steps, output_dir)


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
    _refuse_what_comes_later(flags.deployment_type, flags.actor_zero_stage, flags.reward_zero_stage)
    actor, reward = _model_id("actor", flags.actor_model), _model_id("reward", flags.reward_model)
    settings = {
        "run.name": _run_name(actor, reward),
        "model.actor": actor,
        "model.reward": reward,
        "data.sources": _local_files(flags.data_path),
        **_SINGLE_GPU,
    }
    stands_for = [
        f"--{path}={value if isinstance(value, str) else json.dumps(value)}" for path, value in settings.items()
    ]
    recipe = load_recipe(None, [*stands_for, *overrides])
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
    parser.add_argument("--data-path", nargs="+", default=[], metavar="FILE", help="json, jsonl or jsonl.gz files")
    parser.add_argument("--deployment-type", default="single_gpu", metavar="TYPE", help="single_gpu")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="default: output")
    parser.add_argument("--actor-zero-stage", default="", metavar="N", help="0 is the only stage so far")
    parser.add_argument("--reward-zero-stage", default="", metavar="N", help="0 is the only stage so far")
    add_step_flag(parser)
    return parser


def _refuse_what_comes_later(deployment_type: str, actor_zero_stage: str, reward_zero_stage: str) -> None:
    if deployment_type in ("single_node", "multi_node"):
        raise ConfigError(f"--deployment-type {deployment_type} comes with multi-process training: use single_gpu")
    if deployment_type != "single_gpu":
        raise ConfigError(f"--deployment-type {deployment_type!r} is not known: use single_gpu")
    for flag, stage in (("--actor-zero-stage", actor_zero_stage), ("--reward-zero-stage", reward_zero_stage)):
        if stage not in ("", "0"):
            raise ConfigError(f"{flag} {stage} comes with multi-process training: leave the flag out")


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


def _local_files(data_path: list[str]) -> list[str]:
    if not data_path:
        return [_NO_DATA]
    for source in data_path:
        if source != "demo" and not Path(source).exists():
            raise ConfigError(
                f"--data-path {source}: there is no such file; data sets of the Hub cannot be fetched yet, "
                "so give a json, jsonl or jsonl.gz file"
            )
    return data_path
