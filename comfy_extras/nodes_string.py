"""Nodes on texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io
from comfy_nodes.v3 import extension


def text(name: str, **options: Any) -> Any:
    return io.String.Input(name, **{"multiline": True, **options})


def switch(name: str, default: bool, **options: Any) -> Any:
    return io.Boolean.Input(name, default=default, **options)


def json_value(json_string: str, key: str) -> str:
    """The value of a key of a JSON object as text, JSON again where it is an object or list; empty where it is missing."""
    try:
        content = json.loads(json_string)
    except json.JSONDecodeError:
        return ""
    value = content.get(key) if isinstance(content, dict) else None
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)


def string_node(
    node_id: str, display_name: str, inputs: list[Any], output: Any, function: Callable[..., Any]
) -> type[io.ComfyNode]:
    """A node whose one output is a plain function of its inputs."""

    class StringNode(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id=node_id, display_name=display_name, category="utils/string", inputs=inputs, outputs=[output]
            )

        @classmethod
        def execute(cls, **values: Any):
            return io.NodeOutput(function(**values))

    StringNode.__name__ = StringNode.__qualname__ = node_id
    return StringNode


def flags(case_insensitive: bool, multiline: bool, dotall: bool) -> int:
    chosen = re.IGNORECASE if case_insensitive else 0
    return chosen | (re.MULTILINE if multiline else 0) | (re.DOTALL if dotall else 0)


def trim(string: str, mode: str) -> str:
    return {"Both": string.strip, "Left": string.lstrip, "Right": string.rstrip}[mode]()


def change_case(string: str, mode: str) -> str:
    return {
        "UPPERCASE": string.upper,
        "lowercase": string.lower,
        "Capitalize": string.capitalize,
        "Title Case": string.title,
    }[mode]()


def contains(string: str, substring: str, case_sensitive: bool) -> bool:
    return substring in string if case_sensitive else substring.lower() in string.lower()


def compare(string_a: str, string_b: str, mode: str, case_sensitive: bool) -> bool:
    if not case_sensitive:
        string_a, string_b = string_a.lower(), string_b.lower()
    return {"Equal": string_a.__eq__, "Starts With": string_a.startswith, "Ends With": string_a.endswith}[mode](
        string_b
    )


def regex_match(string: str, regex_pattern: str, case_insensitive: bool, multiline: bool, dotall: bool) -> bool:
    """False, too, for a pattern that is not one."""
    try:
        return re.search(regex_pattern, string, flags(case_insensitive, multiline, dotall)) is not None
    except re.error:
        return False


def regex_extract(
    string: str, regex_pattern: str, mode: str, case_insensitive: bool, multiline: bool, dotall: bool, group_index: int
) -> str:
    """What was found, one per line; nothing for a pattern that is not one."""
    try:
        found = list(re.finditer(regex_pattern, string, flags(case_insensitive, multiline, dotall)))
    except re.error:
        return ""
    if mode.startswith("First"):
        found = found[:1]
    if mode.endswith(("Group", "Groups")):
        return "\n".join(match.group(group_index) or "" for match in found if len(match.groups()) >= group_index)
    if mode == "All Matches":
        # with groups in the pattern, the first group stands for the match
        return "\n".join((match.group(1) or "") if match.groups() else match.group(0) for match in found)
    return "".join(match.group(0) for match in found)


def regex_replace(
    string: str,
    regex_pattern: str,
    replace: str,
    case_insensitive: bool = True,
    multiline: bool = False,
    dotall: bool = False,
    count: int = 0,
) -> str:
    return re.sub(regex_pattern, replace, string, count=count, flags=flags(case_insensitive, multiline, dotall))


_REGEX_SWITCHES = [switch("case_insensitive", True), switch("multiline", False), switch("dotall", False)]
_STRING = io.String.Output

Concatenate = string_node(
    "StringConcatenate",
    "Concatenate",
    [text("string_a"), text("string_b"), text("delimiter", multiline=False, default="")],
    _STRING(),
    lambda string_a, string_b, delimiter: delimiter.join((string_a, string_b)),
)
Substring = string_node(
    "StringSubstring",
    "Substring",
    [text("string"), io.Int.Input("start"), io.Int.Input("end")],
    _STRING(),
    lambda string, start, end: string[start:end],
)
Length = string_node(
    "StringLength", "Length", [text("string")], io.Int.Output(display_name="length"), lambda string: len(string)
)
CaseConverter = string_node(
    "CaseConverter",
    "Case Converter",
    [text("string"), io.Combo.Input("mode", options=["UPPERCASE", "lowercase", "Capitalize", "Title Case"])],
    _STRING(),
    change_case,
)
Trim = string_node(
    "StringTrim", "Trim", [text("string"), io.Combo.Input("mode", options=["Both", "Left", "Right"])], _STRING(), trim
)
Replace = string_node(
    "StringReplace",
    "Replace",
    [text("string"), text("find"), text("replace")],
    _STRING(),
    lambda string, find, replace: string.replace(find, replace),
)
Contains = string_node(
    "StringContains",
    "Contains",
    [text("string"), text("substring"), switch("case_sensitive", True)],
    io.Boolean.Output(display_name="contains"),
    contains,
)
Compare = string_node(
    "StringCompare",
    "Compare",
    [
        text("string_a"),
        text("string_b"),
        io.Combo.Input("mode", options=["Starts With", "Ends With", "Equal"]),
        switch("case_sensitive", True),
    ],
    io.Boolean.Output(),
    compare,
)
RegexMatch = string_node(
    "RegexMatch",
    "Regex Match",
    [text("string"), text("regex_pattern"), *_REGEX_SWITCHES],
    io.Boolean.Output(display_name="matches"),
    regex_match,
)
RegexExtract = string_node(
    "RegexExtract",
    "Regex Extract",
    [
        text("string"),
        text("regex_pattern"),
        io.Combo.Input("mode", options=["First Match", "All Matches", "First Group", "All Groups"]),
        *_REGEX_SWITCHES,
        io.Int.Input("group_index", default=1, min=0, max=100),
    ],
    _STRING(),
    regex_extract,
)
RegexReplace = string_node(
    "RegexReplace",
    "Regex Replace",
    [
        text("string"),
        text("regex_pattern"),
        text("replace"),
        switch("case_insensitive", True, optional=True),
        switch("multiline", False, optional=True),
        switch("dotall", False, optional=True),
        io.Int.Input("count", default=0, min=0, max=100, optional=True),
    ],
    _STRING(),
    regex_replace,
)

JsonExtractString = string_node(
    "JsonExtractString",
    "Extract Text from JSON",
    [text("json_string"), io.String.Input("key", multiline=False)],
    _STRING(),
    json_value,
)

comfy_entrypoint = extension(
    Concatenate,
    Substring,
    Length,
    CaseConverter,
    Trim,
    Replace,
    Contains,
    Compare,
    RegexMatch,
    RegexExtract,
    RegexReplace,
    JsonExtractString,
)
