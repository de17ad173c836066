"""What every folder uses: files from outside, checked fields, the machine, its memory, messages."""

VERSION = "0.1.0"

# What the parameters of a model may be, and what it may compute in.
DTYPES = ("bfloat16", "float16", "float32")
