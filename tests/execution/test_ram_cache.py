"""--cache-ram: results stay while memory lasts; old and large ones go first, and never what is still needed."""

from __future__ import annotations

import torch

from comfy_execution.caching import CacheEntry, CacheSet, CacheType, RamCache

GIB = 2**30


class Memory:
    """So many GiB are available, and what is dropped comes back."""

    def __init__(self, cache_of, free):
        self.cache_of = cache_of
        self.free = free
        self.sizes = {}

    def __call__(self):
        held = {id(entry) for entry in self.cache_of()._entries.values()}
        return (self.free - sum(size for key, size in self.sizes.items() if key in held)) * GIB


def filled(headroom, free, sizes):
    """A cache with one result per (prompt, size in GiB), and the names of those it still has."""
    box = []
    memory = Memory(lambda: box[0], free)
    cache = RamCache(headroom, memory)
    box.append(cache)
    entries = {}
    for prompt, results in enumerate(sizes):
        cache.begin({name: name.encode() for name in results}, set())
        for name, size in results.items():
            # a tensor that says it is large, without being it
            value = torch.empty(1).expand(int(size * GIB / 4))
            entry = entries[name] = CacheEntry(None, [[value]])
            memory.sizes[id(entry)] = size
            cache.set(name, entry)
        assert cache._generation == prompt + 1
    return cache, entries, lambda: {key.decode() for key in cache._entries}


def test_nothing_goes_while_there_is_room():
    cache, _, left = filled(4, 10, [{"a": 1}, {"b": 2}])
    assert cache.relieve(list) == [] and left() == {"a", "b"}


def test_the_largest_goes_first_and_no_more_than_needed():
    cache, entries, left = filled(4, 10, [{"small": 1, "large": 5, "middle": 2}])
    assert cache.relieve(list) == [entries["large"].made] and left() == {"small", "middle"}


def test_age_makes_heavier():
    prompts = [{"old": 2}, *[{f"x{i}": 0.01} for i in range(4)], {"new": 4}]
    cache, entries, left = filled(4, 9, prompts)
    assert cache.relieve(list)[0] == entries["old"].made, "2 GiB times 1.3 ** 5 is more than 4 GiB"
    assert "new" in left()


def test_what_the_prompt_still_needs_stays():
    cache, entries, left = filled(100, 10, [{"a": 5, "b": 3}])
    assert cache.relieve(lambda: ["a"]) == [entries["b"].made] and left() == {"a"}
    assert cache.get("a") is entries["a"] and cache.get("b") is None


def test_other_ranks_drop_the_same_though_their_signatures_differ():
    cache, entries, left = filled(100, 10, [{"a": 5}, {"b": 3, "c": 1}])
    cache.drop([entries["b"].made, (7, 7)])
    assert left() == {"a", "c"}


def test_objects_may_say_what_they_take():
    class Model:
        def get_ram_usage(self):
            return 9 * GIB

    cache, entries, left = filled(4, 10, [{"tensor": 6, "model": 1}])
    entries["model"].outputs = [[Model()]]
    assert cache.relieve(list)[0] == entries["model"].made


def test_the_flag_chooses_it():
    from comfy.cli_args import build_parser
    from comfy_execution.worker import cache_choice

    parser = build_parser()
    assert cache_choice(parser.parse_args(["--cache-ram"])) == (CacheType.RAM_PRESSURE, {"ram": 4.0})
    kind, arguments = cache_choice(parser.parse_args(["--cache-ram", "1.5"]))
    assert CacheSet(kind, arguments).outputs.headroom == 1.5 * GIB
    assert cache_choice(parser.parse_args([]))[0] is CacheType.CLASSIC
