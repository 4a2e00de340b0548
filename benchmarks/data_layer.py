"""How fast data are prepared, in how much memory, and how soon a second start has them.

    python -m benchmarks.data_layer --rows 100000
    python -m benchmarks.data_layer --rows 1000000

Conversations are written to a jsonl file first (not measured): turns of the real dialogues of ../shared/data/hh_rlhf,
put together anew, each with a number, so that none is there twice. Then two processes of their own, one after the
other, prepare step 1 of a recipe that gives it all rows: the first reads, splits, renders, tokenises and writes the
cache; the second finds it there, and reads a thousand items in the order of training.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import random
import re
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from threefold.config.recipe import Recipe
from threefold.data.chat import build_chat_format, ensure_pad_token
from threefold.data.library import open_library
from threefold.data.prepare import sft_items

TOKENIZERS = {"stories260K": "models/stories260K", "babyllama": "models/babyllama-char-1M"}
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
MIB = 2**20
NUM_READ = 1000


def write_conversations(path: Path, rows: int, seed: int = 0) -> None:
    """A jsonl file of conversations of one to three turns."""
    turns: dict[str, list[str]] = {"Human": [], "Assistant": []}
    with gzip.open(SHARED / "data/hh_rlhf/harmless_1600.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            for who, text in re.findall(
                r"\n\n(Human|Assistant): (.*?)(?=\n\n(?:Human|Assistant):|$)", json.loads(line)["chosen"], re.S
            ):
                turns[who].append(text.strip() or "…")
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            messages = []
            for turn in range(rng.choice([1, 1, 2, 3])):
                messages.append({"role": "user", "content": f"{rng.choice(turns['Human'])} ({row}.{turn})"})
                messages.append({"role": "assistant", "content": rng.choice(turns["Assistant"])})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def prepare(path: str, cache: str, tokenizer: str, max_length: int, answer: Any) -> None:
    """Prepare step 1, and report times in seconds, sizes and the most memory that this process held."""
    start = time.perf_counter()
    data = {
        "sources": [path],
        "split": [1, 0, 0],
        "eval_fraction": 0.01,
        "max_length": max_length,
        "long_rows": "drop",
        "cache_dir": cache,
    }
    recipe = Recipe.model_validate({"data": data, "model": {"chat_template": "dialogue"}})
    loaded = AutoTokenizer.from_pretrained(SHARED / TOKENIZERS.get(tokenizer, tokenizer))
    ensure_pad_token(loaded, "<|pad|>" if loaded.pad_token is None else "", "dialogue")
    chat = build_chat_format(loaded, "dialogue")
    before = time.perf_counter()
    library = open_library(recipe)
    read = time.perf_counter()
    items = sft_items(library, chat, recipe)
    done = time.perf_counter()
    tokens = sum(len(items.train[index]) for index in items.blend.order(0)[:NUM_READ])
    answer.put(
        {
            "set_up": before - start,
            "read": read - before,
            "tokenise": done - read,
            "rows": len(library.tables[0]),
            "kept": len(items.train) + len(items.eval),
            "tokens_per_row": items.counts.tokens / max(len(items.train), 1),
            "read_items": time.perf_counter() - done,
            "tokens_read": tokens,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    )


def in_a_process(*arguments: Any) -> dict[str, float]:
    """`prepare` in a new process."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=prepare, args=(*arguments, answer))
    process.start()
    found: dict[str, float] = answer.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tokenizer", default="stories260K", help="stories260K, babyllama, or a directory")
    parser.add_argument("--max-length", type=int, default=2048)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "conversations.jsonl"
        write_conversations(path, arguments.rows)
        size = path.stat().st_size / MIB
        call = (str(path), str(Path(directory) / "cache"), arguments.tokenizer, arguments.max_length)
        first, second = in_a_process(*call), in_a_process(*call)
        cache = sum(file.stat().st_size for file in Path(directory, "cache").rglob("*") if file.is_file()) / MIB
    both = first["read"] + first["tokenise"]
    tokens = first["tokens_per_row"]
    print(f"{arguments.rows} conversations, {size:.0f} MiB, {tokens:.0f} tokens each ({arguments.tokenizer})")
    print(
        f"first start: read {first['read']:.1f} s, tokenise {first['tokenise']:.1f} s: "
        f"{first['rows'] / both:.0f} rows/s, {first['kept'] * tokens / both / 1e6:.2f} M tokens/s; "
        f"peak {first['peak_mib']:.0f} MiB"
    )
    print(
        f"second start: read {second['read']:.2f} s, tokenise {second['tokenise']:.2f} s, {NUM_READ} items "
        f"{second['read_items']:.2f} s; peak {second['peak_mib']:.0f} MiB; cache {cache:.0f} MiB"
    )


if __name__ == "__main__":
    main()
