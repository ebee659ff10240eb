"""What is found wrong with a prompt before it is queued."""

from __future__ import annotations

import asyncio

import pytest
from fakes import make, node

import execution
import nodes
from comfy_execution.validation import validate_node_input


def check(prompt, targets=None):
    return asyncio.run(execution.validate_prompt("id", prompt, targets))


def kinds(result, node_id):
    return [error["type"] for error in result[3][node_id]["errors"]]


@pytest.fixture
def register(monkeypatch):
    def add(name, inputs, returns=("INT",), **attributes):
        cls = make(name, inputs, returns, lambda self, **values: (0,), **attributes)
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, cls)

    return add


def out(source):
    return node("Show", value=[source, 0])


def test_values_are_converted_in_place():
    prompt = {"v": node("Value", value="7"), "out": out("v"), "w": node("Show", value={"__value__": "8"})}
    valid, error, outputs, node_errors = check(prompt)
    assert (valid, error, outputs, node_errors) == (True, None, ["out", "w"], {})
    assert prompt["v"]["inputs"]["value"] == 7
    assert prompt["w"]["inputs"]["value"] == 8


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        ({}, "required_input_missing"),
        ({"value": "x"}, "invalid_input_type"),
        ({"value": None}, "invalid_input_type"),
        ({"value": ["nowhere", 0]}, "bad_linked_input"),
        ({"value": ["v"]}, "bad_linked_input"),
        ({"value": ["v", 3]}, "bad_linked_input"),
        ({"value": ["text", 0]}, "return_type_mismatch"),
    ],
)
def test_errors_name_their_kind_and_input(register, inputs, kind):
    register("Text", {}, ("STRING",))
    prompt = {"v": node("Value", value=1), "text": node("Text"), "out": node("Show", **inputs)}
    result = check(prompt)
    assert not result[0]
    assert result[1]["type"] == "prompt_outputs_failed_validation"
    error = result[3]["out"]["errors"][0]
    assert error["type"] == kind
    assert error["extra_info"]["input_name"] == "value"
    assert "value" in error["details"]


def test_bounds_and_choices(register):
    register(
        "Bounded",
        {"n": ("FLOAT", {"min": 0, "max": 1}), "c": (["a", "b"],), "d": ("COMBO", {"options": ["x"]})},
        OUTPUT_NODE=True,
    )
    prompt = {"o": node("Bounded", n=2, c="c", d="y"), "p": node("Bounded", n=-1, c="a", d="x")}
    result = check(prompt)
    assert kinds(result, "o") == ["value_bigger_than_max", "value_not_in_list", "value_not_in_list"]
    assert kinds(result, "p") == ["value_smaller_than_min"]
    assert result[3]["o"]["errors"][1]["details"] == "c: 'c' not in ['a', 'b']"


def test_a_long_choice_is_not_spelled_out(register):
    register("Long", {"c": ([str(i) for i in range(100)],)}, OUTPUT_NODE=True)
    assert "(list of length 100)" in check({"o": node("Long", c="x")})[3]["o"]["errors"][0]["details"]


def test_a_node_may_check_itself(register):
    seen = []

    def validate(cls, n, input_types):
        seen.append((n, input_types))
        return True if n == 5 else "must be five"

    register(
        "Own", {"n": ("INT", {"max": 1}), "x": ("FLOAT", {})}, OUTPUT_NODE=True, VALIDATE_INPUTS=classmethod(validate)
    )
    prompt = {"v": node("Value", value=1), "o": node("Own", n=5, x=["v", 0])}
    assert check(prompt)[0]
    assert seen == [(5, {"x": "INT"})]
    prompt["o"]["inputs"]["n"] = 6
    error = check(prompt)[3]["o"]["errors"][0]
    assert error["type"] == "custom_validation_failed"
    assert error["details"] == "n - must be five"


def test_an_exception_in_a_node_is_reported(register):
    def validate(cls, n):
        raise RuntimeError("broken")

    register("Broken", {"n": ("INT", {})}, VALIDATE_INPUTS=classmethod(validate))
    register("BrokenOut", {"n": ("INT", {})}, VALIDATE_INPUTS=classmethod(validate), OUTPUT_NODE=True)
    prompt = {"b": node("Broken", n=1), "out": out("b"), "o": node("BrokenOut", n=1)}
    result = check(prompt)
    assert kinds(result, "b") == ["exception_during_inner_validation"]
    assert kinds(result, "o") == ["exception_during_validation"]


@pytest.mark.parametrize("raised", [SystemExit(1), GeneratorExit(), asyncio.CancelledError()])
def test_a_node_that_leaves_while_it_is_checked_is_reported(register, raised):
    """Checks run in the server's event loop, which these would end."""

    def validate(cls, n):
        raise raised

    register("Broken", {"n": ("INT", {})}, VALIDATE_INPUTS=classmethod(validate), OUTPUT_NODE=True)
    valid, _, _, errors = asyncio.run(execution.validate_prompt("p", {"1": node("Broken", n=1)}))
    assert not valid and errors["1"]["errors"][0]["type"] == "exception_during_validation"


def test_good_outputs_run_though_others_are_bad():
    prompt = {"v": node("Value"), "bad": out("v"), "bad2": out("v"), "w": node("Value", value=1), "good": out("w")}
    valid, _, outputs, node_errors = check(prompt)
    assert valid
    assert outputs == ["good"]
    assert node_errors["v"]["dependent_outputs"] == ["bad", "bad2"]
    assert list(node_errors) == ["v"]


def test_a_cycle_is_found():
    prompt = {"a": node("Add", a=["b", 0], b=1), "b": node("Add", a=["a", 0], b=1), "out": out("a")}
    result = check(prompt)
    assert not result[0]
    assert "Dependency cycle" in str(result[3])


@pytest.mark.parametrize(
    "prompt",
    [{"1": {"inputs": {}}}, {"1": {"class_type": "No such", "inputs": {}}}, {"1": {"class_type": "Value"}}, {"1": 5}],
)
def test_a_prompt_has_nodes_of_known_classes(prompt):
    assert check(prompt)[1]["type"] == "invalid_prompt"


def test_validation_is_linear_in_the_number_of_nodes(monkeypatch):
    """Each node's inputs are declared once a prompt, however long the chain; times are in benchmarks/executor_overhead."""
    asked = []
    declared = nodes.NODE_CLASS_MAPPINGS["Add"].INPUT_TYPES
    monkeypatch.setattr(nodes.NODE_CLASS_MAPPINGS["Add"], "INPUT_TYPES", lambda: asked.append(1) or declared())
    counts = []
    for length in (100, 1000):
        prompt = {"0": node("Value", value=1)}
        for i in range(1, length):
            prompt[str(i)] = node("Add", a=[str(i - 1), 0], b=i)
        prompt["out"] = out(str(length - 1))
        asked.clear()
        assert check(prompt)[0]
        counts.append(len(asked))
    assert counts[1] <= 11 * counts[0]


class _Any(str):
    def __ne__(self, other):
        return False


@pytest.mark.parametrize(
    ("received", "wanted", "fits"),
    [
        ("INT", "INT", True),
        ("INT", "FLOAT", False),
        ("INT", "FLOAT,INT", True),
        ("INT,STRING", "FLOAT,INT", True),
        ("*", "MODEL", True),
        ("MODEL", "*", True),
        (_Any("*"), "MODEL", True),
        (["a"], ["a"], True),
        (["a"], ["b"], False),
        ("COMBO", ["a"], True),
        (["a"], "COMBO", True),
        (["a"], "INT", False),
    ],
)
def test_types_fit(received, wanted, fits):
    assert validate_node_input(received, wanted) is fits


def test_types_fit_strictly():
    assert not validate_node_input("INT,STRING", "INT", strict=True)
    assert validate_node_input("INT", "INT,STRING", strict=True)


@pytest.mark.parametrize(
    "key, value, problem",
    [
        ("small", 5, None),
        ("small", 50, "value_bigger_than_max"),
        ("large", 50, None),
        ("large", 5, "value_smaller_than_min"),
        ("inner", 5, None),
        ("other", 5, "value_not_in_list"),
    ],
)
def test_bounds_are_those_of_the_choice(monkeypatch, key, value, problem):
    """Two choices bring an input of the same name with other bounds."""
    from comfy_api.latest import io

    inner = io.DynamicCombo.Input("deep", options=[io.DynamicCombo.Option("x", [io.Int.Input("size", max=3)])])

    class Sized(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id="Sized",
                outputs=[io.Int.Output()],
                inputs=[
                    io.DynamicCombo.Input(
                        "kind",
                        options=[
                            io.DynamicCombo.Option("small", [io.Int.Input("size", default=1, min=0, max=10)]),
                            io.DynamicCombo.Option("large", [io.Int.Input("size", default=20, min=11, max=100)]),
                            io.DynamicCombo.Option("inner", [inner]),
                        ],
                    )
                ],
            )

        @classmethod
        def execute(cls, kind):
            return io.NodeOutput(0)

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Sized", Sized)
    prompt = {"s": {"class_type": "Sized", "inputs": {"kind": key, "kind.size": value}}, "out": out("s")}
    result = check(prompt)
    assert result[0] is (problem is None)
    if problem is not None:
        assert kinds(result, "s") == [problem]
    prompt["s"]["inputs"] = {"kind": "inner", "kind.deep": "x", "kind.deep.size": 4}
    assert kinds(check(prompt), "s") == ["value_bigger_than_max"]
