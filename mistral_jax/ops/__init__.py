"""How products and attention are computed on each backend, behind one function each."""
