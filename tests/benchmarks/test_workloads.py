"""The benchmark's random model that stops by itself."""

import statistics

import torch

from benchmarks.workloads import MEAN_ANSWER_LENGTH, STOP_ID, Shape, make_actor, make_it_stop


def test_lengths_have_the_mean_they_should():
    """Answers of plain transformers, cut at four means, against the mean of a geometric length cut there."""
    model = make_actor(Shape(hidden_size=64, num_layers=2, num_heads=2, ffn_dim=128, vocab_size=300), seed=1)
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(2, 300, (64, 16), generator=generator)
    assert abs(make_it_stop(model, prompts.tolist(), seed=3) - 1 / MEAN_ANSWER_LENGTH) < 1e-6
    cap = 4 * MEAN_ANSWER_LENGTH
    torch.manual_seed(4)
    answers = model.generate(prompts.repeat(8, 1), do_sample=True, top_k=0, max_new_tokens=cap)[:, 16:].tolist()
    lengths = [row.index(STOP_ID) + 1 if STOP_ID in row else cap for row in answers]
    expected = MEAN_ANSWER_LENGTH * (1 - (1 - 1 / MEAN_ANSWER_LENGTH) ** cap)
    standard_error = MEAN_ANSWER_LENGTH / len(lengths) ** 0.5
    assert abs(statistics.mean(lengths) - expected) < 4 * standard_error
