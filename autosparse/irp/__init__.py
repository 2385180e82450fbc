"""Iterative rewind pruning, and plans of many runs."""
