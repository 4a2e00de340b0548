"""The numbers of DeepSpeed-Chat's step-3 report, by its own formulas (dschat/utils/perf.py, DeepSpeedExamples).

They are kept as they are, so that they can be laid beside published ones: FLOP are estimated from width, depth and
vocabulary alone (feed-forward layers four times the width, no grouped-query attention, the head at every position, full
attention), generation is charged with a forward pass over prompt and answer, and "end-to-end" leaves out scoring. What
threefold counts itself is in flops.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PerfSizes:
    """What the formulas know of a model.

    Attributes:
        hidden_size, num_layers, vocab_size: of its config.
        num_parameters: of the whole model.
        lora_rank: of its adapters; 0 without.
        checkpointing: gradient checkpointing is on.
    """

    hidden_size: int
    num_layers: int
    vocab_size: int
    num_parameters: int
    lora_rank: int = 0
    checkpointing: bool = False


@dataclass(frozen=True)
class PerfReport:
    """What DeepSpeed-Chat prints after a step-3 iteration; seconds, TFLOP/s (10^12), GB/s (10^9)."""

    end_to_end_seconds: float
    generation_seconds: float
    training_seconds: float
    samples_per_second: float
    seconds_per_sequence: float
    end_to_end_tflops: float
    generation_tflops: float
    training_tflops: float
    per_token_latency_seconds: float
    generation_gb_per_second: float


def megatron_flop(sizes: PerfSizes, sequences: int, length: int, factor: float) -> float:
    """`calculate_flops`: 24 f B s L h^2 (1 + s / (6 h) + V / (16 L h)).

    That is Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", equation 3, whose
    96 is 24 times f = 4: a forward, a backward of two, and the recomputation of activation checkpointing.

    Args:
        sequences: B.
        length: s, tokens of prompt and answer.
        factor: f; 1 is a forward pass.
    """
    width, layers = sizes.hidden_size, sizes.num_layers
    shape = 1.0 + length / (6.0 * width) + sizes.vocab_size / (16.0 * layers * width)
    return 24 * factor * sequences * length * layers * width**2 * shape


def training_factor(sizes: PerfSizes) -> float:
    """f of a training pass: 3, or 4 with checkpointing; adapters of rank r save 1 - 2 r / h of it, the gradients of the
    frozen matrices."""
    factor = 4.0 if sizes.checkpointing else 3.0
    if sizes.lora_rank > 0:
        factor -= 1 - sizes.lora_rank * 2 / sizes.hidden_size
    return factor


def step3_report(
    actor: PerfSizes,
    critic: PerfSizes,
    sequences: int,
    prompt_length: int,
    answer_length: int,
    generation_seconds: float,
    training_seconds: float,
    bytes_per_parameter: int,
    ppo_epochs: int = 1,
) -> PerfReport:
    """`print_throughput_step3`, for one device and one generation batch an iteration.

    Args:
        sequences: answers of an iteration (per_device_generation_batch_size).
        prompt_length, answer_length: the longest of the setting (max_prompt_seq_len, max_answer_seq_len), not what was
            generated.
        generation_seconds: of `generate` alone.
        training_seconds: of the update alone.
        bytes_per_parameter: 4 for float32, 2 for 16 bits.
        ppo_epochs: multiplies the samples, as theirs does.
    """
    length, trained_sequences = prompt_length + answer_length, sequences * ppo_epochs
    end_to_end = training_seconds + generation_seconds
    training_flop = sum(
        megatron_flop(sizes, trained_sequences, length, training_factor(sizes)) for sizes in (actor, critic)
    )
    generation_flop = megatron_flop(actor, sequences, length, factor=1)
    per_token = generation_seconds / answer_length
    return PerfReport(
        end_to_end_seconds=end_to_end,
        generation_seconds=generation_seconds,
        training_seconds=training_seconds,
        samples_per_second=trained_sequences / end_to_end,
        seconds_per_sequence=end_to_end / trained_sequences,
        end_to_end_tflops=(training_flop + generation_flop) / end_to_end / 1e12,
        generation_tflops=generation_flop / generation_seconds / 1e12,
        training_tflops=training_flop / training_seconds / 1e12,
        per_token_latency_seconds=per_token,
        generation_gb_per_second=actor.num_parameters * bytes_per_parameter / per_token / 1e9,
    )
