"""PyTorch checkpoints of Mistral to Orbax and back: no PyTorch is needed. It runs no model."""
