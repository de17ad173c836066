"""Tasks for lm-evaluation-harness with the protocol of Mistral 7B's paper, and their functions."""
