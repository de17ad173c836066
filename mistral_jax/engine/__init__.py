"""Generation: prompts are read, tokens are chosen, texts are made and scored."""
