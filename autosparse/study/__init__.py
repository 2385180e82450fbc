"""Trainings of tickets: comparisons, sweeps, verdicts, export."""
