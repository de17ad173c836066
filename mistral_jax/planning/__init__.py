"""Planning: what a model costs on a layout, asked of the compiler and of arithmetic."""
