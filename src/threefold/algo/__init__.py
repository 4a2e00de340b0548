"""The mathematics of the three steps: pure functions of tensors, no model, no recipe, no process group."""
