"""Tokenizers and the forms of chats: text to token ids, and back."""
