"""Files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from utils import atomic_files


def listed(folder):
    return sorted(os.listdir(folder))


def test_a_file_is_replaced_and_keeps_its_rights(tmp_path):
    path = tmp_path / "a.json"
    atomic_files.write(str(path), "é")
    assert path.read_text(encoding="utf-8") == "é"
    path.chmod(0o640)
    atomic_files.write(str(path), b"2")
    assert path.read_bytes() == b"2" and path.stat().st_mode & 0o777 == 0o640 and listed(tmp_path) == ["a.json"]
    atomic_files.write(str(tmp_path / "key"), b"k", mode=0o600)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic_files.os, step, full)
    with pytest.raises(OSError, match="No space") as raised:
        atomic_files.write(str(path), "new")
    assert atomic_files.is_disk_full(raised.value) and path.read_text() == "old" and listed(tmp_path) == ["a.json"]


def test_a_reader_never_sees_a_half_file(tmp_path):
    path = tmp_path / "a.json"
    atomic_files.write(str(path), b"0" * 500_000)
    done, seen = threading.Event(), set()

    def read():
        while not done.is_set():
            content = path.read_bytes()
            seen.add((len(content), len(set(content))))

    reader = threading.Thread(target=read)
    reader.start()
    for digit in (b"1", b"2", b"3"):
        atomic_files.write(str(path), digit * 500_000)
    done.set()
    reader.join()
    assert seen == {(500_000, 1)}


@pytest.mark.parametrize("links", [True, False])
def test_a_name_is_taken_by_one_only(tmp_path, monkeypatch, links):
    if not links:

        def without(*arguments, **keywords):
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(atomic_files.os, "link", without)
    path, won, start = str(tmp_path / "a"), [], threading.Barrier(8)

    def take(number):
        start.wait()
        try:
            atomic_files.write(path, str(number), overwrite=False)
            won.append(str(number))
        except FileExistsError:
            pass

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and (tmp_path / "a").read_text() == won[0] and listed(tmp_path) == ["a"]


def test_what_is_not_finished_is_removed(tmp_path):
    with pytest.raises(ValueError), atomic_files.Unfinished(str(tmp_path)) as file:
        file.write(b"half")
        assert listed(tmp_path)[0].startswith(atomic_files.PREFIX)
        raise ValueError
    assert listed(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        atomic_files.Unfinished(str(tmp_path / "none"))


def test_another_file_system_gets_a_copy(tmp_path, monkeypatch):
    (tmp_path / "far").mkdir()
    real = os.stat

    class Far:
        st_dev, st_mode = -1, 0o644

    monkeypatch.setattr(
        atomic_files.os, "stat", lambda path, **more: Far if str(path) == str(tmp_path / "far") else real(path, **more)
    )
    with atomic_files.Unfinished(str(tmp_path)) as file:
        file.write(b"content")
        monkeypatch.setattr(atomic_files.Unfinished, "__init__", copied(monkeypatch, real))
        file.finish(str(tmp_path / "far" / "a"))
    assert (tmp_path / "far" / "a").read_bytes() == b"content" and listed(tmp_path) == ["far"]


def copied(monkeypatch, real):
    """From the copy on all is one file system."""
    original = atomic_files.Unfinished.__init__

    def begin(self, *arguments):
        monkeypatch.setattr(atomic_files.os, "stat", real)
        original(self, *arguments)

    return begin
