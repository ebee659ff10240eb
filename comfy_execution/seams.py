"""Functions that custom nodes replace on the module `execution`.

A pack writes `execution.execute = its_own`, so whoever calls `execute`, `get_output_data`, `_async_map_node_over_list` or
`resolve_map_node_over_list_results` has to look them up there at each call. `execution` imports this package, not the
other way round: it says here where to look.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

_owner: ModuleType | None = None


def provide(module: ModuleType) -> None:
    """From now on the replaceable functions are attributes of `module`."""
    global _owner
    _owner = module


def replaceable() -> Any:
    """The module that has them: `execution`, or `comfy_execution.node_execution` where nobody imported that."""
    assert _owner is not None, "import execution, or comfy_execution.node_execution, first"
    return _owner
