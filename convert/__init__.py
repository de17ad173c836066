"""Converts checkpoints between PyTorch and Orbax, without PyTorch."""
