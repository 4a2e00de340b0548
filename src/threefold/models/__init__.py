"""Loading, making and saving models; what a forward pass means for each of the three roles."""
