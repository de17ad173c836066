"""Generation and scoring: rows of a running batch, and the functions that are built on them."""
