"""The history of prompts: a dict of entries by prompt id whose values may still be on disk."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from typing import Any

from comfy_execution import jobs
from comfy_execution.prompt_store import Key, PromptStore, pack
from utils import json_text

Entry = dict[str, Any]
Rows = dict[Key, tuple[Any, ...] | None]


class Kept:
    """An entry of the history. What is None is on disk (`place` names its row) and is read when somebody asks."""

    __slots__ = ("_job", "entry", "place")

    def __init__(self, place: int, entry: Entry | None, job: jobs.Job | str) -> None:
        self.place = place
        self.entry = entry
        self._job = job

    @property
    def job(self) -> jobs.Job:
        """The entry as a job, for lists of jobs."""
        job = self._job
        if isinstance(job, str):
            job = self._job = json.loads(job)
        return job


def _unreadable(prompt_id: str) -> Entry:
    """What is shown of an entry whose row was damaged."""
    message = "this entry of the history could not be read from disk; the console says why"
    status = {"status_str": "error", "completed": False, "messages": [["history_unreadable", {"message": message}]]}
    return {"prompt": (0, prompt_id, {}, {}, []), "outputs": {}, "status": status, "meta": {}}


class History(dict[str, Any]):
    """Entries by prompt id, oldest first, each a dict with `prompt`, `outputs`, `status` and `meta`.

    It is a dict, since node packs read it as one (and may encode it as JSON); every way to read it reads entries from
    disk where need be. Changes go to `store`; those that a pack
    makes inside an entry stay in memory.
    """

    def __init__(self, store: PromptStore | None, mutex: Any) -> None:
        super().__init__()
        self._store = store
        self._mutex = mutex
        self._places = itertools.count(1)
        if store is not None:
            for place, prompt_id, job in store.found.history:
                super().__setitem__(prompt_id, Kept(place, None, job))
            last = max((place for place, _, _ in store.found.history), default=0)
            self._places = itertools.count(last + 1)

    # ---- as a dict -------------------------------------------------------------------------------------------------

    def __getitem__(self, prompt_id: str) -> Entry:
        kept: Kept = super().__getitem__(prompt_id)
        if kept.entry is None:
            text = self.text(kept)
            entry = _unreadable(prompt_id) if text is None else json.loads(text)
            entry["prompt"] = tuple(entry["prompt"])
            kept.entry = entry
        return kept.entry

    def __setitem__(self, prompt_id: str, entry: Entry) -> None:
        kept, rows = self.prepare(prompt_id, entry)
        self._write(rows)
        self.insert(prompt_id, kept)

    def __delitem__(self, prompt_id: str) -> None:
        with self._mutex:
            kept: Kept = super().pop(prompt_id)
        self._write(_gone(kept))

    def clear(self) -> None:
        """Forget everything, on disk too."""
        with self._mutex:
            kept = list(super().values())
            super().clear()
        self._write({key: None for entry in kept for key in _gone(entry)})

    def __iter__(self) -> Iterator[str]:
        # dict() and ** take the values of a dict as they are, unless it has an iterator of its own
        return super().__iter__()

    def __eq__(self, other: object) -> bool:
        return dict(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __repr__(self) -> str:
        return f"<history of {len(self)} prompts>"

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Entry]:
        return copy.deepcopy(dict(self), memo)

    def copy(self) -> dict[str, Entry]:
        return dict(self)

    def get(self, prompt_id: str, default: Any = None) -> Any:
        return Mapping.get(self, prompt_id, default)

    def items(self) -> Any:
        return ItemsView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def pop(self, prompt_id: str, *default: Any) -> Any:
        if prompt_id not in self:
            return super().pop(prompt_id, *default)
        entry = self[prompt_id]
        del self[prompt_id]
        return entry

    def popitem(self) -> tuple[str, Entry]:
        last = next(reversed(self))
        return last, self.pop(last)

    def setdefault(self, prompt_id: str, default: Any = None) -> Any:
        return MutableMapping.setdefault(self, prompt_id, default)

    def update(self, *entries: Any, **named: Any) -> None:
        MutableMapping.update(self, *entries, **named)

    # ---- for the queue ---------------------------------------------------------------------------------------------

    def kept(self) -> list[tuple[str, Kept]]:
        """Ids and entries without reading any."""
        with self._mutex:
            return list(super().items())

    def find(self, prompt_id: str) -> Kept | None:
        return super().get(prompt_id)

    def text(self, kept: Kept) -> str | None:
        """JSON of an entry, as it is on disk where it was not read yet; None when it is gone."""
        if kept.entry is not None:
            return json_text.dumps(kept.entry)
        return None if self._store is None else self._store.entry_text(kept.place)

    def prepare(self, prompt_id: str, entry: Entry) -> tuple[Kept, Rows]:
        """A new entry, and the rows to be written before it is inserted."""
        kept = Kept(next(self._places), entry, jobs.from_history(entry))
        rows: Rows = {}
        if self._store is None:
            return kept, rows
        try:
            job = json_text.dumps(kept.job)
            rows["entries", kept.place] = (pack(json_text.finite(entry), default=str),)
            rows["history", kept.place] = (json.dumps(prompt_id), job)
        except (TypeError, ValueError, RecursionError) as error:
            logging.warning("prompt %s ended; its history would be lost by a restart, for %s", prompt_id, error)
            rows = {}
        before = self.find(prompt_id)
        return kept, {**(_gone(before) if before else {}), **rows}

    def insert(self, prompt_id: str, kept: Kept) -> None:
        """Add a prepared entry as the newest."""
        with self._mutex:
            super().pop(prompt_id, None)
            super().__setitem__(prompt_id, kept)

    def oldest(self, count: int) -> tuple[list[str], Rows]:
        """Ids of the oldest entries, and the rows that go with them."""
        with self._mutex:
            chosen = list(itertools.islice(super().items(), max(count, 0)))
        return [key for key, _ in chosen], {row: None for _, kept in chosen for row in _gone(kept)}

    def drop(self, prompt_ids: list[str]) -> None:
        """Forget entries whose rows are gone."""
        with self._mutex:
            for prompt_id in prompt_ids:
                super().pop(prompt_id, None)

    def _write(self, rows: Rows) -> None:
        if self._store is not None:
            self._store.write(rows)


def _gone(kept: Kept) -> Rows:
    return {("history", kept.place): None, ("entries", kept.place): None}
