"""Runs what documents show, as a reader would."""
