"""The training loop, and how a step is made."""
