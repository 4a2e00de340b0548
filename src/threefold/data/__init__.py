"""From files to batches: sources, the seeded split, the one renderer, the one place that pads."""
