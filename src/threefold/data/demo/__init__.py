"""The embedded default dataset: seeded conversations, their gold score, and a tokenizer for them."""

from threefold.data.demo.generate import clean_comparison, generate_examples
from threefold.data.demo.gold import GoldBreakdown, gold_breakdown, gold_score, task_of
from threefold.data.demo.tokenizer import train_tokenizer

__all__ = [
    "GoldBreakdown",
    "clean_comparison",
    "generate_examples",
    "gold_breakdown",
    "gold_score",
    "task_of",
    "train_tokenizer",
]
