"""From a node's inputs in the prompt to the values its function is called with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from comfy_execution.graph import get_input_info
from comfy_execution.graph_utils import is_link

# values per input; a node that does not take lists is called once for each
InputData = dict[str, list[Any] | tuple[Any, ...]]
# kinds of hidden inputs that are never shown or sent
SECRET_INPUTS = ("AUTH_TOKEN_COMFY_ORG", "API_KEY_COMFY_ORG")


def is_v3(class_def: Any) -> bool:
    """Whether a node (class or instance) is written against `comfy_api` (io.ComfyNode)."""
    return hasattr(class_def, "GET_SCHEMA")


def has_function(class_def: Any, v1_name: str, v3_name: str) -> str | None:
    """Name of an optional node function if the class has it."""
    name = v3_name if is_v3(class_def) else v1_name
    return name if callable(getattr(class_def, name, None)) else None


def _hidden_values(unique_id: str, dynprompt: Any, extra_data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "PROMPT": {} if dynprompt is None else dynprompt.get_original_prompt(),
        "DYNPROMPT": dynprompt,
        "EXTRA_PNGINFO": extra_data.get("extra_pnginfo"),
        "UNIQUE_ID": unique_id,
        "AUTH_TOKEN_COMFY_ORG": extra_data.get("auth_token_comfy_org"),
        "API_KEY_COMFY_ORG": extra_data.get("api_key_comfy_org"),
    }


def hidden_names(declared: Any) -> Iterator[tuple[str, Any]]:
    """Names and kinds of a class's hidden inputs."""
    # packs put objects here that cannot be iterated: they declare every name, hence none in particular
    if isinstance(declared, Mapping):
        yield from declared.items()


def get_input_data(
    inputs: Mapping[str, Any],
    class_def: Any,
    unique_id: str,
    execution_list: Any = None,
    dynprompt: Any = None,
    extra_data: Mapping[str, Any] | None = None,
) -> tuple[InputData, dict[str, bool], dict[str, Any]]:
    """Values by input name, the names of links without a result yet (their value is `(None,)`), and hidden values.

    Without `execution_list` every link counts as missing. The third part is what V3 nodes get as `cls.hidden`.
    """
    valid_inputs = class_def.INPUT_TYPES()
    values: InputData = {}
    missing: dict[str, bool] = {}
    for name, value in inputs.items():
        _, category, options = get_input_info(class_def, name, valid_inputs)
        if is_link(value) and not (options and options.get("rawLink", False)):
            entry = None if execution_list is None else execution_list.get_cache(value[0], unique_id)
            slot = int(value[1])
            if entry is None:
                missing[name] = True
                values[name] = (None,)
            elif slot >= len(entry.outputs):
                raise ValueError(
                    f"input '{name}' is linked to output {slot} of node {value[0]}, "
                    f"which returned {len(entry.outputs)} output(s)"
                )
            else:
                values[name] = entry.outputs[slot]
        elif category is not None:
            values[name] = [value]
    hidden = _hidden_values(unique_id, dynprompt, extra_data or {})
    if is_v3(class_def):
        return values, missing, hidden
    for name, kind in hidden_names(valid_inputs.get("hidden")):
        if isinstance(kind, str) and kind in hidden:
            values[name] = [hidden[kind]]
    return values, missing, {}


def calls(input_data: InputData, takes_lists: bool) -> list[dict[str, Any]]:
    """Keyword arguments of each call: one with the whole lists, or one per item, shorter lists repeating their last.

    Raises ValueError when a list to be broken up is empty.
    """
    if takes_lists:
        return [dict(input_data)]
    if not input_data:
        return [{}]
    for name, values in input_data.items():
        if len(values) == 0:
            raise ValueError(f"input '{name}' received an empty list; the node before it returned nothing to work on")
    length = max(len(values) for values in input_data.values())
    return [{name: values[min(i, len(values) - 1)] for name, values in input_data.items()} for i in range(length)]
