"""Evaluation: perplexity of texts, multiple choice, and lm-evaluation-harness."""
