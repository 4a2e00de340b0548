"""DeepSpeed-Chat's chat command, on threefold: `python chat.py --path DIR --max_new_tokens 256`."""

import sys

try:
    from threefold.interrupt import heard_early, heard_normally  # first: the other imports take seconds

    heard_early()
    from threefold.cli import run_guarded
    from threefold.compat.deepspeed_chat import chat
except ModuleNotFoundError as error:
    if error.name != "threefold":
        raise
    sys.exit("threefold is not installed: run `make setup`, then use .venv/bin/python")

if __name__ == "__main__":
    heard_normally()
    sys.exit(run_guarded(chat, sys.argv[1:], "interrupted"))
