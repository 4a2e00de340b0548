"""DeepSpeed-Chat's training command, on threefold: `python train.py --actor-model facebook/opt-1.3b ...`."""

import sys

try:
    from threefold.interrupt import heard_early, heard_normally  # first: the other imports take seconds

    heard_early()
    from threefold.cli import run_training
    from threefold.compat.deepspeed_chat import train
except ModuleNotFoundError as error:
    if error.name != "threefold":
        raise
    sys.exit("threefold is not installed: run `make setup`, then use .venv/bin/python")

if __name__ == "__main__":
    heard_normally()
    sys.exit(run_training(train, sys.argv[1:]))
