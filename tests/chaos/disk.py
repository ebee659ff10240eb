"""A full disk: the output folder on a small file system of its own, or without permission to write."""

from __future__ import annotations

import os
import subprocess

SIZE_MB = 64


class Disk:
    """The output folder. With root's rights it is a tmpfs that `fill` fills; without them `fill` forbids writing.

    `possible` is None until `mount`, then "" or the reason why a full disk cannot be had here.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._mounted = False
        self.possible: str | None = None

    def mount(self) -> None:
        """Prepare the folder; before the server starts."""
        self.possible = ""
        if os.geteuid() != 0:
            return
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", self._folder]
        try:
            subprocess.run(mount, check=True, capture_output=True, text=True)
            self._mounted = True
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or error
            self.possible = f"a tmpfs cannot be mounted ({str(why).strip()}), and root may write everywhere"

    def fill(self) -> None:
        """From now on nothing can be written."""
        if not self._mounted:
            os.chmod(self._folder, 0o500)
            return
        with open(self._filler, "wb", buffering=0) as file:
            size = 2**20
            while size:
                try:
                    file.write(b"\0" * size)
                except OSError:
                    size //= 2

    def free(self) -> None:
        """Writing is possible again."""
        if not self._mounted:
            os.chmod(self._folder, 0o700)
        elif os.path.exists(self._filler):
            os.unlink(self._filler)

    def unmount(self) -> None:
        """Undo `mount`."""
        if self._mounted:
            subprocess.run(["umount", "-l", self._folder], check=False, capture_output=True)
            self._mounted = False

    @property
    def _filler(self) -> str:
        return os.path.join(self._folder, "filler.bin")
