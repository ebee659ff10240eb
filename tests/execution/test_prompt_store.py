"""Queue and history on disk: what a new process finds, and what happens when the disk does not do as it should."""

from __future__ import annotations

import copy
import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading

import pytest
from fakes import FakeServer, node

import comfy_execution.prompt_queue
import comfy_execution.prompt_store
from comfy_execution import jobs
from comfy_execution.prompt_queue import DuplicatePromptError, ExecutionStatus, PromptQueue
from comfy_execution.prompt_store import open_store, unpack

PROMPT = {"v": node("Value", value=1), "out": node("Show", value=["v", 0])}
GOOD = ExecutionStatus(
    "success", True, [("execution_start", {"timestamp": 5}), ("execution_success", {"timestamp": 9})]
)


def item(number, prompt_id, **extra):
    return (number, prompt_id, PROMPT, {"create_time": 100 + number, **extra}, ["out"])


class Process:
    """A queue with its file; `end` is the end of the process: the file is not told of anything that goes on."""

    def __init__(self, path):
        self.server = FakeServer()
        self.server.number = 0
        self.store = open_store(str(path))
        self.queue = PromptQueue(self.server, self.store)

    def end(self):
        self.queue.close()

    def waiting(self):
        return [item[1] for item in self.queue.queue]

    def run(self, result=None, status=GOOD):
        taken, task_id = self.queue.get(0)
        outputs = {"outputs": {"out": {"value": [taken[1]]}}, "meta": {}} if result is None else result
        self.queue.task_done(task_id, outputs, status)
        return taken[1]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "user" / "prompts.sqlite3"


@pytest.fixture
def start(path):
    """`start()`: the next process on the same file; the one before has ended."""
    running = []

    def next_process():
        for process in running:
            process.end()
        running.append(Process(path))
        return running[-1]

    yield next_process
    for process in running:
        process.end()


def test_what_waits_goes_on_in_order(start):
    first = start()
    first.server.number = 7
    for number, prompt_id in ((1, "b"), (2, "c"), (-1, "a"), (2, "d"), (3, "deleted")):
        first.queue.put(item(number, prompt_id))
    assert first.queue.delete_queue_item(lambda item: item[1] == "deleted")
    assert first.run() == "a"
    second = start()
    assert second.waiting() == ["b", "c", "d"]
    assert second.queue.queue[0] == item(1, "b")
    assert second.server.number == 7
    second.queue.put(item(2, "e"))
    third = start()
    assert third.waiting() == ["b", "c", "d", "e"]
    third.queue.wipe_queue()
    assert start().waiting() == []


def test_the_running_prompt_is_first_and_its_starts_are_counted(start):
    process = start()
    for number in range(3):
        process.queue.put(item(number, f"p{number}"))
    for starts in (1, 2):
        taken, task_id = process.queue.get(0)
        assert taken[1] == "p0"
        assert (process.queue.restored(task_id) is None) == (starts == 1)
        process = start()
        process.queue.put(item(-5 * starts, f"front{starts}"))
        assert process.waiting()[-2:] == ["p1", "p2"]
    taken, task_id = process.queue.get(0)
    assert taken[1] == "p0" and process.queue.restored(task_id).starts == 2
    process.queue.task_done(task_id, {"outputs": {}, "meta": {}}, ExecutionStatus("error", False, []))
    assert process.waiting() == ["front2", "front1", "p1", "p2"]
    assert start().waiting() == ["front2", "front1", "p1", "p2"]


def test_history_and_jobs_are_the_same_after_a_restart(start):
    first = start()
    for number in range(4):
        first.queue.put(item(number, f"p{number}", extra_pnginfo={"workflow": {"id": "w"}}))
    failed = ExecutionStatus("error", False, [("execution_error", {"node_id": "v", "exception_message": "no"})])
    images = {"outputs": {"out": {"images": [{"filename": "a.png", "type": "output"}]}}, "meta": {"out": {"x": 1}}}
    first.run()
    first.run(images)
    first.run(status=failed)

    def seen(process):
        running, waiting = process.queue.get_current_queue_volatile()
        listed = jobs.select(jobs.all_jobs(running, waiting, process.queue.history_jobs()))
        return json.loads(process.queue.history_json()), json.loads(json.dumps(jobs.page(listed, None, 0)))

    before = seen(first)
    assert len(before[0]) == 3 and len(before[1]["jobs"]) == 4
    second = start()
    assert seen(second) == before
    assert second.queue.history["p0"]["prompt"] == item(0, "p0", extra_pnginfo={"workflow": {"id": "w"}})
    assert seen(second) == before, "the same once an entry was read"
    assert list(second.queue.get_history(max_items=2)) == ["p1", "p2"]
    second.queue.delete_history_item("p1")
    second.queue.delete_history_item("p1")
    assert list(start().queue.history) == ["p0", "p2"]
    third = start()
    third.queue.wipe_history()
    assert third.queue.history == {} and start().queue.history == {}


def test_packs_read_the_history_as_a_dict(start):
    first = start()
    for number in range(3):
        first.queue.put(item(number, f"p{number}"))
        first.run()
    history = start().queue.history
    plain = {f"p{n}": {"prompt": item(n, f"p{n}"), "outputs": {"out": {"value": [f"p{n}"]}}, "meta": {},
                       "status": json.loads(json.dumps(GOOD._asdict()))} for n in range(3)}  # fmt: skip
    assert isinstance(history, dict) and history == plain and {**history} == plain and dict(history) == plain
    assert json.loads(json.dumps(history)) == json.loads(json.dumps(plain))
    assert copy.deepcopy(history) == plain and history.copy() == plain and history | {} == plain
    assert list(history.values()) == list(plain.values()) and list(history.items()) == list(plain.items())
    assert history.get("p1") == plain["p1"] and history.get("x", 5) == 5 and "p1" in history and "x" not in history
    assert list(reversed(history)) == ["p2", "p1", "p0"] and history.setdefault("p0", {}) == plain["p0"]
    assert history.pop("p1") == plain["p1"] and history.pop("p1", None) is None
    assert history.popitem() == ("p2", plain["p2"])
    history["mine"] = {"prompt": item(9, "mine"), "outputs": {}, "status": None, "meta": {}}
    assert list(history) == ["p0", "mine"]


def test_a_pack_may_replace_the_history(start):
    process = start()
    process.queue.put(item(1, "p1"))
    process.run()
    entry = process.queue.history["p1"]
    process.queue.history = {"other": entry}
    again = start().queue.history
    assert list(again) == ["other"] and again["other"]["outputs"] == entry["outputs"]


def test_the_oldest_leave_a_full_history(start, monkeypatch):
    monkeypatch.setattr(comfy_execution.prompt_queue, "MAXIMUM_HISTORY_SIZE", 3)
    process = start()
    for number in range(5):
        process.queue.put(item(number, f"p{number}"))
        process.run()
    assert list(process.queue.history) == ["p2", "p3", "p4"]
    assert list(start().queue.history) == ["p2", "p3", "p4"]


def test_secrets_are_never_written(start, path):
    process = start()
    process.queue.put(item(1, "p1", api_key_comfy_org="key-1234", auth_token_comfy_org=""))
    process.queue.put(item(2, "p2", api_key_comfy_org="key-1234"))
    taken, task_id = process.queue.get(0)
    assert taken[3]["api_key_comfy_org"] == "key-1234"
    process.queue.task_done(task_id, {"outputs": {}, "meta": {}}, GOOD)
    second = start()
    assert second.queue.queue[0][3] == {"create_time": 102}
    _, task_id = second.queue.get(0)
    assert second.queue.restored(task_id).withheld == ["api_key_comfy_org"]
    second.end()
    with sqlite3.connect(path) as file:
        texts = [row[0] for row in file.execute("SELECT item FROM prompts UNION ALL SELECT entry FROM entries")]
    file.close()
    assert texts and not any("key-1234" in json.dumps(unpack(text)) for text in texts)


def test_an_id_is_accepted_once(start):
    process = start()
    process.queue.accept(item(1, "waits"))
    with pytest.raises(DuplicatePromptError, match="'waits' is already used"):
        process.queue.accept(item(1, "waits"))
    process.queue.get(0)
    with pytest.raises(DuplicatePromptError):  # it runs
        process.queue.accept(item(1, "waits"))
    process.queue.task_done(0, {"outputs": {}, "meta": {}}, GOOD)
    second = start()
    with pytest.raises(DuplicatePromptError):  # it is in the history of the process before
        second.queue.accept(item(1, "waits"))
    second.queue.delete_history_item("waits")
    second.queue.accept(item(1, "waits"))
    second.queue.wipe_queue()
    second.queue.accept(item(1, "waits"))
    assert second.waiting() == ["waits"]


def test_of_simultaneous_prompts_with_one_id_one_is_accepted(start):
    process = start()
    begin = threading.Barrier(8)
    accepted = []

    def post(number):
        begin.wait(10)
        try:
            process.queue.accept(item(number, "same"))
        except DuplicatePromptError:
            return
        accepted.append(number)

    threads = [threading.Thread(target=post, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(accepted) == 1 and [entry[0] for entry in process.queue.queue] == accepted


@pytest.mark.parametrize("prompt_id", ["\ud800", "a\x00b", "'; DROP TABLE prompts", "x" * 5000])
def test_any_id_can_be_kept(start, prompt_id):
    start().queue.put(item(1, prompt_id))
    second = start()
    assert second.waiting() == [prompt_id]
    second.run()
    assert list(start().queue.history) == [prompt_id]


# ---- the disk ------------------------------------------------------------------------------------------------------


def test_only_its_owner_may_read_the_file(start, path):
    process = start()
    process.queue.put(item(1, "p1"))
    for name in os.listdir(path.parent):
        assert stat.S_IMODE(os.stat(path.parent / name).st_mode) == 0o600, name


@pytest.mark.parametrize("damage", ["no database", "torn", "version"])
def test_a_damaged_file_is_set_aside(start, path, damage, caplog):
    first = start()
    for number in range(50):
        first.queue.put(item(number, f"p{number}"))
    first.end()
    content = path.read_bytes()
    if damage == "no database":
        path.write_bytes(b"not a database at all" * 500)
    elif damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    else:
        with sqlite3.connect(path) as file:
            file.execute("PRAGMA user_version = 99")
        file.close()
    second = start()
    assert second.waiting() == []
    (aside,) = [name for name in os.listdir(path.parent) if "damaged" in name]
    assert aside in caplog.text and "begin empty" in caplog.text
    second.queue.put(item(1, "new"))
    assert start().waiting() == ["new"]


def test_a_damaged_row_costs_one_prompt(start, path, caplog):
    first = start()
    for number in range(4):
        first.queue.put(item(number, f"p{number}"))
    first.run()
    first.end()
    with sqlite3.connect(path) as file:
        file.execute("UPDATE prompts SET item = x'00' WHERE id = '\"p2\"'")
        file.execute("UPDATE entries SET entry = x'00'")
    file.close()
    second = start()
    assert second.waiting() == ["p1", "p3"] and "1 prompts of the queue or history cannot be read" in caplog.text
    assert second.queue.history["p0"]["status"]["messages"][0][0] == "history_unreadable"
    caplog.clear()
    assert start().waiting() == ["p1", "p3"] and "cannot be read" not in caplog.text


def test_damage_found_later_leaves_the_server_running(start, path, caplog):
    first = start()
    for number in range(30):
        first.queue.put(item(number, f"p{number}", padding=os.urandom(2000).hex()))
        first.run()
    first.end()
    size = path.stat().st_size
    second = start()
    with open(path, "r+b") as file:  # all pages of the entries' tree
        file.seek(8 * 4096)
        file.write(os.urandom(size - 8 * 4096))
    shown = json.loads(second.queue.history_json())
    assert set(shown) == {f"p{number}" for number in range(30)}
    assert "damaged" in caplog.text
    second.queue.put(item(1, "goes on"))
    assert second.waiting() == ["goes on"] and second.run() == "goes on"
    assert start().queue.history == {}


class FullDisk:
    """Stands in for writing rows: fails until there is room again."""

    def __init__(self, monkeypatch, error):
        self.error = error
        write = comfy_execution.prompt_store._write

        def full(connection, changes, durable):
            if self.error is not None:
                raise self.error
            write(connection, changes, durable)

        monkeypatch.setattr(comfy_execution.prompt_store, "_write", full)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), sqlite3.OperationalError("disk is full")])
def test_a_full_disk_costs_a_warning_and_is_made_up_for(start, monkeypatch, caplog, error):
    process = start()
    process.queue.put(item(0, "before"))
    disk = FullDisk(monkeypatch, error)
    for number in range(1, 4):
        process.queue.accept(item(number, f"p{number}"))
    assert process.run() == "before" and process.run() == "p1"
    assert list(json.loads(process.queue.history_json())) == ["before", "p1"]
    assert sum("cannot be written" in record.message for record in caplog.records) == 1
    disk.error = None
    process.queue.put(item(9, "after"))
    second = start()
    assert second.waiting() == ["p2", "p3", "after"] and list(second.queue.history) == ["before", "p1"]


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 1 MiB in a namespace of its own; where that is not possible, the test above has to do."""
    program = """
import logging, os, sys
sys.path[:0] = [os.getcwd(), "tests/execution"]
logging.basicConfig()
from fakes import FakeServer
from comfy_execution.prompt_queue import PromptQueue, ExecutionStatus
from comfy_execution.prompt_store import open_store
folder = sys.argv[1]
queue = PromptQueue(FakeServer(), open_store(folder + "/prompts.sqlite3"))
for number in range(40):
    queue.accept((number, f"p{number}", {}, {"padding": os.urandom(30000).hex()}, []))
for _ in range(3):
    taken, task = queue.get(0)
    queue.task_done(task, {"outputs": {}, "meta": {}}, ExecutionStatus("success", True, []))
print(len(queue.queue), list(queue.history))
"""
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "disk").mkdir()
    mounted = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}/disk && exec {sys.executable} {tmp_path}/program.py {tmp_path}/disk"
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mounted]
    try:
        subprocess.run([*command[:-1], f"mount -t tmpfs -o size=1m tmpfs {tmp_path}/disk"], check=True,
                       capture_output=True, timeout=10)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[0] == "37 ['p0', 'p1', 'p2']", done.stderr
    assert done.stderr.count("cannot be written") == 1


def test_rows_that_cannot_be_written_do_not_stop_the_others(start, caplog):
    process = start()
    process.queue.put((1, "odd", {"a": object()}, {}, []))
    process.store.write({("counters", "number"): (2**80,)})
    process.queue.put(item(2, "plain"))
    assert process.waiting() == ["odd", "plain"]
    assert "odd would be lost by a restart" in caplog.text and "part of the queue cannot be written" in caplog.text
    assert process.run({"outputs": {"out": {"value": [object()]}, 3: {}}, "meta": {(1, 2): 3}}) == "odd"
    assert "odd" in process.queue.history
    second = start()
    assert second.waiting() == ["plain"] and list(second.queue.history) == []


def test_a_second_server_leaves_the_first_ones_prompts(start, path, monkeypatch, caplog):
    monkeypatch.setattr(comfy_execution.prompt_store, "LOCK_WAIT_S", 0.1)
    first = start()
    first.queue.put(item(1, "p1"))
    program = (
        "import sys; import comfy_execution.prompt_store as s; s.LOCK_WAIT_S = 0.1; print(s.open_store(sys.argv[1]))"
    )
    other = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60)
    assert other.stdout.strip() == "None"
    assert "another server has it open" in other.stderr and "--user-directory" in other.stderr
    second = Process(path)
    assert second.store is None and second.waiting() == []
    second.queue.accept(item(1, "mine"))
    assert second.run() == "mine" and list(second.queue.history) == ["mine"]
    assert start().waiting() == ["p1"]


def test_a_folder_that_cannot_be_used(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    process = Process(tmp_path / "file" / "prompts.sqlite3")
    assert process.store is None and "--no-persist" in caplog.text
    process.queue.accept(item(1, "p1"))
    assert process.run() == "p1"


def test_nothing_is_written_after_the_end(start):
    """A process that ends stops its prompt, which is not over: it runs again after the next start."""
    process = start()
    process.queue.put(item(1, "p1"))
    _, task_id = process.queue.get(0)
    process.end()
    process.queue.task_done(task_id, {"outputs": {}, "meta": {}}, ExecutionStatus("error", False, []))
    second = start()
    assert second.waiting() == ["p1"] and second.queue.history == {}
