"""DeepSpeed-Chat's commands and names, mapped onto threefold's own."""
