"""Links, classes of nodes, and small graphs: what nodes need that expand into other nodes."""

from __future__ import annotations

import hashlib
from contextvars import ContextVar
from typing import Any

_LONGEST_ROOT = 64  # characters


class NodeNotFoundError(Exception):
    """A link names a node that is not in the prompt."""


def node_class(class_type: str) -> type:
    """The class registered for a node type, looked up at call time. Raises NodeNotFoundError naming the type."""
    import nodes

    try:
        return nodes.NODE_CLASS_MAPPINGS[class_type]
    except KeyError:
        raise NodeNotFoundError(
            f"node type {class_type!r} is not installed; install the custom node pack that provides it"
        ) from None


def is_link(obj: object) -> bool:
    """Whether an input value is a link, `[node id, output slot]`."""
    return (
        isinstance(obj, list)
        and len(obj) == 2
        and isinstance(obj[0], str)
        and isinstance(obj[1], int | float)
        and not isinstance(obj[1], bool)
    )


class ExecutionBlocker:
    """Returned as an output, keeps every node that receives it from running.

    `message` None blocks silently; a text is shown to the user as an error of the node that was blocked.
    """

    def __init__(self, message: str | None) -> None:
        self.message = message


class _Prefix:
    """Where the ids of the next graph start; counts the graphs made in one call."""

    def __init__(self, root: str = "", call_index: int = 0, graph_index: int = 0) -> None:
        self.root = root
        self.call_index = call_index
        self.graph_index = graph_index


# per task, so that asynchronous nodes that run at the same time do not count each other's graphs
_prefix: ContextVar[_Prefix] = ContextVar("comfy_graph_prefix")


class Node:
    """One node of a `GraphBuilder`."""

    def __init__(self, id: str, class_type: str, inputs: dict[str, Any]) -> None:
        self.id = id
        self.class_type = class_type
        self.inputs = inputs
        self.override_display_id: str | None = None

    def out(self, index: int) -> list[Any]:
        """Link to output slot `index`."""
        return [self.id, index]

    def set_input(self, key: str, value: Any) -> None:
        """Set an input; None removes it."""
        if value is None:
            self.inputs.pop(key, None)
        else:
            self.inputs[key] = value

    def get_input(self, key: str) -> Any:
        return self.inputs.get(key)

    def set_override_display_id(self, override_display_id: str) -> None:
        """Show this node's progress on another node of the page."""
        self.override_display_id = override_display_id

    def serialize(self) -> dict[str, Any]:
        info: dict[str, Any] = {"class_type": self.class_type, "inputs": self.inputs}
        if self.override_display_id is not None:
            info["override_display_id"] = self.override_display_id
        return info


def _shortened(root: str) -> str:
    """A node's id, or a short stand-in for a long one.

    An id repeats that of the node it was expanded from, so with the depth of expansion each id, and all that carries
    ids, would grow. The stand-in is the same on every rank and in every run.
    """
    if len(root) <= _LONGEST_ROOT:
        return root
    digest = hashlib.blake2b(root.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{root.partition('.')[0][:32]}.{digest}"


class GraphBuilder:
    """Builds the sub-graph a node returns under `expand`.

    Node ids must be unique in the whole prompt: the default prefix is `<node>.<call>.<graph>.`, set by the executor for
    each call of a node, so ids repeat from run to run and from rank to rank.
    """

    def __init__(self, prefix: str | None = None) -> None:
        self.prefix = GraphBuilder.alloc_prefix() if prefix is None else prefix
        self.nodes: dict[str, Node] = {}
        self.id_gen = 1

    @classmethod
    def set_default_prefix(cls, prefix_root: str, call_index: int, graph_index: int = 0) -> None:
        _prefix.set(_Prefix(prefix_root, call_index, graph_index))

    @classmethod
    def alloc_prefix(
        cls, root: str | None = None, call_index: int | None = None, graph_index: int | None = None
    ) -> str:
        """A prefix no other graph of the running call has."""
        default = _prefix.get(None)
        if default is None:
            default = _Prefix()
            _prefix.set(default)
        root = _shortened(default.root if root is None else root)
        call_index = default.call_index if call_index is None else call_index
        graph_index = default.graph_index if graph_index is None else graph_index
        default.graph_index += 1
        return f"{root}.{call_index}.{graph_index}."

    def node(self, class_type: str, id: str | None = None, **kwargs: Any) -> Node:
        """The node called `id`, made now if new; without an id always a new one."""
        if id is None:
            id = str(self.id_gen)
            self.id_gen += 1
        full = self.prefix + id
        if full not in self.nodes:
            self.nodes[full] = Node(full, class_type, kwargs)
        return self.nodes[full]

    def lookup_node(self, id: str) -> Node | None:
        return self.nodes.get(self.prefix + id)

    def finalize(self) -> dict[str, dict[str, Any]]:
        """The graph in the form of a prompt: `{id: {class_type, inputs}}`."""
        return {node_id: node.serialize() for node_id, node in self.nodes.items()}

    def replace_node_output(self, node_id: str, index: int, new_value: Any) -> None:
        """Replace every link to one output by `new_value`; None removes the inputs that held it."""
        target = self.prefix + node_id
        for node in self.nodes.values():
            for key, value in list(node.inputs.items()):
                if is_link(value) and value[0] == target and value[1] == index:
                    node.set_input(key, new_value)

    def remove_node(self, id: str) -> None:
        del self.nodes[self.prefix + id]


def add_graph_prefix(
    graph: dict[str, dict[str, Any]], outputs: Any, prefix: str
) -> tuple[dict[str, dict[str, Any]], tuple[Any, ...]]:
    """A prompt-like graph with every id prefixed, and `outputs` with its links to that graph prefixed likewise."""

    def moved(value: Any) -> Any:
        return [prefix + value[0], value[1]] if is_link(value) and value[0] in graph else value

    renamed = {}
    for node_id, info in graph.items():
        copy = dict(info)
        copy["inputs"] = {name: moved(value) for name, value in info.get("inputs", {}).items()}
        renamed[prefix + node_id] = copy
    return renamed, tuple(moved(value) for value in outputs)
