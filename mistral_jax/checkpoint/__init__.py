"""Checkpoint folders: load, save, quantise, and apply adapters."""
