"""The forward pass, from rotary embedding to `Transformer`: no tokenizer, no file, no sampling."""
