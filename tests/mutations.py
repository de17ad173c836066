"""Damages files at random, from a seed: bits, numbers, blocks, and JSON values."""

import io
import json
import random
import zipfile
from typing import Any

_NUMBERS = [0, 1, -1, 7, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40]
_NUMBERS += [2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_VALUES: list[Any] = [
    *_NUMBERS,
    *(None, True, False, 0.5, -2.5, 1e300, 1e-320, float("nan"), float("inf"), 10**400, -(2**63)),
    *(
        "",
        "x",
        "null",
        "7",
        "\n",
        "\0",
        "\x1b[31m",
        "\u2028",
        "é" * 300,
        "x" * 100_000,
        "(a+)+b",
        "[",
    ),
    *([], {}, [[]], [None], [1, "x"], {"": 1}, {"a": {"b": []}}, [0] * 1000),
]


def damaged_bytes(rng: random.Random, data: bytes, start: int = 0, end: int | None = None) -> bytes:
    """Returns data with one to three changes, from `start` to `end`."""
    data, end = bytearray(data), len(data) if end is None else end
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, length = rng.randrange(start, max(start + 1, end)), rng.choice((1, 2, 4, 8))
        kind = rng.randrange(8)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            number = rng.choice(_NUMBERS) % (1 << 8 * length)
            data[at : at + length] = number.to_bytes(length, rng.choice(("little", "big")))
        elif kind == 3:
            del data[at : at + rng.choice((1, 3, 16, 1000))]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.choice((1, 3, 16, 1000)))
        elif kind == 5:
            data[at:at] = data[at : at + rng.choice((4, 46, 300))]
        elif kind == 6:
            del data[at:]
        else:
            other = rng.randrange(start, max(start + 1, end))
            data[at : at + 16], data[other : other + 16] = (
                data[other : other + 16],
                data[at : at + 16],
            )
    return bytes(data)


def damaged_value(rng: random.Random, value: Any) -> Any:
    """Returns a JSON value in which one entry is replaced, removed or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.randrange(10)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return value | {str(rng.choice(_VALUES)): value[key]}
        return value | {key: damaged_value(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], damaged_value(rng, value[at]), *value[at + 1 :]]
    return rng.choice(_VALUES)


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    """Returns JSON with changed values, or bytes that are not JSON."""
    if rng.random() < 0.2:
        return damaged_bytes(rng, data)
    if rng.random() < 0.03:
        return rng.choice(
            (b"[" * 100_000, b'{"a":' * 100_000, b"\xef\xbb\xbf" + data, b"", b"\xff")
        )
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = damaged_value(rng, value)
    return json.dumps(value).encode()


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Returns a safetensors file with a changed or an invalid header, or with changed bytes."""
    size = int.from_bytes(data[:8], "little")
    kind = rng.randrange(4)
    if kind == 0:
        return damaged_bytes(rng, data, 0, 8 + size)
    if kind == 1:
        return damaged_bytes(rng, data)
    header = damaged_json(rng, data[8 : 8 + size])
    if kind == 2:  # Spaces keep the tensors aligned to 8 bytes.
        header += b" " * (-len(header) % 8)
    length = len(header) if rng.random() < 0.9 else rng.choice(_NUMBERS) % (1 << 64)
    return length.to_bytes(8, "little") + header + data[8 + size :]


def damaged_zip(rng: random.Random, data: bytes) -> bytes:
    """Returns a zip file with a changed pickle, changed members, or a changed directory."""
    kind = rng.randrange(4)
    if kind == 0:
        return damaged_bytes(rng, data)
    if kind == 1:
        return damaged_bytes(rng, data, data.index(b"PK\x01\x02"))
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(file, "w", rng.choice((0, 0, 0, 0, 8, 12, 14))) as archive:
        for name, content in members:
            if name.endswith("data.pkl") and kind == 2:
                content = damaged_bytes(rng, content)
            elif kind == 3 and rng.random() < 0.1:
                name = rng.choice((f"{name}x", "/", "../x", "x/data.pkl", "data.pkl", name.upper()))
                content = rng.choice((content, b"", content[:-1], content * 2))
            if name not in archive.namelist():
                archive.writestr(name, content)
    return file.getvalue()
