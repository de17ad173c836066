"""placeholder."""


def read(file):
    raise ValueError(f"{file}: not yet")
