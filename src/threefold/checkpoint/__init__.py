"""Run state on disk, whole or not at all: finished stages, and checkpoints inside a stage that a run goes on from."""
