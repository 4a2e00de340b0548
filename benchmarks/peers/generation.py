"""transformers' own generation on a workload. Run by the peers' interpreter.

    -m benchmarks.peers.generation generate|continuous WORKLOAD.json

`generate` is model.generate with sampling from the whole distribution and a key-value cache, prompts left-padded into
one batch. `continuous` is model.generate_batch: paged cache, rows leave when they stop. It is told how many pages the
first batch needs and to take all its prompts at once (left to itself it plans for a GPU's memory), and it keeps pages
and manager from batch to batch, which is faster than to make them anew.

An order has `prompts` or the index of a `batch` of the workload, and may change `answer_length`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from benchmarks.peers.worker import Orders, peak_bytes, resident_bytes

PAGE_TOKENS = 32


def settings(workload: dict[str, Any], tokenizer: Any, answer_length: int) -> GenerationConfig:
    """Sampling from the whole distribution; without stopping, exactly `answer_length` tokens."""
    stops = workload["stops"]
    return GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        use_cache=True,
        max_new_tokens=answer_length,
        eos_token_id=tokenizer.eos_token_id if stops else -1,
        pad_token_id=tokenizer.pad_token_id,
    )


def plain(model: Any, tokenizer: Any, prompts: list[list[int]], config: GenerationConfig) -> list[int]:
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=config
    )
    stop_id = config.eos_token_id
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [row.index(stop_id) + 1 if stop_id in row else len(row) for row in answers]


def continuous(model: Any, _: Any, prompts: list[list[int]], config: GenerationConfig) -> list[int]:
    longest = max(map(len, prompts)) + config.max_new_tokens
    batching = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=(math.ceil(longest / PAGE_TOKENS) + 1) * len(prompts),
        max_batch_tokens=sum(map(len, prompts)),
    )
    outputs = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=batching, persistent_manager=True
    )
    if len(outputs) != len(prompts):
        raise RuntimeError(f"generate_batch answered {len(outputs)} of {len(prompts)} prompts")
    return [len(output.generated_tokens) for output in outputs.values()]


WAYS: dict[str, Callable[..., list[int]]] = {"generate": plain, "continuous": continuous}


def main() -> None:
    orders = Orders()
    way = WAYS[sys.argv[1]]
    workload = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    directory = Path(workload["directory"]) / workload["actor"]
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    torch.manual_seed(1234)
    orders.answer(ready=True, threads=torch.get_num_threads(), bytes_loaded=resident_bytes())
    with torch.no_grad():
        for order in orders:
            prompts = order.get("prompts") or workload["batches"][order["batch"] % len(workload["batches"])]
            config = settings(workload, tokenizer, order.get("answer_length", workload["answer_length"]))
            started = time.perf_counter()
            lengths = way(model, tokenizer, prompts, config)
            orders.answer(seconds=time.perf_counter() - started, lengths=lengths, peak_bytes=peak_bytes())


if __name__ == "__main__":
    main()
