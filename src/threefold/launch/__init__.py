"""Starting, watching and ending the processes of a run. torchrun's agent starts them; what ended them is found here."""
