"""When each rank imports a node pack.

Packs write files when they are imported: settings, caches, copies of scripts for the page. Ranks that do so at once corrupt
them, or read what another one has half written. So rank 0 imports a pack first, and the others follow one after the other,
while those before them import the next packs: with small packs a start takes as long as with one rank. Of a pack that takes
long, followers only begin `STAGGER_S` apart, and so are at different places of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STAGGER_S = 0.5
_KIND = "packs"
_ALL = "all of them"


class PackTurns:
    """This rank's turns. `control` is its control plane (`ControlClient`), None with one rank."""

    def __init__(self, control: Any, rank: int) -> None:
        self._control = control
        self._rank = rank

    @contextmanager
    def turn(self, pack: str) -> Iterator[None]:
        """Inside, this rank imports a pack, named alike on all ranks of a host."""
        if self._control is None:
            yield
            return
        if self._rank:
            self._wait_for_rank_before(pack)
        self._tell("began", pack)
        try:
            yield
        finally:
            self._tell("done", pack)

    def over(self) -> None:
        """This rank has imported all packs."""
        if self._control is not None:
            self._tell("done", _ALL)

    def _key(self, rank: int, what: str, pack: str) -> str:
        return f"{_KIND}/{rank}/{what}/{pack}"

    def _tell(self, what: str, pack: str) -> None:
        self._control.set(self._key(self._rank, what, pack), str(time.time()).encode())

    def _wait_for_rank_before(self, pack: str) -> None:
        before = self._rank - 1

        def never() -> bool:
            """Whether that rank does not import this pack: it was not there when the folder was listed."""
            return bool(self._control.peek(self._key(before, "done", _ALL)))

        if before == 0:
            self._control.get(self._key(0, "done", pack), never)
            return
        began = self._control.get(self._key(before, "began", pack), never)
        if began is not None:  # clocks of hosts may differ
            end = time.monotonic() + min(STAGGER_S, float(began) + STAGGER_S - time.time())
            self._control.get(self._key(before, "done", pack), lambda: time.monotonic() > end)


def forget(control: Any) -> None:
    """Rank 0 begins anew with the packs, and so will all others."""
    control.drop(_KIND, 1 << 30)
