"""Checking a prompt before it is queued: what is reported to the page, node by node.

Every node is checked once, its sources first, without recursion, so that long chains are neither slow nor too deep.
Values are converted in place to what their inputs declare.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from comfy_execution import seams
from comfy_execution.graph import get_input_info
from comfy_execution.graph_utils import ExecutionBlocker, is_link
from comfy_execution.inputs import get_input_data, has_function
from comfy_execution.node_execution import ends_program
from comfy_execution.utils import full_type_name
from comfy_execution.validation import validate_node_input

Error = dict[str, Any]
_MAX_OPTIONS_SHOWN = 20


def error(kind: str, message: str, details: str = "", **extra_info: Any) -> Error:
    """One entry of an error report."""
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info}


@dataclass
class _Checked:
    """Own errors of a node, and whether it and everything before it are valid."""

    errors: list[Error] = field(default_factory=list)
    valid: bool = True


def _links(inputs: Mapping[str, Any]) -> list[str]:
    return [value[0] for value in inputs.values() if is_link(value)]


def _declared_names(class_inputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    required = list(class_inputs.get("required", {}))
    optional = class_inputs.get("optional")
    if optional is None:
        return required
    # `optional` may be an object that answers `in` and `[]` only
    return required + [name for name in inputs if name in optional and name not in required]


def _convert(value: Any, kind: Any) -> Any:
    if kind == "INT":
        return int(value)
    if kind == "FLOAT":
        return float(value)
    if kind == "STRING":
        return str(value)
    if kind == "BOOLEAN":
        return bool(value)
    return value


class PromptCheck:
    """Validation of one prompt; `checked` maps node ids to what was found."""

    def __init__(self, prompt_id: str, prompt: dict[str, Any]) -> None:
        self.prompt_id = prompt_id
        self.prompt = prompt
        self.checked: dict[str, _Checked] = {}
        self._input_types: dict[Any, Any] = {}
        self._signatures: dict[Any, tuple[list[str], bool]] = {}

    async def check(self, output_id: str) -> bool:
        """Check a node and all it depends on; whether all are valid."""
        path = [output_id]
        on_path: set[str] = set()
        while path:
            node_id = path[-1]
            if node_id in self.checked:
                path.pop()
                continue
            inputs = self.prompt[node_id]["inputs"]
            sources = [source for source in _links(inputs) if source in self.prompt and source not in self.checked]
            if node_id not in on_path and sources:
                on_path.add(node_id)
                path.extend(dict.fromkeys(sources))
                circle = [source for source in sources if source in on_path]
                if circle:
                    self.checked[node_id] = self._cycle(node_id, circle[0])
                continue
            self.checked[node_id] = await self._check_safely(node_id, node_id == output_id)
            path.pop()
        return self.checked[output_id].valid

    def _cycle(self, node_id: str, source: str) -> _Checked:
        found = error(
            "exception_during_inner_validation",
            "Exception when validating inner node",
            f"Dependency cycle detected: node {node_id} depends on node {source}, which depends on it",
            linked_node=[source, 0],
        )
        return _Checked([found], valid=False)

    async def _check_safely(self, node_id: str, is_output: bool) -> _Checked:
        result = _Checked()
        try:
            for found in [found async for found in self._problems(node_id, result)]:
                result.errors.append(found)
        except BaseException as problem:  # noqa: BLE001 - a node pack's INPUT_TYPES or VALIDATE_INPUTS may do anything
            if ends_program(problem):
                raise
            kind = "exception_during_validation" if is_output else "exception_during_inner_validation"
            message = "Exception when validating node" if is_output else "Exception when validating inner node"
            result.errors.append(
                error(
                    kind,
                    message,
                    str(problem),
                    exception_type=full_type_name(type(problem)),
                    traceback=traceback.format_tb(sys.exc_info()[2]),
                )
            )
        result.valid = result.valid and not result.errors
        return result

    def _class(self, node_id: str) -> Any:
        import nodes

        return nodes.NODE_CLASS_MAPPINGS[self.prompt[node_id]["class_type"]]

    def _class_inputs(self, class_def: Any) -> Any:
        if class_def not in self._input_types:
            self._input_types[class_def] = class_def.INPUT_TYPES()
        return self._input_types[class_def]

    def _own_checks(self, class_def: Any) -> tuple[str | None, list[str], bool]:
        """Name of the class's own validation, the inputs it names, and whether it takes any."""
        name = has_function(class_def, "VALIDATE_INPUTS", "validate_inputs")
        if name is None:
            return None, [], False
        if class_def not in self._signatures:
            spec = inspect.getfullargspec(getattr(class_def, name))
            self._signatures[class_def] = (spec.args + spec.kwonlyargs, spec.varkw is not None)
        return (name, *self._signatures[class_def])

    async def _problems(self, node_id: str, result: _Checked) -> Any:
        class_def = self._class(node_id)
        class_inputs = self._class_inputs(class_def)
        inputs = self.prompt[node_id]["inputs"]
        function, named, takes_all = self._own_checks(class_def)
        received: dict[str, Any] = {}
        # what INPUT_TYPES says of an input that several choices bring holds for all of them; here one is chosen
        chosen = class_def.CHOSEN_INPUTS(inputs) if hasattr(class_def, "CHOSEN_INPUTS") else {}
        for name in _declared_names(class_inputs, inputs):
            info = get_input_info(class_def, name, class_inputs)
            if name not in inputs:
                if info[1] == "required":
                    yield error("required_input_missing", "Required input is missing", name, input_name=name)
                continue
            value = inputs[name]
            config = chosen.get(name, (info[0], info[2]))
            if isinstance(value, list):
                for found in self._check_link(name, value, config, named, received, result):
                    yield found
            else:
                for found in self._check_constant(inputs, name, config, takes_all or name in named):
                    yield found
        if function is not None and (named or takes_all):
            async for found in self._ask_node(node_id, class_def, function, named, takes_all, received):
                yield found

    def _check_link(
        self,
        name: str,
        value: list[Any],
        config: tuple[Any, Any],
        named: list[str],
        received: dict[str, Any],
        result: _Checked,
    ) -> Iterable[Error]:
        if not is_link(value):
            yield error(
                "bad_linked_input",
                "Bad linked input, must be a length-2 list of [node_id, slot_index]",
                name,
                input_name=name,
                input_config=config,
                received_value=value,
            )
            return
        source, slot = value[0], int(value[1])
        if source not in self.prompt:
            yield error(
                "bad_linked_input",
                f"Bad linked input, node {source} is not in the prompt",
                name,
                input_name=name,
                input_config=config,
                received_value=value,
            )
            return
        types = self._class(source).RETURN_TYPES
        # some packs' RETURN_TYPES answer any index, so only a failing look-up proves that the slot is missing
        try:
            kind = types[slot]
        except IndexError:
            yield error(
                "bad_linked_input",
                f"Bad linked input, node {source} has {len(types)} output(s)",
                name,
                input_name=name,
                input_config=config,
                received_value=value,
            )
            return
        received[name] = kind
        if "input_types" not in named and not validate_node_input(kind, config[0]):
            yield error(
                "return_type_mismatch",
                "Return type mismatch between linked nodes",
                f"{name}, received_type({kind}) mismatch input_type({config[0]})",
                input_name=name,
                input_config=config,
                received_type=kind,
                linked_node=value,
            )
            return
        before = self.checked.get(source)
        if before is not None and not before.valid:
            result.valid = False

    def _check_constant(
        self, inputs: dict[str, Any], name: str, config: tuple[Any, Any], checks_itself: bool
    ) -> Iterable[Error]:
        kind, options = config
        value = inputs[name]
        if isinstance(value, dict) and "__value__" in value:
            value = inputs[name] = value["__value__"]
        try:
            value = inputs[name] = _convert(value, kind) if isinstance(kind, str) else value
        except (TypeError, ValueError, OverflowError) as problem:
            yield error(
                "invalid_input_type",
                f"Failed to convert an input value to a {kind} value",
                f"{name}, {value}, {problem}",
                input_name=name,
                input_config=config,
                received_value=value,
                exception_message=str(problem),
            )
            return
        if checks_itself:
            return
        about = {"input_name": name, "input_config": config, "received_value": value}
        options = options or {}
        if isinstance(value, int | float):
            if "min" in options and value < options["min"]:
                yield error(
                    "value_smaller_than_min", f"Value {value} smaller than min of {options['min']}", name, **about
                )
                return
            if "max" in options and value > options["max"]:
                yield error(
                    "value_bigger_than_max", f"Value {value} bigger than max of {options['max']}", name, **about
                )
                return
        choices = kind if isinstance(kind, list | tuple) else options.get("options") if kind == "COMBO" else None
        if choices is not None:
            yield from self._check_choice(name, value, choices, bool(options.get("multiselect")), about)

    def _check_choice(
        self, name: str, value: Any, choices: Any, several: bool, about: dict[str, Any]
    ) -> Iterable[Error]:
        chosen = value if several and isinstance(value, list) else [value]
        wrong = [item for item in chosen if item not in choices]
        if not wrong:
            return
        if len(choices) > _MAX_OPTIONS_SHOWN:
            shown = f"(list of length {len(choices)})"
            about = {**about, "input_config": None}
        else:
            shown = str(list(choices))
        yield error("value_not_in_list", "Value not in list", f"{name}: '{wrong[0]}' not in {shown}", **about)

    async def _ask_node(
        self, node_id: str, class_def: Any, function: str, named: list[str], takes_all: bool, received: dict[str, Any]
    ) -> Any:
        values, _, v3_data = get_input_data(self.prompt[node_id]["inputs"], class_def, node_id)
        values = {name: value for name, value in values.items() if takes_all or name in named}
        if "input_types" in named:
            values["input_types"] = [received]
        answers = await seams.replaceable()._async_map_node_over_list(
            self.prompt_id, node_id, class_def, values, function, v3_data=v3_data
        )
        answers = await seams.replaceable().resolve_map_node_over_list_results(answers)
        for name in values:
            for answer in answers:
                if answer is not True and not isinstance(answer, ExecutionBlocker):
                    details = name if answer is False else f"{name} - {answer}"
                    yield error(
                        "custom_validation_failed", "Custom validation failed for node", details, input_name=name
                    )


async def validate_inputs(
    prompt_id: str, prompt: dict[str, Any], item: str, validated: dict[str, Any] | None = None
) -> tuple[bool, list[Error], str]:
    """Check one node and what it depends on: `(all valid, the node's own errors, its id)`."""
    check = PromptCheck(prompt_id, prompt)
    valid = await check.check(item)
    for node_id, found in check.checked.items():
        if validated is not None:
            validated[node_id] = (found.valid, found.errors, node_id)
    return valid, check.checked[item].errors, item


def _structure_error(prompt: Mapping[str, Any]) -> Error | None:
    import nodes

    for node_id, node in prompt.items():
        if not isinstance(node, Mapping) or "class_type" not in node:
            return error(
                "invalid_prompt",
                "Cannot execute because a node is missing the class_type property.",
                f"Node ID '#{node_id}'",
            )
        if not isinstance(node["class_type"], str) or node["class_type"] not in nodes.NODE_CLASS_MAPPINGS:
            return error(
                "invalid_prompt",
                f"Cannot execute because node {node['class_type']} does not exist.",
                f"Node ID '#{node_id}'",
            )
        if not isinstance(node.get("inputs"), dict):
            return error(
                "invalid_prompt",
                f"Cannot execute because node {node['class_type']} has no inputs property.",
                f"Node ID '#{node_id}'",
            )
    return None


def _outputs(prompt: Mapping[str, Any], wanted: Iterable[str] | None) -> list[str]:
    import nodes

    chosen = None if wanted is None else set(wanted)
    return [
        node_id
        for node_id, node in prompt.items()
        if getattr(nodes.NODE_CLASS_MAPPINGS[node["class_type"]], "OUTPUT_NODE", False)
        and (chosen is None or node_id in chosen)
    ]


def _ancestors(prompt: Mapping[str, Any], node_id: str) -> list[str]:
    seen = {node_id: None}
    waiting = [node_id]
    while waiting:
        for source in _links(prompt[waiting.pop()]["inputs"]):
            if source in prompt and source not in seen:
                seen[source] = None
                waiting.append(source)
    return list(seen)


async def validate_prompt(
    prompt_id: str, prompt: dict[str, Any], partial_execution_list: Iterable[str] | None = None
) -> tuple[bool, Error | None, list[str], dict[str, Any]]:
    """Check a prompt: `(valid, error, ids of the outputs to run, errors by node id)`.

    Outputs come in the order of the prompt, so every rank runs them alike. With `partial_execution_list` only those
    outputs count. A prompt is valid when one output is; `error` then is None, and the others' errors are reported.
    """
    problem = _structure_error(prompt)
    if problem is not None:
        return False, problem, [], {}
    outputs = _outputs(prompt, partial_execution_list)
    if not outputs:
        return False, error("prompt_no_outputs", "Prompt has no outputs"), [], {}
    check = PromptCheck(prompt_id, prompt)
    good: list[str] = []
    bad: list[str] = []
    for node_id in outputs:
        (good if await check.check(node_id) else bad).append(node_id)
    node_errors: dict[str, Any] = {}
    for output in bad:
        for node_id in _ancestors(prompt, output):
            errors = check.checked[node_id].errors if node_id in check.checked else []
            if errors:
                entry = node_errors.setdefault(
                    node_id,
                    {"errors": errors, "dependent_outputs": [], "class_type": prompt[node_id]["class_type"]},
                )
                entry["dependent_outputs"].append(output)
    if good:
        return True, None, good, node_errors
    details = "\n".join(
        f"* {entry['class_type']} {node_id}:\n"
        + "\n".join(f"  - {found['message']}: {found['details']}" for found in entry["errors"])
        for node_id, entry in node_errors.items()
    )
    return (
        False,
        error("prompt_outputs_failed_validation", "Prompt outputs failed validation", details),
        [],
        node_errors,
    )
