"""Training: generated data, optimizers, losses, the loop and its recipes."""
