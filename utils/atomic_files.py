"""Files that are complete or not there: written under a temporary name in the same folder, then renamed.

A reader sees the old content or the new one, and a full disk or a power failure leaves the old one.

    write(path, content)                        replaces the file
    write(path, content, overwrite=False)       raises FileExistsError when there is one
    with Unfinished(folder) as file:            for content that comes in parts
        file.write(part)
        file.finish(path)
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil

PREFIX = ".taco-part-"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# what file systems without hard links answer
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that the disk, or this user's share of it, is full."""
    return error.errno in _NO_SPACE


class Unfinished:
    """A temporary file in `folder`, open for writing; removed at the end of the `with` block unless `finish` was called.

    Raises OSError where the folder cannot be written to.
    """

    def __init__(self, folder: str, mode: int = 0o666) -> None:
        self.path = os.path.join(folder, PREFIX + secrets.token_hex(8))
        self._file = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb")

    def write(self, part: bytes | memoryview) -> None:
        """Raises OSError when the disk does not take it."""
        self._file.write(part)

    def close(self) -> None:
        """Bring the content to the disk. Raises OSError when it does not take it all."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def finish(self, path: str, overwrite: bool = True) -> None:
        """Give the file its name. Raises FileExistsError when there is one and not `overwrite`, OSError as `close`."""
        self.close()
        if os.stat(self.path).st_dev != os.stat(os.path.dirname(path)).st_dev:
            with Unfinished(os.path.dirname(path)) as copy, open(self.path, "rb") as source:
                shutil.copyfileobj(source, copy._file, 1 << 20)
                copy.finish(path, overwrite)
            return
        if overwrite:
            with contextlib.suppress(FileNotFoundError):
                os.chmod(self.path, os.stat(path).st_mode & 0o777)
            os.replace(self.path, path)
        else:
            rename_to_free(self.path, path)
        _sync_folder(os.path.dirname(path))

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *exc: object) -> None:
        self.discard()

    def discard(self) -> None:
        """Close and remove the file, unless it has its name already."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):  # it was renamed
            os.remove(self.path)


def rename_to_free(source: str, target: str) -> None:
    """Rename a file to a name that no file has. Raises FileExistsError when one has it, also when it appears just now."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    else:
        os.remove(source)
        return
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    try:
        os.replace(source, target)
    except OSError:
        os.remove(target)
        raise


def write(path: str, content: bytes | str, overwrite: bool = True, mode: int = 0o666) -> None:
    """Write a whole file (texts as UTF-8). Raises FileExistsError when there is one and not `overwrite`, and OSError."""
    with Unfinished(os.path.dirname(os.path.abspath(path)), mode) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.finish(path, overwrite)


def _sync_folder(folder: str) -> None:
    """Bring a new name to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
