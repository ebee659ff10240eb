"""Whether the files that weights come from are still what they were when they were loaded.

Weights are pages of memory-mapped files. A file that is written to in place changes them under a running server, and one
that is cut short ends a process that reads beyond its end (SIGBUS). So size, time of modification and inode are noted
when a file is loaded, and compared before and after its weights are used: a few microseconds for each file and network.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

_DEPTH = 6  # how deep tensors may lie in the value of a patch: tuples of tuples, models merged into models


class WeightFileError(ValueError):
    """A weight file that cannot be read; the message names file, reason and remedy."""


class WeightFileChangedError(WeightFileError):
    """A weight file that is no longer what was loaded of it."""


class FileState(NamedTuple):
    """What tells one content of a file from another without reading it: bytes, nanoseconds, inode."""

    size: int
    modified_ns: int
    inode: int


def state_of(path: str) -> FileState | None:
    """A file's state now; None when it cannot be found."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return FileState(found.st_size, found.st_mtime_ns, found.st_ino)


class WeightFile(NamedTuple):
    """A file and its state when its weights were loaded."""

    path: str
    state: FileState | None

    def check(self) -> None:
        """Raises WeightFileChangedError when the file is not what was loaded."""
        now = state_of(self.path)
        if now != self.state:
            raise WeightFileChangedError(
                f"{self.path} {_difference(self.state, now)} while its weights were in use, so nothing made with them is "
                "kept; queue the prompt again, and the file is loaded anew"
            )


def _difference(before: FileState | None, now: FileState | None) -> str:
    if now is None or before is None:
        return "was removed from the disk"
    if now.inode != before.inode:
        return "was replaced on disk by another file"
    if now.size != before.size:
        return f"changed on disk from {before.size} to {now.size} bytes"
    return "was written to on disk"


def mark(values: Iterable[Any], file: WeightFile) -> None:
    """Note from which file tensors are. What shares their memory (views, parameters) is then known, too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            value.untyped_storage().weight_file = file  # type: ignore[attr-defined]


def file_of(tensor: torch.Tensor) -> WeightFile | None:
    """The file that a tensor was loaded from; None for what was computed or copied since."""
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # tensor classes of packs that hold several tensors
        return None
    return getattr(storage, "weight_file", None)


def files_in(value: Any) -> set[WeightFile]:
    """The files of all tensors in a state dict, a patch, an adapter, or a container of these."""
    return set(_find(value, _DEPTH))


def _find(value: Any, depth: int) -> Iterator[WeightFile]:
    if isinstance(value, torch.Tensor):
        file = file_of(value)
        if file is not None:
            yield file
    elif depth == 0:
        return
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _find(item, depth - 1)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _find(item, depth - 1)
    elif isinstance(getattr(value, "weights", None), (tuple, list)):  # an adapter
        yield from _find(value.weights, depth - 1)


def check(files: Iterable[WeightFile]) -> None:
    """Raises WeightFileChangedError for the first of these files, by name, that is not what was loaded."""
    for file in sorted(files):
        file.check()
