"""ComfyUI's names for running prompts.

Custom nodes wrap `execute`, `get_output_data` and `_async_map_node_over_list` by assigning to them here, so the executor
calls them through this module (`comfy_execution.seams`). The code is in `comfy_execution`, which does not import this.
"""

from __future__ import annotations

import sys

import nodes
from comfy_execution import seams
from comfy_execution.caching import CacheEntry, CacheSet, CacheType
from comfy_execution.executor import IsChangedCache, PromptExecutor
from comfy_execution.graph import DynamicPrompt, ExecutionBlocker, ExecutionList
from comfy_execution.inputs import get_input_data
from comfy_execution.node_call import DuplicateNodeError
from comfy_execution.node_execution import (
    ExecutionResult,
    _async_map_node_over_list,
    execute,
    get_output_data,
    resolve_map_node_over_list_results,
)
from comfy_execution.outputs import format_value, merge_result_data
from comfy_execution.prompt_queue import (
    MAXIMUM_HISTORY_SIZE,
    SENSITIVE_EXTRA_DATA_KEYS,
    ExecutionStatus,
    PromptQueue,
)
from comfy_execution.prompt_validation import full_type_name, validate_inputs, validate_prompt

__all__ = [
    "MAXIMUM_HISTORY_SIZE",
    "SENSITIVE_EXTRA_DATA_KEYS",
    "CacheEntry",
    "CacheSet",
    "CacheType",
    "DuplicateNodeError",
    "DynamicPrompt",
    "ExecutionBlocker",
    "ExecutionList",
    "ExecutionResult",
    "ExecutionStatus",
    "IsChangedCache",
    "PromptExecutor",
    "PromptQueue",
    "_async_map_node_over_list",
    "execute",
    "format_value",
    "full_type_name",
    "get_input_data",
    "get_output_data",
    "merge_result_data",
    "nodes",
    "resolve_map_node_over_list_results",
    "validate_inputs",
    "validate_prompt",
]

# custom nodes replace functions on this module, so this is where they are looked up
seams.provide(sys.modules[__name__])
