"""What a run will need, computed from its recipe and the shapes of its models before anything is loaded."""
