"""The terminal chat: `quit` ends it, `clear` starts a new conversation, as in DeepSpeed-Chat."""

from __future__ import annotations

import sys
from io import TextIOWrapper

from rich.console import Console

from threefold.serve.options import ChatOptions
from threefold.serve.session import ChatSession

QUIT, CLEAR = "quit", "clear"


def run_chat(options: ChatOptions) -> None:
    """Talk until `quit` or the end of the input.

    Raises:
        CheckpointError, ConfigError: the model cannot be loaded or given a chat template.
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text must not end the conversation
    session = ChatSession.load(options)
    for note in session.notes:
        console.print(note)
    console.print(f"Talking with {session.source}. `{CLEAR}` forgets the conversation, `{QUIT}` ends.")
    while True:
        try:
            text = console.input("\nyou> ")
        except EOFError:
            console.print()
            return
        match text.strip().lower():
            case "quit":
                return
            case "clear":
                session.clear()
                console.print("(forgotten)")
                continue
        problem = session.check_message(text)
        if problem is not None:
            console.print(f"({problem})")
            continue
        console.print("model> ", end="")
        for piece in session.reply(text.strip()):
            console.print(piece, end="")
        console.print()
