"""Queue and history on disk, so that they outlive the process: one SQLite file, written by rank 0 only.

The file is in WAL mode and locked for as long as the process lives (SQLite's exclusive mode), so a second server on the
same folder cannot take the first one's prompts, and the lock of a process that was killed is gone with it. What must be
on disk before a client is answered is written with `durable`: the log is synced, so that it also survives a power
failure. Everything else survives the end of the process, and a power failure once the next durable write was made.

Rows are named by (table, key) and replaced or deleted as a whole. Rows that could not be written (a full disk) are kept
and written with the next ones; the server never fails because of its disk.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VERSION = 1
LOCK_WAIT_S = 2.0  # for a server that is ending
_COLUMNS = {
    "prompts": ("arrival", "id", "withheld", "item"),
    "starts": ("arrival", "count"),
    "history": ("place", "id", "job"),
    "entries": ("place", "entry"),
    "counters": ("name", "value"),
}
_TYPES = {"arrival": "INTEGER PRIMARY KEY", "place": "INTEGER PRIMARY KEY", "name": "TEXT PRIMARY KEY"}
_UNREADABLE = (zlib.error, ValueError, TypeError)
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
Key = tuple[str, int | str]
# values of the columns after the key; None deletes the row
Changes = Mapping[Key, tuple[Any, ...] | None]


class Damaged(Exception):
    """The file is no SQLite file, is damaged, or was made by another version."""


@dataclass
class StoredPrompt:
    """A prompt that waited or ran when the process ended."""

    arrival: int
    item: list[Any]
    starts: int  # how often it was begun
    withheld: list[str]  # keys of extra_data that are never written


@dataclass
class Found:
    """What the file had when it was opened. `history` has (place, prompt id, JSON of the job), oldest first."""

    prompts: list[StoredPrompt] = field(default_factory=list)
    history: list[tuple[int, str, str]] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)


def pack(value: Any, **options: Any) -> bytes:
    """Compressed JSON. Raises TypeError, ValueError or RecursionError for what JSON cannot hold."""
    return zlib.compress(json.dumps(value, **options).encode(), 1)


def unpack(data: bytes) -> Any:
    return json.loads(zlib.decompress(data))


def _is_damage(error: BaseException) -> bool:
    return isinstance(error, sqlite3.Error) and (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _DAMAGE


class PromptStore:
    """An open file; see the module. Thread-safe. `found` is what was in it."""

    def __init__(self, path: str) -> None:
        """Raises Damaged, sqlite3.OperationalError (also when another server has it) or OSError."""
        self.path = path
        self._lock = threading.Lock()
        self._unwritten: dict[Key, tuple[Any, ...] | None] = {}
        self._connection: sqlite3.Connection | None = None
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.exists(path):
            # prompts are private; SQLite gives its log the same mode
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        connection = sqlite3.connect(path, timeout=LOCK_WAIT_S, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection)
            self.found = _read(connection)
        except BaseException as error:
            connection.close()
            if _is_damage(error):
                raise Damaged(str(error)) from error
            raise
        self._connection = connection

    def write(self, changes: Changes, durable: bool = False) -> None:
        """Replace and delete rows, all or none. With `durable` they are synced to the disk on return.

        Never raises because of the disk: one warning says what that means, and the rows are tried again next time.
        """
        with self._lock:
            connection = self._connection
            if connection is None:
                return
            waited = bool(self._unwritten)
            self._unwritten.update(changes)
            try:
                _write(connection, self._unwritten, durable)
            except (sqlite3.Error, OSError, OverflowError) as error:
                self._not_written(error, changes, waited)
                return
            self._unwritten.clear()
        if waited:
            logging.info("the queue is on disk again (%s)", self.path)

    def _not_written(self, error: Exception, changes: Changes, waited: bool) -> None:
        if _is_damage(error):
            self._leave(error)
        elif not isinstance(error, sqlite3.OperationalError | OSError):
            # the rows themselves, not the disk: they would stop all others for ever
            for key in changes:
                self._unwritten.pop(key, None)
            logging.error("part of the queue cannot be written to %s (%s); a restart would lose it", self.path, error)
        elif not waited:
            logging.warning(
                "the queue cannot be written to %s (%s): the server goes on, but a restart would lose prompts or run "
                "some again; free space or make the file writable, and the rest is written with the next prompt",
                self.path,
                error,
            )

    def _leave(self, error: Exception) -> None:
        """The file turned out to be damaged: go on without it, so that the next start begins a new one."""
        assert self._connection is not None
        self._connection.close()
        self._connection = None
        self._unwritten.clear()
        try:
            where = f"was set aside as {set_aside(self.path)}"
        except OSError as failed:
            where = f"could not be renamed ({failed}); remove it"
        logging.error(
            "%s is damaged (%s) and %s: from now on queue and history are in memory only, until the server is started "
            "again",
            self.path,
            error,
            where,
        )

    def entry_text(self, place: int) -> str | None:
        """JSON of a history entry; None when it is not there or cannot be read."""
        with self._lock:
            if ("entries", place) in self._unwritten:
                row = self._unwritten["entries", place]
                return None if row is None else zlib.decompress(row[0]).decode()
            if self._connection is None:
                return None
            try:
                found = self._connection.execute("SELECT entry FROM entries WHERE place = ?", (place,)).fetchone()
                return None if found is None else zlib.decompress(found[0]).decode()
            except (sqlite3.Error, *_UNREADABLE) as error:
                if _is_damage(error):
                    self._leave(error)
                else:
                    logging.error("an entry of the history cannot be read from %s (%s)", self.path, error)
                return None

    def close(self) -> None:
        """Nothing is written from now on."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, VERSION):
        raise Damaged(f"its layout is number {version}, this version of the program knows number {VERSION}")
    for table, columns in _COLUMNS.items():
        declared = ", ".join(f"{name} {_TYPES.get(name, '')}" for name in columns)
        connection.execute(f"CREATE TABLE IF NOT EXISTS {table} ({declared})")
    if version == 0:
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def _read(connection: sqlite3.Connection) -> Found:
    """What the file has; rows that cannot be read are left out and deleted."""
    found = Found(counters=dict(connection.execute("SELECT name, value FROM counters").fetchall()))
    starts = dict(connection.execute("SELECT arrival, count FROM starts").fetchall())
    waiting = connection.execute("SELECT arrival, withheld, item FROM prompts ORDER BY arrival").fetchall()
    done = connection.execute("SELECT place, id, job FROM history ORDER BY place").fetchall()
    bad: dict[Key, None] = {}
    for arrival, withheld, item in waiting:
        try:
            found.prompts.append(StoredPrompt(arrival, unpack(item), starts.get(arrival, 0), json.loads(withheld)))
        except _UNREADABLE:
            bad["prompts", arrival] = None
    for place, prompt_id, job in done:
        try:
            found.history.append((place, json.loads(prompt_id), job))
        except _UNREADABLE:
            bad["history", place] = None
    if bad:
        logging.warning(
            "%d prompts of the queue or history cannot be read and are lost; the others are there", len(bad)
        )
        _write(connection, bad, durable=True)
    return found


def _write(connection: sqlite3.Connection, changes: Changes, durable: bool) -> None:
    connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    connection.execute("BEGIN IMMEDIATE")
    try:
        for (table, key), values in changes.items():
            columns = _COLUMNS[table]
            if values is None:
                connection.execute(f"DELETE FROM {table} WHERE {columns[0]} = ?", (key,))
            else:
                marks = ", ".join("?" * len(columns))
                connection.execute(f"REPLACE INTO {table} VALUES ({marks})", (key, *values))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def set_aside(path: str) -> str:
    """Rename a file that cannot be used, its log with it; the new path."""
    new = f"{path}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("-wal", "-shm", ""):
        if os.path.exists(path + suffix):
            os.replace(path + suffix, new + suffix)
    return new


def open_store(path: str) -> PromptStore | None:
    """The queue's file, None (with a warning that says why) when it cannot be used. A damaged one is set aside."""
    try:
        try:
            return PromptStore(path)
        except Damaged as error:
            new = set_aside(path)
            logging.warning(
                "%s cannot be read (%s): it was set aside as %s, and queue and history begin empty", path, error, new
            )
            return PromptStore(path)
    except (sqlite3.Error, OSError, Damaged) as error:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_BUSY:
            reason = "another server has it open; give this one another folder with --user-directory"
        else:
            reason = f"{error}; make the folder writable, or say --no-persist"
        logging.warning("queue and history are in memory only and end with this process: %s: %s", path, reason)
        return None
