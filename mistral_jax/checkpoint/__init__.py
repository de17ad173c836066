"""The folder of a checkpoint: load, save, quantise, adapters."""
