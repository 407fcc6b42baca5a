"""How files go wrong: bytes flip and move, values become another's; everything from one `Random`."""

from __future__ import annotations

import copy
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any
from xml.etree import ElementTree

Mutation = Callable[[Random, Sequence[bytes]], bytes]
"""from a random source and the valid files of a kind to one that may be anything"""

NUMBERS: list[Any] = [
    0, 1, -1, 2, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63) - 1,
    10**30, 10**400, 0.5, -0.0, 1e-320, 1e300, 5e-324, 99.99999999, float("nan"), float("inf"), -float("inf"),
]  # fmt: skip
TEXTS: list[Any] = [
    "", " ", "a", "b", "cat", "dog", "0", "1", "-1", "nan", "inf", "1e999", "0x10", "1_0", "٣", "²", "９",
    "a\nb", "\x1b[2J", "\0", "\ufeff", "\u202e", "\ud800", "é", "😀", "..", "../x", "/etc/passwd", "a/b",
    "a\\b", "C:\\x", "~", "%s%n", "{0}", "x" * 5000, "9" * 5000, "null", "true", "W4", "W1A99", "float",
]  # fmt: skip
OTHERS: list[Any] = [None, True, False, [], {}, [[]], {"": None}, [0] * 20, {"a": {"b": {}}}]
SCALARS = NUMBERS + TEXTS + OTHERS


def mutate_bytes(rng: Random, data: bytes, words: Sequence[bytes], other: bytes = b"") -> bytes:
    """Make one to six changes: a bit, a byte, a stretch removed, doubled, moved, zeroed, a word put in."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        i, j = sorted((rng.randrange(len(changed) + 1), rng.randrange(len(changed) + 1)))
        j = min(j, i + rng.choice((1, 4, 16, 1 << 20)))
        match rng.randrange(9):
            case 0 if i < len(changed):
                changed[i] ^= 1 << rng.randrange(8)
            case 1 if i < len(changed):
                changed[i] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 2:
                del changed[i:j]
            case 3:
                changed[i:i] = changed[i:j] * rng.choice((1, 1, 2, 50))
            case 4:
                changed[i:j] = bytes(j - i)
            case 5 if rng.random() < 0.3:
                del changed[i:]
            case 6 if other:
                k = rng.randrange(len(other) + 1)
                changed[i:j] = other[k : k + j - i]
            case 7:
                changed[i : i + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(_WORDS))
            case _ if words:
                changed[i : rng.choice((i, j))] = rng.choice(words)
        del changed[1 << 20 :]
    return bytes(changed)


_WORDS = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 100_000, 1 << 24, 9000)


def bytewise(words: Sequence[bytes]) -> Mutation:
    """Mutate bytes of any of the files, with pieces of the others."""
    return lambda rng, seeds: mutate_bytes(rng, rng.choice(seeds), words, rng.choice(seeds))


def mixed(*ways: Mutation) -> Mutation:
    """Take one of several ways."""
    return lambda rng, seeds: rng.choice(ways)(rng, seeds)


def mutate_tree(rng: Random, tree: Any) -> Any:
    """Return a copy of lists, dicts and scalars in which one to four values have changed."""
    holder = [copy.deepcopy(tree)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        spots = list(_spots(holder))
        parent, key = rng.choice(spots)
        value = parent[key]
        match rng.randrange(7):
            case 0 | 1:
                parent[key] = copy.deepcopy(rng.choice(SCALARS))
            case 2 if parent is not holder:
                del parent[key]
            case 3 if isinstance(parent, dict):
                parent[rng.choice(TEXTS)] = value
                if rng.random() < 0.7:
                    parent.pop(key)
            case 4:
                other, place = rng.choice(spots)
                parent[key] = copy.deepcopy(other[place])
            case 5:
                for _ in range(rng.choice((1, 3, 60))):
                    value = [value] if rng.random() < 0.5 else {"a": value}
                parent[key] = value
            case _ if isinstance(value, list) and value:
                parent[key] = value * rng.choice((2, 3, 30))
            case _ if isinstance(value, float) or (isinstance(value, int) and value < 10**30):
                parent[key] = rng.choice((-value, value + 1, value * 1000, value / 3, str(value)))
    return holder[0]


def _spots(parent: Any) -> Any:
    """Yield every (container, key) below."""
    for key in range(len(parent)) if isinstance(parent, list) else list(parent):
        yield parent, key
        if isinstance(parent[key], list | dict):
            yield from _spots(parent[key])


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def by_tree(loads: Callable[[bytes], Any], dumps: Callable[[Any], bytes] = as_json) -> Mutation:
    """Mutate the values of files that `loads` understands."""

    def mutate(rng: Random, seeds: Sequence[bytes]) -> bytes:
        return dumps(mutate_tree(rng, loads(rng.choice(seeds))))

    return mutate


def by_xml_tree(rng: Random, seeds: Sequence[bytes]) -> bytes:
    """Mutate elements and their texts; seeds that do not parse are passed over."""
    root = ElementTree.fromstring(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4))):
        elements = list(root.iter())
        element, other = rng.choice(elements), rng.choice(elements)
        match rng.randrange(6):
            case 0 | 1:
                element.text = str(rng.choice(NUMBERS + TEXTS + [rng.uniform(-2, 102)]))
            case 2 if len(element):
                element.remove(rng.choice(list(element)))
            case 3 if element.tag != root.tag and len(elements) < 200:
                other.append(copy.deepcopy(element))
            case 4:
                element.tag = rng.choice(("object", "bndbox", "size", "name", "width", "x"))
            case _:
                element.text, other.text = other.text, element.text
    return ElementTree.tostring(root)


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return (type, content) of each chunk of a PNG."""
    chunks, i = [], 8
    while i < len(data):
        (size,) = struct.unpack_from(">I", data, i)
        chunks.append((data[i + 4 : i + 8], data[i + 8 : i + 8 + size]))
        i += 12 + size
    return chunks


def as_png(chunks: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Write chunks with right lengths and checksums."""
    parts = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def by_png_chunk(rng: Random, seeds: Sequence[bytes]) -> bytes:
    """Mutate chunks whose checksums stay right; other files bytewise."""
    data = rng.choice(seeds)
    if not data.startswith(b"\x89PNG"):
        return mutate_bytes(rng, data, ())
    chunks = png_chunks(data)
    i = rng.randrange(len(chunks))
    name, content = chunks[i]
    match rng.randrange(4):
        case 0:
            chunks.pop(i)
        case 1:
            chunks.insert(rng.randrange(len(chunks) + 1), chunks[i])
        case 2:
            chunks.insert(i, (rng.choice(_PNG_TYPES), mutate_bytes(rng, content or b"x", ())))
        case _:
            chunks[i] = name, mutate_bytes(rng, content, ())
    return as_png(chunks)


_PNG_TYPES = (
    b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"IDAT",
    b"pHYs",
)  # fmt: skip


def by_jpeg_segment(rng: Random, seeds: Sequence[bytes]) -> bytes:
    """Mutate, repeat, drop or exchange the segments of a JPEG, lengths made to fit."""
    data = rng.choice([seed for seed in seeds if seed.startswith(b"\xff\xd8")])
    parts, i = [], 2
    while data[i + 1] != 0xDA:
        size = int.from_bytes(data[i + 2 : i + 4], "big")
        parts.append((data[i + 1], data[i + 4 : i + 2 + size]))
        i += 2 + size
    k = rng.randrange(len(parts))
    marker, content = parts[k]
    match rng.randrange(4):
        case 0:
            parts.pop(k)
        case 1:
            parts.insert(rng.randrange(len(parts) + 1), parts[k])
        case _:
            parts[k] = rng.choice((marker, marker, rng.randrange(0xC0, 0xFF))), mutate_bytes(rng, content, ())
    out = b"".join(bytes((0xFF, m)) + struct.pack(">H", (len(c) + 2) & 0xFFFF) + c for m, c in parts)
    return b"\xff\xd8" + out + data[i:]
