"""From what a node's calls returned to the outputs and the ui that are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy_execution.graph_utils import ExecutionBlocker, is_link


def _as_tuple(result: Any, obj: Any) -> Any:
    count = len(obj.RETURN_TYPES)
    if isinstance(result, ExecutionBlocker):
        return (result,) * count
    if result is None:
        if count == 0:
            return ()
        name = getattr(obj, "__name__", type(obj).__name__)
        raise ValueError(f"{name} returned None; a tuple of {count} output(s) was expected")
    return result


def merge_result_data(results: list[Any], obj: Any) -> list[list[Any]]:
    """Per output slot the values of all calls; slots marked OUTPUT_IS_LIST are joined.

    Where a call returned fewer values than the node declares, the rest are None.
    """
    slots = max(len(obj.RETURN_TYPES), *(len(result) for result in results))
    is_list = list(getattr(obj, "OUTPUT_IS_LIST", ()))
    merged: list[list[Any]] = []
    for slot in range(slots):
        flatten = slot < len(is_list) and is_list[slot]
        values: list[Any] = []
        for result in results:
            if slot >= len(result):
                values.append(None)
            elif flatten and not isinstance(result[slot], ExecutionBlocker):
                values.extend(result[slot])
            else:
                values.append(result[slot])
        merged.append(values)
    return merged


def get_output_from_returns(return_values: list[Any], obj: Any) -> tuple[Any, dict[str, Any], bool]:
    """`(outputs, ui, has_subgraph)`; with a sub-graph the outputs are `[(graph or None, result)]` per call."""
    results, uis = [], []
    has_subgraph = False
    for value in return_values:
        graph, result = None, value
        if isinstance(value, dict):
            if "ui" in value:
                uis.append(value["ui"])
            graph = value.get("expand")
            has_subgraph = has_subgraph or graph is not None
            result = value.get("result", () if graph is None else None)
            if graph is None and "result" not in value:
                results.append((None, ()))
                continue
        results.append((graph, _as_tuple(result, obj)))
    ui: dict[str, Any] = {}
    if uis:
        ui = {key: [item for part in uis for item in part.get(key, ())] for key in uis[0]}
    if has_subgraph:
        return results, ui, True
    plain = [result for _, result in results]
    return (merge_result_data(plain, obj) if plain else []), ui, False


def collect_subgraph(class_def: Any, results: list[Any], get_entry: Callable[[str], Any]) -> list[list[Any]]:
    """Outputs of a node whose sub-graph has run: its links replaced by what they point to."""
    is_list = list(getattr(class_def, "OUTPUT_IS_LIST", ())) or [False] * len(class_def.RETURN_TYPES)
    rows: list[tuple[Any, ...]] = []
    for graph, result in results:
        if graph is None:
            rows.append(tuple(result))
            continue
        columns = []
        for value in result:
            if is_link(value):
                entry = get_entry(value[0])
                columns.append((True, entry.outputs[int(value[1])]))
            else:
                columns.append((False, [value]))
        single = [len(values) for (linked, values), flat in zip(columns, is_list, strict=False) if linked and not flat]
        for i in range(max(single, default=1)):
            row: list[Any] = []
            for (linked, values), flat in zip(columns, is_list, strict=False):
                if linked and flat:
                    row.append(values if i == 0 else [])
                else:
                    row.append(values[min(i, len(values) - 1)])
            rows.append(tuple(row))
    return merge_result_data(rows, class_def) if rows else []


def format_value(value: Any) -> Any:
    """A value for an error report: plain ones as they are, tensors by shape and type, others as text."""
    if value is None or isinstance(value, int | float | bool | str):
        return value
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{type(value).__name__}(shape={list(shape)}, dtype={dtype})"
    try:
        return str(value)
    except Exception:  # noqa: BLE001 - a foreign __str__ must not hide the error being reported
        return f"<{type(value).__name__}>"
