"""What ranks send each other: every kind of value arrives as it was, nothing else is sent, and reading runs no code."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from comfy.taco_dit.core.wire import MalformedError, UnsendableError, decode, encode

VALUES = [
    None, True, False, 0, 1, -1, 2**63, -(2**200), 1.5, -0.0, math.inf, "", "héllo \ud800 \0", b"", b"\x00\xff", [], (), {},
    [1, [2, (3, {"four": {5, 6}})]], {1: "a", "b": (1, 2), None: [], (1, "k"): frozenset({"x"})}, torch.Size([2, 3]),
    ("prompt", {"3": {"class_type": "KSampler", "inputs": {"seed": 2**64 - 1, "model": ["1", 0]}}}),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_arrives_as_what_it_was(value):
    there = decode(encode(value))
    assert there == value and type(there) is type(value)
    assert repr(there) == repr(value), "types inside, too"


def test_not_a_number():
    assert math.isnan(decode(encode(math.nan)))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 5)])
def test_tensors(dtype, shape):
    tensor = (torch.rand(shape) * 10).to(dtype)
    there = decode(encode({"t": [tensor]}))["t"][0]
    assert there.dtype == dtype and there.shape == tensor.shape
    assert torch.equal(there.to(torch.complex64), tensor.to(torch.complex64))


def test_views_and_random_states():
    tensor = torch.arange(12).reshape(3, 4).t()[1:]
    assert torch.equal(decode(encode(tensor)), tensor)
    np.random.seed(3)
    state = (random.getstate(), np.random.get_state())
    there = decode(encode(state))
    assert there[0] == state[0] and np.array_equal(there[1][1], state[1][1])
    np.random.set_state(there[1])


class Mine(str):
    pass


@pytest.mark.parametrize(
    "value", [object(), Mine("x"), Path("x"), lambda: 1, np.array([object()]), np.float32(1), VALUES.append]
)
def test_what_is_not_plain_is_refused_and_named(value):
    with pytest.raises(UnsendableError, match=r"3\.inputs\.thing.* holds an object of class .*cannot be sent"):
        encode({"3": {"inputs": {"thing": [value]}}})


def test_nesting_has_no_limit():
    deep = value = []
    for _ in range(100_000):
        deep.append({"x": []})
        deep = deep[0]["x"]
    there = decode(encode(value))
    depth = 0
    while there:
        there, depth = there[0]["x"], depth + 1
    assert depth == 100_000
    while value:  # taken apart by hand: Python's own comparison and deletion would recurse
        value = value.pop()["x"]


def test_damaged_messages_are_errors():
    good = encode({"a": [1, 2.5, "text", (None, b"bytes")], "t": torch.ones(3)})
    generator = random.Random(7)
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        with contextlib.suppress(MalformedError):
            decode(bytes(data[: generator.randint(1, len(data))]))
    for data in (b"", b"l" + b"\xff" * 8, b"T" + good, good + b"n", b"?"):
        with pytest.raises(MalformedError):
            decode(data)


def test_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(MalformedError):
            decode(pickle.dumps(Evil(), protocol))
    assert not (tmp_path / "made").exists()


def test_a_large_prompt_takes_less_than_a_second():
    prompt = {str(i): {"class_type": "X", "inputs": {"a": i, "b": "text", "c": [str(i), 0]}} for i in range(20_000)}
    began = time.process_time()
    assert decode(encode(prompt)) == prompt
    assert time.process_time() - began < 10, "far more than it takes, for slow machines"
