"""Generation, from logits to text: no parameters, no files, no command line."""
