"""The steps of a run. Each reads finished directories, fills one of its own, and returns a summary; they meet only on
disk."""
