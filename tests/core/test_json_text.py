"""JSON that every reader takes."""

from __future__ import annotations

import json
import math
import sys

import pytest

from utils.json_text import dumps, finite, loads


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} in {text}")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null():
    value = {"a": [math.nan, {"b": (math.inf, -math.inf, 1.5)}], "c": "NaN", 2: None, "d": object}
    shown = strict(dumps(value))
    assert shown == {"a": [None, {"b": [None, None, 1.5]}], "c": "NaN", "2": None, "d": str(object)}
    assert math.isnan(value["a"][0]), "the value itself is not changed"
    assert strict(dumps({math.nan: 1})) == {"nan": 1}


def test_infinite_limits_become_the_largest_number():
    assert strict(dumps({"max": math.inf, "min": -math.inf, "x": math.nan}, sys.float_info.max)) == {
        "max": sys.float_info.max, "min": -sys.float_info.max, "x": None,
    }  # fmt: skip
    assert finite(math.inf, 2.0) == 2.0


def test_what_contains_itself_is_an_error():
    value = [math.nan]
    value.append(value)
    with pytest.raises(ValueError, match="contains itself"):
        dumps(value)


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[-Infinity]", "[" * 100_000, "1" * 5000, "{", ""])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError):
        loads(text)
    assert loads('{"a": [1, "NaN"]}') == {"a": [1, "NaN"]}
