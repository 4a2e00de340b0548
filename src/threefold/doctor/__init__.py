"""The command `threefold doctor`: examines the data of a recipe, and shows what it finds."""
