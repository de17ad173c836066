"""Tokenizers and chat forms: convert text and conversations to token ids, and ids to text."""
