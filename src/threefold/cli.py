"""The command `threefold`: each sub-command reads its few flags and hands over to what does the work."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from threefold import __version__
from threefold.bench.options import DEFAULT_ACTOR, DEFAULT_CRITIC, DEFAULT_LENGTH, BenchOptions
from threefold.bench.run import run_bench
from threefold.compat import deepspeed_chat
from threefold.config.arguments import CommandParser, add_step_flag, chosen_steps, given_arguments
from threefold.config.fields import fields_help, recipe_markdown
from threefold.config.load import dump_recipe, load_recipe
from threefold.doctor.command import DoctorOptions, run_doctor
from threefold.engine.distributed import launched
from threefold.errors import ConfigError, Preempted, ThreefoldError
from threefold.interrupt import EXIT_TERMINATED
from threefold.launch.failures import EXIT_INTERRUPTED, EXIT_MISTAKE, RunFailed
from threefold.launch.flags import add_launch_flags, with_launch_flags
from threefold.launch.start import start
from threefold.launch.worker import work_as_rank
from threefold.pipeline import run_pipeline
from threefold.plan.describe import print_plan
from threefold.serve.chat import run_chat
from threefold.serve.options import ChatOptions

EXIT_FAILED = 1
EXIT_BROKEN_PIPE = 141
TRAINING_INTERRUPTED = "interrupted; finished steps are kept, run the same command again to go on"

_HELP = """usage: threefold COMMAND ...

A pretrained language model becomes a chat model in three steps: supervised fine-tuning, reward model, PPO.

commands:
  train RECIPE.toml     run the three steps; run it again to go on where it stopped
  deepspeed-chat        the same with DeepSpeed-Chat's flags (train.py)
  plan RECIPE.toml      what each process of a run will need in memory, and whether that fits
  doctor RECIPE.toml    look for mistakes in the data, and show what is trained on
  chat DIR              talk with a finished model
  recipe [RECIPE.toml]  print a recipe with every field filled in
  bench                 time step 3 on models of any shape, with random weights

  threefold COMMAND --help   the flags of one command; train's lists every field of the recipe
  threefold --version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a mistake that the user can mend, 130 for Ctrl-C, 143 for
    SIGTERM, 1 for a process of the run that failed."""
    arguments = given_arguments(argv)
    if arguments[:1] in (["train"], ["deepspeed-chat"]):
        return run_training(_run_command, arguments)
    return run_guarded(_run_command, arguments, "interrupted")


def run_training(command: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> int:
    """Run a command that trains; where torchrun has started this process, as one of several, and it ends with it."""
    if launched():
        work_as_rank(lambda: command(arguments))
    return run_guarded(command, arguments, TRAINING_INTERRUPTED)


def run_guarded(command: Callable[[Sequence[str]], None], arguments: Sequence[str], on_interrupt: str) -> int:
    """Run a command; what its user can mend is one line on stderr, and all else keeps its traceback."""
    try:
        command(arguments)
        sys.stdout.flush()
    except ThreefoldError as error:
        print(f"threefold: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_MISTAKE
    except RunFailed as error:
        print(f"threefold: {error}", file=sys.stderr)
        return EXIT_FAILED
    except Preempted as error:
        print(error, file=sys.stderr)
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        print(f"\n{on_interrupt}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader of our output has gone (`threefold recipe | head`); Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return 0


def _run_command(arguments: Sequence[str]) -> None:
    commands = {
        "train": _train,
        "deepspeed-chat": deepspeed_chat.train,
        "plan": _plan,
        "doctor": _doctor,
        "chat": _chat,
        "recipe": _recipe,
        "bench": _bench,
    }
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        sys.stdout.write(_HELP)
    elif first == "--version":
        print(f"threefold {__version__}")
    elif first in commands:
        commands[first](arguments[1:])
    else:
        nearest = difflib.get_close_matches(first, [*commands, "--help", "--version"], n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "threefold --help lists the commands"
        raise ConfigError(f"unknown command {first!r}: {hint}")


def _train(arguments: Sequence[str]) -> None:
    parser = CommandParser(
        prog="threefold train",
        usage="threefold train RECIPE.toml [--output-dir DIR] [--step 1 2 3] [--SECTION.FIELD VALUE ...]",
        description="Run the three steps. Finished ones are skipped, and a changed field reruns what depends on it.\n\n"
        "  threefold train recipes/demo.toml\n"
        "  threefold train recipes/demo.toml --ppo.kl_coef 0.05 --step 3",
        epilog="fields of the recipe, with their defaults:\n\n" + fields_help(),
    )
    parser.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE.toml", help="recipes/demo.toml, say")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="run directory (default: runs/NAME)")
    add_step_flag(parser)
    add_launch_flags(parser)
    own, overrides = parser.split(arguments)
    flags = parser.parse_own(own)
    recipe = load_recipe(flags.recipe, with_launch_flags(flags, overrides))
    default_dir = Path(recipe.run.output_dir or Path("runs") / recipe.run.name)
    steps = chosen_steps(flags)
    if flags.recipe is None:
        raise ConfigError(
            "train needs a recipe: recipes/demo.toml is the embedded demo, docs/recipe.md lists all fields"
        )
    start(recipe, lambda: run_pipeline(recipe, steps, flags.output_dir or default_dir), ["train", *arguments])


def _plan(arguments: Sequence[str]) -> None:
    parser = CommandParser(
        prog="threefold plan",
        usage="threefold plan RECIPE.toml [--SECTION.FIELD VALUE ...]",
        description="Print what each process of a run will need in memory, phase by phase, without running it.\n\n"
        "  threefold plan recipes/opt-13b_single_node.toml --launch.processes_per_node 8",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.toml", help="recipes/demo.toml, say")
    add_launch_flags(parser)
    own, overrides = parser.split(arguments)
    flags = parser.parse_own(own)
    print_plan(load_recipe(flags.recipe, with_launch_flags(flags, overrides)), print)


def _doctor(arguments: Sequence[str]) -> None:
    parser = CommandParser(
        prog="threefold doctor",
        usage="threefold doctor RECIPE.toml [--json FILE] [--html FILE] [--full] [--SECTION.FIELD VALUE ...]",
        description="Look for mistakes in the data before they are trained on (exit code 2 where there are errors), "
        "and show\nwhat becomes of each token. docs/doctor.md lists the checks.\n\n"
        "  threefold doctor recipes/demo.toml --html samples.html",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.toml", help="recipes/demo.toml, say")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings and statistics to this file")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page of token-coloured samples to this file")
    parser.add_argument("--full", action="store_true", help="look at all rows instead of some thousands of each source")
    own, overrides = parser.split(arguments)
    flags = parser.parse_own(own)
    recipe = load_recipe(flags.recipe, overrides)
    run_doctor(recipe, DoctorOptions(flags.json, flags.html, flags.full), print)


def _chat(arguments: Sequence[str]) -> None:
    defaults = ChatOptions(path="")
    parser = CommandParser(
        prog="threefold chat",
        description="Talk with a model. `clear` forgets the conversation, `quit` ends.",
    )
    parser.add_argument("path", metavar="DIR", help="checkpoint directory (runs/demo/ppo/actor) or Hub id")
    parser.add_argument(
        "--max-new-tokens", type=int, default=defaults.max_new_tokens, metavar="N", help="longest answer"
    )
    parser.add_argument("--temperature", type=float, default=defaults.temperature, metavar="T", help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=defaults.top_k, metavar="K", help="0 keeps all tokens")
    parser.add_argument("--top-p", type=float, default=defaults.top_p, metavar="P", help="1 keeps all tokens")
    parser.add_argument("--greedy", action="store_const", const=0.0, dest="temperature", help="same as --temperature 0")
    parser.add_argument("--seed", type=int, default=defaults.seed, metavar="N", help="seed of the sampling")
    parser.add_argument("--system", default=defaults.system, metavar="TEXT", help="system message")
    parser.add_argument("--template", default=defaults.template, metavar="NAME", help="chat template, as in the recipe")
    parser.add_argument("--device", default=defaults.device, choices=["auto", "cpu", "cuda", "mps"])
    run_chat(ChatOptions(**vars(parser.parse(arguments))))


def _recipe(arguments: Sequence[str]) -> None:
    parser = CommandParser(
        prog="threefold recipe",
        usage="threefold recipe [RECIPE.toml] [--SECTION.FIELD VALUE ...] | threefold recipe --markdown",
        description="Print a recipe with every field filled in, as TOML that can be run.",
    )
    parser.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE.toml", help="default: the defaults")
    parser.add_argument("--markdown", action="store_true", help="print the reference of all fields (docs/recipe.md)")
    own, overrides = parser.split(arguments)
    flags = parser.parse_own(own)
    recipe = load_recipe(flags.recipe, overrides)
    sys.stdout.write(recipe_markdown() if flags.markdown else dump_recipe(recipe))


def _bench(arguments: Sequence[str]) -> None:
    defaults = BenchOptions()
    parser = CommandParser(
        prog="threefold bench",
        description="Time step 3 (generate, score, update) on random weights, and count what it computes.\n\n"
        "  threefold bench --actor facebook/opt-1.3b --critic facebook/opt-350m --dtype bfloat16\n"
        "  threefold bench --actor llama:hidden=512,layers=8,heads=8,kv_heads=4,ffn=1408,vocab=8000 --json bench.json",
    )
    shape = "published name, or FAMILY:hidden=N,layers=N,heads=N,ffn=N,vocab=N (default: %(default)s)"
    parser.add_argument("--actor", default=DEFAULT_ACTOR, metavar="SHAPE", help=shape)
    parser.add_argument("--critic", default=DEFAULT_CRITIC, metavar="SHAPE", help="and reward model: " + shape)

    def number(flag: str, default: int | None, text: str) -> None:
        parser.add_argument(flag, type=int, default=default, metavar="N", help=text)

    number("--batch", defaults.batch, "prompts of an iteration (default: %(default)s)")
    number("--answers-per-prompt", defaults.answers_per_prompt, "answers to each (default: %(default)s)")
    number("--prompt-length", None, f"tokens of every prompt (default: {DEFAULT_LENGTH})")
    number("--answer-length", None, f"tokens of every answer (default: {DEFAULT_LENGTH})")
    parser.add_argument(
        "--lengths", type=Path, metavar="FILE", help="answer lengths, or prompt and answer lengths, to draw from"
    )
    number("--iterations", defaults.iterations, "iterations that are measured (default: %(default)s)")
    number("--warmup", defaults.warmup, "iterations before them that are not (default: %(default)s)")
    number("--minibatches", defaults.minibatches, "optimizer steps of an iteration (default: %(default)s)")
    number("--micro-batch-tokens", defaults.micro_batch_tokens, "tokens of a forward pass; 0 is what suits the device")
    number("--lora-rank", defaults.lora_rank, "rank of adapters on the actor; 0 trains all of it")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="as ppo.gradient_checkpointing")
    parser.add_argument("--offload-optimizer", action="store_true", help="as ppo.offload_optimizer")
    parser.add_argument("--dtype", default=defaults.dtype, choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--device", default=defaults.device, choices=["auto", "cpu", "cuda", "mps"])
    number("--threads", defaults.threads, "CPU threads; 0 leaves PyTorch's choice")
    number("--seed", defaults.seed, "of weights, prompts, lengths and sampling (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    run_bench(BenchOptions(**vars(parser.parse(arguments))), ["threefold", "bench", *arguments])
