"""Two ranks, simulated by two threads that share a `Lockstep`: they must run the same nodes in the same order."""

from __future__ import annotations

import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from fakes import CALLS, CHANGED, FakeServer, make, node

import comfy.model_management
import folder_paths
import nodes
from comfy_execution import ranks
from comfy_execution.caching import CacheType
from comfy_execution.lockstep import Lockstep, RankError
from comfy_execution.worker import PromptWorker
from execution import PromptExecutor

TIMEOUT = 10


class Meeting:
    """Where the ranks meet: each call of one is matched with the same call of the other, by order and topic."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.changed = threading.Condition()
        self.values = {}
        self.failure = None
        self.topics = [[] for _ in range(world_size)]

    def meet(self, rank, turn, topic, value):
        """Everybody's value for this turn. Raises RankError when a rank has failed."""
        with self.changed:
            self.topics[rank].append(topic)
            self.values.setdefault(turn, {})[rank] = (topic, value)
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(self.values[turn]) == self.world_size or self.failure, TIMEOUT)
            if len(self.values[turn]) == self.world_size:
                topics = {entry[0] for entry in self.values[turn].values()}
                assert len(topics) == 1, f"ranks do different things in turn {turn}: {topics}"
                return [self.values[turn][r][1] for r in range(self.world_size)]
            assert self.failure, f"rank {rank} waits alone for {topic!r}"
            raise RankError(*self.failure)


class ThreadLockstep(Lockstep):
    def __init__(self, rank, meeting):
        self.rank = rank
        self.meeting = meeting
        self.world_size = meeting.world_size
        self.turn = 0
        self.failed = False

    def _meet(self, topic, value):
        self.turn += 1
        return self.meeting.meet(self.rank, self.turn, topic, value)

    def begin(self, prompt_id):
        self.failed = False
        self._meet("begin", prompt_id)

    def end(self):
        self.barrier.wait(TIMEOUT)
        failure = self.meeting.failure
        self.barrier.wait(TIMEOUT)
        self.meeting.failure = None
        self.meeting.values.clear()
        self.barrier.wait(TIMEOUT)
        self.turn = 0
        if failure and not self.failed and failure[0] != self.rank:
            raise RankError(*failure)

    def fail(self, error, node_id=None):
        if isinstance(error, RankError):
            return error
        self.failed = True
        with self.meeting.changed:
            if self.meeting.failure is None:
                self.meeting.failure = (self.rank, f"cuda:{self.rank}", type(error).__name__, str(error), node_id)
            self.meeting.changed.notify_all()
        return error

    def decide(self, topic, choose):
        value = choose() if self.rank == 0 else None
        return pickle.loads(pickle.dumps(self._meet(topic, value)[0]))

    def gather(self, topic, value):
        return self._meet(topic, value)

    def share(self, topic, produce):
        return self._meet(topic, produce() if self.rank == 0 else None)[0]

    def offer(self, topic, produce):
        sent = None
        if self.rank == 0:
            try:
                sent = pickle.dumps(produce())
            except (pickle.PicklingError, AttributeError, TypeError):
                sent = b""
        sent = self._meet(topic, sent)[0]
        if self.rank == 0:
            return bool(sent), produce()
        return bool(sent), pickle.loads(sent) if sent else None

    def check(self):
        with self.meeting.changed:
            failure = self.meeting.failure
        if failure and failure[0] != self.rank:
            raise RankError(*failure)


class Group:
    """Executors of two ranks; calling it runs a prompt on both."""

    def __init__(self, **arguments):
        self.meeting = Meeting(2)
        barrier = threading.Barrier(2)
        self.executors = []
        for rank in range(2):
            lockstep = ThreadLockstep(rank, self.meeting)
            lockstep.barrier = barrier
            self.executors.append(PromptExecutor(FakeServer(), lockstep=lockstep, **arguments))
        self.count = 0

    def __call__(self, prompt, outputs):
        self.count += 1
        self.meeting.topics = [[], []]
        prompt_id = f"p{self.count}"

        def work(rank):
            threading.current_thread().name = f"rank{rank}"
            copy = pickle.loads(pickle.dumps(prompt))
            self.executors[rank].execute(copy, prompt_id, {"client_id": "page"}, outputs)

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(work, rank) for rank in range(2)]:
                done.result(30)
        assert self.meeting.topics[0] == self.meeting.topics[1] or not self.executors[0].success
        return self.executors[0].history_result["outputs"]

    @property
    def server(self):
        return self.executors[0].server

    def calls(self, rank):
        return CALLS.by_thread.get(f"rank{rank}", [])


@pytest.fixture
def group():
    return Group()


def on_rank(rank):
    return threading.current_thread().name.partition(":")[0] == f"rank{rank}"


PROMPT = {"v": node("Value", value=1), "a": node("Add", a=["v", 0], b=2), "out": node("Show", value=["a", 0])}


def test_every_rank_runs_the_nodes_and_rank_0_shows_the_result(group):
    assert group(PROMPT, ["out"]) == {"out": {"value": [3]}}
    assert group.calls(0) == ["value 1", "add", "show"]
    assert group.calls(1) == ["value 1", "add"]
    assert group.executors[1].success


def test_a_second_run_is_cached_on_both(group):
    group(PROMPT, ["out"])
    CALLS.by_thread.clear()
    assert group(PROMPT, ["out"]) == {"out": {"value": [3]}}
    assert CALLS.all == []


@pytest.mark.parametrize("cache", [CacheType.CLASSIC, CacheType.NONE, CacheType.LRU])
def test_all_semantics_hold_on_two_ranks(cache):
    group = Group(cache_type=cache)
    prompt = {
        "l": node("MakeList", count=2),
        "e": node("Expand", value=["l", 0]),
        "s": node("Switch", pick=True, first=["e", 0], second=["slow", 0]),
        "slow": node("Slow", value=5),
        "slow2": node("Slow", value=6),
        "t": node("Add", a=["s", 0], b=["slow2", 0]),
        "out": node("Show", value=["t", 0]),
    }
    assert group(prompt, ["out"]) == {"out": {"value": [8, 9]}}
    assert "slow 5 begins" not in CALLS.all
    # when a pause ends is a matter of each rank's clock
    assert group.calls(0).count("slow 6 ends") == group.calls(1).count("slow 6 ends") == 1
    ordered = [[call for call in group.calls(rank) if call not in ("show", "slow 6 ends")] for rank in (0, 1)]
    assert ordered[0] == ordered[1]


def test_the_cache_holds_only_what_every_rank_has(group):
    group(PROMPT, ["out"])
    group.executors[1].caches.outputs.clear()
    CALLS.by_thread.clear()
    assert group(PROMPT, ["out"]) == {"out": {"value": [3]}}
    assert group.calls(0) == ["value 1", "add", "show"]
    assert group.server.of("execution_cached")[-1]["nodes"] == []


def test_is_changed_is_asked_of_rank_0_only(group):
    CHANGED.extend([1, 1])
    prompt = {"c": node("Changing", value=4), "out": node("Show", value=["c", 0])}
    group(prompt, ["out"])
    group(prompt, ["out"])
    assert group.calls(0).count("is_changed") == 2
    assert "is_changed" not in group.calls(1)
    assert CALLS.count("value 4") == 2


def test_nan_runs_again_on_every_rank(group):
    CHANGED.extend([float("nan")] * 2)
    prompt = {"c": node("Changing", value=4), "out": node("Show", value=["c", 0])}
    group(prompt, ["out"])
    group(prompt, ["out"])
    assert CALLS.count("value 4") == 4


def test_lazy_inputs_are_chosen_by_rank_0(group, monkeypatch):
    monkeypatch.setattr(
        nodes.NODE_CLASS_MAPPINGS["Switch"],
        "check_lazy_status",
        lambda self, pick, first=None, second=None: {"first" if on_rank(0) else "second"} if first is None else [],
    )
    prompt = {
        "a": node("Value", value=1),
        "b": node("Value", value=2),
        "s": node("Switch", pick=True, first=["a", 0], second=["b", 0]),
        "out": node("Show", value=["s", 0]),
    }
    assert group(prompt, ["out"]) == {"out": {"value": [1]}}
    assert group.calls(1) == ["value 1", "switch"]


def test_nodes_with_side_effects_run_once_and_hand_their_result_over(group):
    prompt = {"u": node("Unique", value=7), "a": node("Add", a=["u", 0], b=1), "out": node("Show", value=["a", 0])}
    assert group(prompt, ["out"]) == {"out": {"value": [8]}}
    assert group.calls(1) == ["add"]
    CALLS.by_thread.clear()
    assert group(prompt, ["out"]) == {"out": {"value": [8]}}
    assert CALLS.all == []


def test_a_class_can_say_where_it_runs(group, monkeypatch):
    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Value"], "TACO_RANKS", "first", raising=False)
    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Show"], "TACO_RANKS", "all", raising=False)
    group(PROMPT, ["out"])
    assert group.calls(1) == ["add", "show"]


class Anything(str):
    """As packs declare it: equal to every type, and, since it has `__eq__` only, not hashable."""

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False


def through(kind, returns, run=lambda self, value: (value,), **attributes):
    """A node class that notes its calls and gives its input, of a declared type, to `run`."""

    def noted(self, value):
        CALLS.note("through")
        return run(self, value)

    return make("Through", {"value": (kind, {})}, (returns,), noted, **attributes)


LINKED = {"v": node("Value", value=1), "t": node("Through", value=["v", 0]), "out": node("Show", value=["t", 0])}


@pytest.mark.parametrize(
    "source, kind, returns, everywhere",
    [
        ("INT", "INT", "INT", False),
        ("*", "IMAGE,INT", "INT", False),
        (["1", "2"], ["1", "2"], ["1", "2"], False),
        ("INT", "INT", "FILENAMES", False),
        ("INT", "*", "INT", False),
        ("INT", Anything("*"), Anything("*"), False),
        ("MODEL", "MODEL", "INT", True),
        ("MODEL", "*", "INT", True),
        ("INT", "INT", "MODEL", True),
        ("*", "*", "INT", True),
        (Anything("*"), Anything("*"), Anything("*"), True),
    ],
)
def test_an_output_node_whose_output_is_used(group, monkeypatch, source, kind, returns, everywhere):
    """One that is given plain data saves something, once; another may be a sampler, which all ranks are needed for."""
    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Value"], "RETURN_TYPES", (source,))
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Through", through(kind, returns, OUTPUT_NODE=True))
    assert group(LINKED, ["t", "out"]) == {"out": {"value": [1]}}
    assert group.calls(1) == ["value 1", *["through"] * everywhere]


def test_an_input_that_is_not_linked_does_not_matter(group, monkeypatch):
    declared = {"required": {"value": ("INT", {})}, "optional": {"vae": ("VAE",)}}
    saving = make("Through", declared, ("INT",), lambda self, value: (CALLS.note("through"), (value,))[1],
                  OUTPUT_NODE=True)  # fmt: skip
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Through", saving)
    assert group(LINKED, ["t", "out"]) == {"out": {"value": [1]}}
    assert group.calls(1) == ["value 1"]


def test_an_output_node_on_every_rank_saves_once_and_tells_the_same(group, monkeypatch, tmp_path):
    """A sampler that saves: its files are those of rank 0, and so is the path that it returns."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    os.makedirs(tmp_path / "output")
    seen = []

    def save(self, value):
        with saving:  # ranks are threads here, so that they share what the folders are
            path = os.path.join(folder_paths.get_output_directory(), "saved.txt")
            with open(path, "a", encoding="utf-8") as file:
                file.write("once")
        return (path,)

    saving = threading.Lock()
    monkeypatch.setattr(ranks.Ranks, "files_aside", _in_turns(ranks.Ranks.files_aside))
    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Value"], "RETURN_TYPES", ("MODEL",))
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Through", through("MODEL", "STRING", save, OUTPUT_NODE=True))
    look = make("Look", {"path": ("STRING", {})}, ("INT",), lambda self, path: (seen.append(path), (1,))[1])
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Look", look)
    prompt = {**LINKED, "l": node("Look", path=["t", 0]), "out": node("Show", value=["l", 0])}
    group(prompt, ["t", "out"])
    assert seen == [str(tmp_path / "output" / "saved.txt")] * 2
    assert (tmp_path / "output" / "saved.txt").read_text() == "once"
    assert folder_paths.get_output_directory() == str(tmp_path / "output")


def test_a_file_that_every_rank_writes_is_complete_when_it_is_read(group, monkeypatch, tmp_path):
    """A pack's node that is no output node: no rank reads before all have written, and all read the same file."""
    written = []

    def write(self, value):
        if on_rank(1):
            time.sleep(0.05)
        path = tmp_path / f"file of {threading.current_thread().name}"
        path.write_text("whole")
        written.append(path)
        return (str(path), value)

    def read(self, path):
        CALLS.note(f"{len(written)} {os.path.basename(path)}")
        return (1,)

    pack = {"RELATIVE_PYTHON_MODULE": "custom_nodes.pack"}
    monkeypatch.setitem(
        nodes.NODE_CLASS_MAPPINGS, "Write", make("Write", {"value": ("INT", {})}, ("STRING", "INT"), write, **pack)
    )
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Read", make("Read", {"path": ("STRING", {})}, ("INT",), read))
    prompt = {"w": node("Write", value=1), "r": node("Read", path=["w", 0]), "out": node("Show", value=["r", 0])}
    assert group(prompt, ["out"]) == {"out": {"value": [1]}}
    assert group.calls(0)[0] == group.calls(1)[0] == "2 file of rank0"


def _in_turns(files_aside):
    turn = threading.Lock()

    @contextmanager
    def one_rank_at_a_time(self, class_def):
        with turn, files_aside(self, class_def):
            yield

    return one_rank_at_a_time


@pytest.mark.parametrize("returns", ["MODEL", "THING", Anything("*")])
def test_a_node_that_is_not_idempotent_and_returns_what_cannot_be_sent(group, monkeypatch, returns):
    """It runs on every rank, with the random numbers of rank 0, instead of failing."""
    states = {0: 5, 1: 77}

    def drawn(self, value):
        number = states[0 if on_rank(0) else 1]
        states[0 if on_rank(0) else 1] += 1
        return (lambda: number + value,)

    def set_state(state):
        states[1] = state

    monkeypatch.setattr(ranks.randomness, "get_state", lambda: states[0])
    monkeypatch.setattr(ranks.randomness, "set_state", set_state)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Through", through("INT", returns, drawn, NOT_IDEMPOTENT=True))
    called = make("Call", {"value": ("*", {})}, ("INT",), lambda self, value: (CALLS.note(f"got {value()}"), (9,))[1])
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Call", called)
    prompt = {
        "u": node("Unique", value=1),  # on rank 0 alone: random states differ after it
        "t": node("Through", value=["u", 0]),
        "c": node("Call", value=["t", 0]),
        "out": node("Show", value=["c", 0]),
    }
    assert group(prompt, ["out"]) == {"out": {"value": [9]}}
    assert group.calls(1) == ["through", "got 6"]
    assert "got 6" in group.calls(0)


def test_what_can_be_sent_is_not_computed_again(group, monkeypatch):
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Through", through("INT", "THING", NOT_IDEMPOTENT=True))
    assert group(LINKED, ["out"]) == {"out": {"value": [1]}}
    assert group.calls(1) == ["value 1"]


def test_a_first_only_node_may_expand(group, monkeypatch):
    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Expand"], "TACO_RANKS", "first", raising=False)
    prompt = {"e": node("Expand", value=1), "out": node("Show", value=["e", 0])}
    assert group(prompt, ["out"]) == {"out": {"value": [3]}}
    assert group.calls(1) == ["add", "add"]


def test_an_asynchronous_first_only_node(group, monkeypatch):
    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Slow"], "API_NODE", True, raising=False)
    prompt = {"s": node("Slow", value=1), "a": node("Add", a=["s", 0], b=1), "out": node("Show", value=["a", 0])}
    assert group(prompt, ["out"]) == {"out": {"value": [2]}}
    assert group.calls(1) == ["add"]


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_an_asynchronous_node_that_is_quick_on_one_rank_only(group, monkeypatch, slow_rank):
    import asyncio

    async def uneven(self, value):
        if on_rank(slow_rank):
            await asyncio.sleep(0.02)
        return (value,)

    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Slow"], "run", uneven)
    prompt = {"s": node("Slow", value=1), "a": node("Add", a=["s", 0], b=1), "out": node("Show", value=["a", 0])}
    assert group(prompt, ["out"]) == {"out": {"value": [2]}}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_on_one_rank_ends_the_prompt_on_all(group, monkeypatch, rank):
    def fails(self, a, b):
        if on_rank(rank):
            raise ValueError("bad weights")
        return (a + b,)

    with monkeypatch.context() as patch:
        patch.setattr(nodes.NODE_CLASS_MAPPINGS["Add"], "run", fails)
        group(PROMPT, ["out"])
    assert not any(executor.success for executor in group.executors)
    report = group.server.of("execution_error")[0]
    assert report["node_id"] == "a"
    assert report["node_type"] == "Add"
    if rank == 1:
        assert report["exception_message"] == "rank 1 (cuda:1) failed: ValueError: bad weights"
        assert report["exception_type"] == "ValueError"
    else:
        assert report["exception_message"] == "bad weights\n"
    assert group(PROMPT, ["out"]) == {"out": {"value": [3]}}
    assert all(executor.success for executor in group.executors)


def test_a_failure_in_the_last_node_of_a_follower_is_noticed(group, monkeypatch):
    def fails(self, value, **hidden):
        if on_rank(1):
            raise ValueError("late")
        return {"ui": {"value": [value]}}

    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Show"], "TACO_RANKS", "all", raising=False)
    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Show"], "run", fails)
    group(PROMPT, ["out"])
    assert not group.executors[0].success
    assert "rank 1" in group.server.of("execution_error")[0]["exception_message"]
    assert group.server.of("execution_success") == []


def test_out_of_memory_on_a_follower_unloads_on_all(group, monkeypatch):
    unloaded = []
    monkeypatch.setattr(
        comfy.model_management, "unload_all_models", lambda: unloaded.append(threading.current_thread().name)
    )

    def greedy(self, a, b):
        if on_rank(1):
            raise comfy.model_management.OOM_EXCEPTION("full")
        return (a + b,)

    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Add"], "run", greedy)
    group(PROMPT, ["out"])
    assert sorted(unloaded) == ["rank0", "rank1"]


def test_an_interrupt_ends_all_ranks_at_the_same_node(group, monkeypatch):
    flag = []
    monkeypatch.setattr(comfy.model_management, "processing_interrupted", lambda: bool(flag) and on_rank(0))
    monkeypatch.setattr(comfy.model_management, "interrupt_current_processing", lambda value=True: None)
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", lambda: None)
    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Add"], "run", lambda self, a, b: (flag.append(1), (a + b,))[1])
    group(PROMPT, ["out"])
    for executor in group.executors:
        assert executor.status_messages[-1][0] == "execution_interrupted"
        assert executor.status_messages[-1][1]["node_id"] == "out"


def test_a_cycle_is_an_error_on_all(group, monkeypatch):
    def expand(self, value):
        return {"result": (["x", 0],), "expand": {"x": node("Add", a=["y", 0], b=1), "y": node("Add", a=["x", 0], b=1)}}

    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Expand"], "run", expand)
    group({"e": node("Expand", value=1), "out": node("Show", value=["e", 0])}, ["out"])
    assert [executor.status_messages[-1][0] for executor in group.executors] == ["execution_error"] * 2


def test_a_follower_does_as_it_is_told(group):
    freed = []
    follower = PromptWorker(None, FakeServer())
    follower._free = lambda unload_models, free_memory: freed.append((unload_models, free_memory))
    item = (0, "p1", PROMPT, {}, ["out"])
    follower.follow(
        iter(
            [
                {"kind": "prompt", "item": item},
                {"kind": "free", "unload_models": True, "free_memory": False},
                {"kind": "stop"},
                {"kind": "never"},
            ]
        )
    )
    assert freed == [(True, False)]
    assert follower.executor.success
    with pytest.raises(ValueError, match="unknown command 'dance'"):
        follower.follow(iter([{"kind": "dance"}]))
