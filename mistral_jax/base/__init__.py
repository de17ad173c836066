"""Utilities that every folder uses: validation, file reading, devices, memory and messages."""

VERSION = "0.1.0"

# Supported dtypes, of parameters and of computation.
DTYPES = ("bfloat16", "float16", "float32")
