"""Evaluation: how well a model foretells texts and chooses answers. It trains nothing."""
