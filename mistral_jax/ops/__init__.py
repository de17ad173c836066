"""Products, attention and table lookups, each behind one function that suits the backend."""
