"""Masks, compact parameters, tickets, paths."""
