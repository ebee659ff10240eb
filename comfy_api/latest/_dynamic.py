"""Inputs whose number or kind depends on what is set: Autogrow, DynamicCombo, MatchType.

The page knows them under one name with a template. A prompt holds flat names ("values.a", "resize_type.width"), which the
executor checks one by one; `execute` gets one dict per dynamic input.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from comfy_api.latest._types import ComfyTypeIO, Input, Output, WidgetInput, comfytype

MAX_NAMES = 100
Declared = dict[str, dict[str, tuple[Any, dict[str, Any]]]]


class _Anything(str):
    """A type that every link fits; which types go together is decided in the page."""

    def __ne__(self, other: object) -> bool:
        return False

    __eq__ = str.__eq__
    __hash__ = str.__hash__


def declare(inputs: Sequence[Input]) -> Declared:
    """Inputs as INPUT_TYPES has them, for the page."""
    groups: Declared = {"required": {}}
    for entry in inputs:
        group = groups.setdefault("optional" if entry.optional else "required", {})
        group[entry.id] = (entry.get_io_type(), entry.as_dict())
    return groups


def declare_flat(inputs: Sequence[Input], prefix: str = "") -> Declared:
    """Inputs under the names a prompt has, for the executor."""
    groups: Declared = {"required": {}}
    for entry in inputs:
        name = f"{prefix}{entry.id}"
        if isinstance(entry, DynamicInput):
            for group, entries in entry.flat(name).items():
                groups.setdefault(group, {}).update(entries)
        else:
            group = "optional" if entry.optional else "required"
            groups.setdefault(group, {})[name] = (entry.get_io_type(), entry.as_dict())
    return groups


def declare_chosen(inputs: Sequence[Input], values: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The inputs that come with the choices made in `values`, by flat name, with the bounds they have there."""
    found: dict[str, tuple[Any, Any]] = {}
    for entry in inputs:
        if isinstance(entry, _DynamicComboInput):
            name = f"{prefix}{entry.id}"
            for option in entry.options:
                if option.key == values.get(name):
                    for group in declare_flat(option.inputs, f"{name}.").values():
                        found.update(group)
                    found.update(declare_chosen(option.inputs, values, f"{name}."))
    return found


def nest(inputs: Sequence[Input], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by flat name -> values by input, those of dynamic inputs as dicts. Raises ValueError for a missing one."""
    dynamic = [entry for entry in inputs if isinstance(entry, DynamicInput)]
    nested = {
        name: value
        for name, value in values.items()
        if not any(name == entry.id or name.startswith(f"{entry.id}.") for entry in dynamic)
    }
    return {**nested, **{entry.id: entry.collect(entry.id, values) for entry in dynamic}}


class DynamicInput(Input):
    """Base of inputs that stand for several."""

    def flat(self, name: str) -> Declared:
        """What it stands for, when it is called `name`."""
        raise NotImplementedError

    def collect(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Its dict of values."""
        raise NotImplementedError


# ---- Autogrow --------------------------------------------------------------------------------------------------------


class _Template:
    """What grows: inputs like `input`, named one by one; at least `min` of them."""

    def __init__(self, input: Input, names: Sequence[str], min: int) -> None:
        if isinstance(input, DynamicInput):
            raise ValueError(f"{input.id}: a dynamic input cannot be what an Autogrow input repeats")
        if len(names) > MAX_NAMES:
            raise ValueError(f"{input.id}: an Autogrow input has at most {MAX_NAMES} names, not {len(names)}")
        self.input = copy.copy(input)
        if isinstance(self.input, WidgetInput):
            self.input.force_input = True
        self.names = list(names)
        self.min = min

    def as_dict(self) -> dict[str, Any]:
        return {"input": declare([self.input]), "min": self.min}


class TemplatePrefix(_Template):
    """Names are a prefix and a number from 0 on."""

    def __init__(self, input: Input, prefix: str, min: int = 1, max: int = 10) -> None:
        super().__init__(input, [f"{prefix}{number}" for number in range(max)], min)
        self.prefix = prefix
        self.max = max

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "prefix": self.prefix, "max": self.max}


class TemplateNames(_Template):
    """Names are given."""

    def __init__(self, input: Input, names: Sequence[str], min: int = 1) -> None:
        super().__init__(input, names, min)

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "names": self.names}


class _AutogrowInput(DynamicInput):
    def __init__(self, id: str, template: _Template, *more: Any, **options: Any) -> None:
        super().__init__(id, *more, **options)
        self.template = template

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "template": self.template.as_dict()}

    def _required(self) -> list[str]:
        return [] if self.optional or self.template.input.optional else self.template.names[: self.template.min]

    def flat(self, name: str) -> Declared:
        entry = (self.template.input.get_io_type(), self.template.input.as_dict())
        required = self._required()
        groups: Declared = {"required": {}, "optional": {}}
        for part in self.template.names:
            groups["required" if part in required else "optional"][f"{name}.{part}"] = entry
        return groups

    def collect(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        given = {part: values[f"{name}.{part}"] for part in self.template.names if f"{name}.{part}" in values}
        lacking = [part for part in self._required() if part not in given]
        if lacking:
            raise ValueError(f"input '{name}.{lacking[0]}' is missing; connect it")
        return given


@comfytype("COMFY_AUTOGROW_V3")
class Autogrow(ComfyTypeIO):
    """Inputs of one kind, as many as are connected; the node gets {name: value}."""

    Type = dict
    Input = _AutogrowInput
    TemplatePrefix = TemplatePrefix
    TemplateNames = TemplateNames
    _MaxNames = MAX_NAMES


# ---- DynamicCombo ----------------------------------------------------------------------------------------------------


class Option:
    """A choice and the inputs it brings."""

    def __init__(self, key: str | Enum, inputs: Sequence[Input]) -> None:
        self.key = key.value if isinstance(key, Enum) else key
        self.inputs = list(inputs)

    def as_dict(self) -> dict[str, Any]:
        return {"key": self.key, "inputs": declare(self.inputs)}


def _either(first: tuple[Any, Any], second: tuple[Any, Any]) -> tuple[Any, Any]:
    """A declaration that holds for an input of the same name under two choices."""
    if first == second:
        return first
    if first[0] != second[0]:
        return "*", {}
    options = {key: value for key, value in first[1].items() if second[1].get(key) == value}
    if "options" in first[1]:
        options["options"] = list(dict.fromkeys([*first[1]["options"], *second[1].get("options", [])]))
    return first[0], options


class _DynamicComboInput(DynamicInput):
    def __init__(self, id: str, options: Sequence[Option], *more: Any, **extra: Any) -> None:
        super().__init__(id, *more, **extra)
        self.options = list(options)

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "options": [option.as_dict() for option in self.options]}

    def flat(self, name: str) -> Declared:
        """Inputs of all choices are optional here: which ones are needed is known when the choice is."""
        keys = [option.key for option in self.options]
        own = "optional" if self.optional else "required"
        parts: dict[str, Any] = {}
        for option in self.options:
            for entries in declare_flat(option.inputs, f"{name}.").values():
                for part, entry in entries.items():
                    parts[part] = _either(parts[part], entry) if part in parts else entry
        groups: Declared = {"required": {}, "optional": parts}
        groups[own] = {name: ("COMBO", {**super().as_dict(), "options": keys}), **groups[own]}
        return groups

    def _option(self, name: str, key: Any) -> Option:
        for option in self.options:
            if option.key == key:
                return option
        known = ", ".join(repr(option.key) for option in self.options)
        raise ValueError(f"input '{name}' is {key!r}; choose one of {known}")

    def collect(self, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        if name not in values and self.optional:
            return {}
        key = values.get(name)
        key = key[0] if isinstance(key, list) and key else key
        option = self._option(name, key)
        given: dict[str, Any] = {self.id: key}
        for entry in option.inputs:
            part = f"{name}.{entry.id}"
            if isinstance(entry, DynamicInput):
                given[entry.id] = entry.collect(part, values)
            elif part in values:
                given[entry.id] = values[part]
                self._check(part, entry, values[part], key)
            elif isinstance(entry, WidgetInput) and entry.as_dict().get("default") is not None:
                given[entry.id] = entry.as_dict()["default"]
            elif not entry.optional:
                raise ValueError(f"input '{part}' is missing; it is needed when {name} is {key!r}")
        return given

    @staticmethod
    def _check(part: str, entry: Input, value: Any, key: Any) -> None:
        choices = entry.as_dict().get("options") if entry.get_io_type() == "COMBO" else None
        if choices is not None and not isinstance(value, list) and value not in choices:
            raise ValueError(f"input '{part}' is {value!r}; with {key!r} choose one of {choices}")


@comfytype("COMFY_DYNAMICCOMBO_V3")
class DynamicCombo(ComfyTypeIO):
    """A choice that brings inputs of its own; the node gets {id: choice, input: value, ...}."""

    Type = dict
    Input = _DynamicComboInput
    Option = Option


# ---- MatchType -------------------------------------------------------------------------------------------------------

_MATCH = _Anything("COMFY_MATCHTYPE_V3")


class MatchTemplate:
    """Inputs and outputs with the same template have the same type, one of `allowed_types`."""

    def __init__(self, template_id: str, allowed_types: Any = None) -> None:
        kinds = allowed_types if isinstance(allowed_types, list | tuple) else [allowed_types or "*"]
        self.template_id = template_id
        self.allowed_types = [kind if isinstance(kind, str) else kind.io_type for kind in kinds]

    def as_dict(self) -> dict[str, Any]:
        return {"template_id": self.template_id, "allowed_types": ",".join(self.allowed_types)}


class _MatchInput(Input):
    def __init__(self, id: str, template: MatchTemplate, *more: Any, **options: Any) -> None:
        super().__init__(id, *more, **options)
        self.template = template

    def get_io_type(self) -> str:
        return _MATCH

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "template": self.template.as_dict()}


class _MatchOutput(Output):
    def __init__(
        self,
        template: MatchTemplate,
        id: str | None = None,
        display_name: str | None = None,
        tooltip: str | None = None,
        is_output_list: bool = False,
    ) -> None:
        super().__init__(id, display_name or id or "MATCHTYPE", tooltip, is_output_list)
        self.template = template

    def get_io_type(self) -> str:
        return _MATCH


@comfytype("COMFY_MATCHTYPE_V3")
class MatchType(ComfyTypeIO):
    """Whatever is connected first decides the type of the others."""

    Input = _MatchInput
    Output = _MatchOutput
    Template = MatchTemplate
