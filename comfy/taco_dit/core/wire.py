"""Plain data as bytes: what ranks send each other without pickle.

Only the types named in `encode` can be sent, and each arrives as what it was (a tuple as a tuple, an integer of any size).
Reading cannot run code. Neither direction recurses, so nesting has no limit. Tensors and arrays are supported without this
module importing torch or NumPy: the supervisor uses it, too.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

_COUNT = struct.Struct("<Q")
_FLOAT = struct.Struct("<d")
_SIZED: dict[type[Any], bytes] = {list: b"l", tuple: b"t", set: b"S", frozenset: b"F"}
_MAKERS: dict[bytes, Callable[[list[Any]], Any]] = {b"l": list, b"t": tuple, b"S": set, b"F": frozenset}


class UnsendableError(TypeError):
    """A value that holds something that is not plain data; the message says where and of which class."""


class MalformedError(ValueError):
    """Bytes that `encode` did not write."""


def encode(value: Any) -> bytes:
    """Bytes of None, bool, int, float, str, bytes, list, tuple, dict, set, frozenset, torch.Size, tensors and arrays.

    Exactly these classes, not subclasses: what arrives must be what was sent. Tensors of any device are sent dense; they
    and NumPy arrays need a dtype without Python objects. Raises UnsendableError.
    """
    out: list[bytes] = []
    work: list[Iterator[Any]] = [iter((value,))]
    path: list[str] = []  # per level of `work` above the first: where in the value it is, for error messages
    while work:
        try:
            item = next(work[-1])
        except StopIteration:
            work.pop()
            if path:
                path.pop()
            continue
        kind = type(item)
        if kind in _SIZED:
            out.append(_SIZED[kind] + _COUNT.pack(len(item)))
            work.append(iter(item))
            path.append(kind.__name__)
        elif kind is dict:
            out.append(b"d" + _COUNT.pack(len(item)))
            work.append(_flat(item, path, len(path)))
            path.append("")
        else:
            out.append(_scalar(item, path))
    return b"".join(out)


def _flat(items: dict[Any, Any], path: list[str], level: int) -> Iterator[Any]:
    """Key, value, key, value ...; notes the key in `path` at `level`."""
    for key, value in items.items():
        path[level] = str(key)[:50]
        yield key
        yield value


def _blob(tag: bytes, content: bytes) -> bytes:
    return tag + _COUNT.pack(len(content)) + content


def _scalar(item: Any, path: list[str]) -> bytes:
    if item is None:
        return b"n"
    kind = type(item)
    if kind is bool:
        return b"1" if item else b"0"
    if kind is int:
        return _blob(b"i", item.to_bytes(item.bit_length() // 8 + 1, "little", signed=True))
    if kind is float:
        return b"f" + _FLOAT.pack(item)
    if kind is str:
        return _blob(b"s", item.encode("utf-8", "surrogatepass"))
    if kind is bytes:
        return _blob(b"b", item)
    special = _special(item)
    if special is None:
        where = ".".join(part for part in path if part) or "the value"
        raise UnsendableError(
            f"{where} holds an object of class {kind.__module__}.{kind.__qualname__}, which cannot be sent to other ranks; "
            "use numbers, texts, lists, dicts and tensors"
        )
    return special


def _special(item: Any) -> bytes | None:
    """Tensors, arrays and sizes, if torch or NumPy is loaded at all."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and type(item) is torch.Size:
        return _blob(b"z", encode(tuple(item)))
    if torch is not None and type(item) in (torch.Tensor, torch.nn.Parameter) and item.layout is torch.strided:
        dense = item.detach().resolve_conj().resolve_neg().cpu().contiguous()
        raw = dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""
        return _blob(b"T", encode((str(dense.dtype).removeprefix("torch."), tuple(dense.shape), raw)))
    if numpy is not None and type(item) is numpy.ndarray and not item.dtype.hasobject and item.dtype.names is None:
        return _blob(b"A", encode((item.dtype.str, item.shape, numpy.ascontiguousarray(item).tobytes())))
    return None


def decode(data: bytes) -> Any:
    """The value that `encode` wrote. Raises MalformedError."""
    try:
        return _Reader(data).read()
    except (IndexError, struct.error, ValueError, TypeError, OverflowError) as error:
        raise MalformedError(f"a message of another rank cannot be read: {error}") from None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def read(self) -> Any:
        # Per open container: its tag, how many items are missing, the items that are there.
        open_ones: list[tuple[bytes, int, list[Any]]] = []
        while True:
            tag = self._take(1)
            if tag in _MAKERS or tag == b"d":
                count = self._count() * (2 if tag == b"d" else 1)
                if count > len(self._data) - self._at:
                    raise MalformedError("a container is longer than the message")
                open_ones.append((tag, count, []))
            else:
                value = self._scalar(tag)
                if not open_ones:
                    return self._finish(value)
                open_ones[-1][2].append(value)
            while open_ones and len(open_ones[-1][2]) == open_ones[-1][1]:
                tag, _, items = open_ones.pop()
                value = dict(zip(items[::2], items[1::2])) if tag == b"d" else _MAKERS[tag](items)
                if not open_ones:
                    return self._finish(value)
                open_ones[-1][2].append(value)

    def _finish(self, value: Any) -> Any:
        if self._at != len(self._data):
            raise MalformedError(f"{len(self._data) - self._at} bytes are left over")
        return value

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise MalformedError("the message is cut off")
        self._at += count
        return self._data[self._at - count : self._at]

    def _count(self) -> int:
        return int(_COUNT.unpack(self._take(_COUNT.size))[0])

    def _scalar(self, tag: bytes) -> Any:
        if tag == b"n":
            return None
        if tag in (b"0", b"1"):
            return tag == b"1"
        if tag == b"f":
            return _FLOAT.unpack(self._take(_FLOAT.size))[0]
        if tag not in b"isbzTA":
            raise MalformedError(f"unknown tag {tag!r}")
        content = self._take(self._count())
        if tag == b"i":
            return int.from_bytes(content, "little", signed=True)
        if tag == b"s":
            return content.decode("utf-8", "surrogatepass")
        return content if tag == b"b" else _special_of(tag, decode(content))


def _special_of(tag: bytes, content: Any) -> Any:
    if tag == b"z":
        import torch

        return torch.Size(content)
    name, shape, raw = content
    if tag == b"A":
        import numpy

        kind = numpy.dtype(name)
        if kind.hasobject:
            raise MalformedError("an array of objects")
        return numpy.frombuffer(bytearray(raw), dtype=kind).reshape(shape)
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise MalformedError(f"unknown dtype {name!r}")
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(shape)
