"""Planning: the memory, time and communication of a model on a layout, without running it."""
