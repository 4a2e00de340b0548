"""TRL's PPOTrainer on a workload, end to end. Run by the peers' interpreter.

    -m benchmarks.peers.trl_ppo WORKLOAD.json MOST_ITERATIONS [PASS]

Its best honest settings on a CPU: no gradient checkpointing (the option says so; this trainer's loop does not read it),
bf16 off (all contestants compute in float32), no evaluation, samples, saving or reports, and transformers' own defaults
for attention (sdpa) and optimizer (fused AdamW). PASS is the number of sequences in one pass of an update; without it,
all of them in one. Fewer take less memory; scoring passes are those of generation, whose batch should stay whole.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from benchmarks.peers.worker import Orders, peak_bytes, resident_bytes

LEARNING_RATE, KL_COEF, SEED = 1e-6, 0.05, 1234


class TakeTurns(TrainerCallback):
    """Let the trainer wait for an order before every iteration, and report each."""

    def __init__(self, orders: Orders, generation: GenerationWatch, bytes_after_imports: int) -> None:
        self._orders, self._generation, self._after_imports = orders, generation, bytes_after_imports

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._orders.answer(
            ready=True,
            threads=torch.get_num_threads(),
            bytes_after_imports=self._after_imports,
            bytes_loaded=resident_bytes(),
        )
        self._wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        seconds = time.perf_counter() - self._started
        watch = self._generation
        self._orders.answer(
            seconds=seconds, generate_s=watch.seconds, lengths=watch.lengths, width=watch.width, peak_bytes=peak_bytes()
        )
        self._wait()

    def _wait(self) -> None:
        if self._orders.next() is None:
            raise SystemExit
        self._started = time.perf_counter()


class GenerationWatch:
    """Times model.generate, and measures the answers' lengths up to and with the stop token."""

    def __init__(self, model: Any, stop_id: int | None) -> None:
        self.seconds, self.lengths, self.width = 0.0, [0], 0
        self._generate, self._stop_id = model.generate, stop_id
        model.generate = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        output = self._generate(*args, **kwargs)
        self.seconds = time.perf_counter() - started
        answers = output.sequences[:, kwargs["input_ids"].shape[1] :].tolist()
        self.width = len(answers[0])
        self.lengths = [row.index(self._stop_id) + 1 if self._stop_id in row else len(row) for row in answers]
        return output


def main() -> None:
    orders = Orders()
    workload = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    most_iterations = int(sys.argv[2])
    bytes_after_imports = resident_bytes()
    directory = Path(workload["directory"])
    tokenizer = AutoTokenizer.from_pretrained(directory / workload["actor"], padding_side="left")
    actor, reference = (
        AutoModelForCausalLM.from_pretrained(directory / workload["actor"], dtype=torch.float32) for _ in range(2)
    )
    critic, reward = (
        AutoModelForSequenceClassification.from_pretrained(directory / name, dtype=torch.float32, num_labels=1)
        for name in ("critic", "reward")
    )
    batches = workload["batches"]
    size = len(batches[0])
    at_once = int(sys.argv[3]) if len(sys.argv) > 3 else size
    queue = iter([batches[index % len(batches)] for index in range(most_iterations + 2)])  # the loader reads ahead

    def next_batch(_: Any) -> Any:
        """The same prompts in the same order for every contestant, whatever the loader has shuffled."""
        return tokenizer.pad({"input_ids": next(queue)}, return_tensors="pt")

    with tempfile.TemporaryDirectory() as scratch:
        settings = PPOConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=size // at_once,
            num_mini_batches=1,
            num_ppo_epochs=1,
            total_episodes=most_iterations * size,
            local_rollout_forward_batch_size=size,
            response_length=workload["answer_length"],
            stop_token="eos" if workload["stops"] else None,
            temperature=1.0,
            learning_rate=LEARNING_RATE,
            kl_coef=KL_COEF,
            num_sample_generations=0,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            seed=SEED,
        )
        watch = GenerationWatch(actor, tokenizer.eos_token_id if workload["stops"] else None)
        trainer = PPOTrainer(
            args=settings,
            processing_class=tokenizer,
            model=actor,
            ref_model=reference,
            reward_model=reward,
            value_model=critic,
            train_dataset=Dataset.from_dict({"input_ids": [prompt for batch in batches for prompt in batch]}),
            data_collator=next_batch,
            callbacks=[TakeTurns(orders, watch, bytes_after_imports)],
        )
        trainer.train()


if __name__ == "__main__":
    main()
