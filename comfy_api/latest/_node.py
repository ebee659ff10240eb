"""V3 nodes: `io.ComfyNode`, its `io.Schema` and what it returns, `io.NodeOutput`.

The executor and the page see the same attributes and functions as on a V1 node (INPUT_TYPES, RETURN_TYPES, FUNCTION,
...): they are derived here from the schema, so nothing else has to know the difference.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from comfy_api.latest._dynamic import DynamicInput, declare, declare_chosen, declare_flat, nest
from comfy_api.latest._types import Input, Output
from comfy_execution.graph_utils import ExecutionBlocker


class Hidden(str, Enum):  # noqa: UP042 - ComfyUI's packs rely on str() of both
    """What a node may get beyond its inputs, as `cls.hidden.<name>`."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"
    dynprompt = "DYNPROMPT"
    auth_token_comfy_org = "AUTH_TOKEN_COMFY_ORG"
    api_key_comfy_org = "API_KEY_COMFY_ORG"


class HiddenHolder:
    """The hidden values of a call; those a node did not ask for are None."""

    def __init__(self, values: Mapping[str, Any] | None = None, wanted: Sequence[Hidden] = ()) -> None:
        for kind in Hidden:
            setattr(self, kind.name, (values or {}).get(kind.value) if kind in wanted else None)

    def __getattr__(self, name: str) -> Any:
        return None


@dataclass
class Schema:
    """Description of a node. `inputs` and `outputs` are in the order they are shown.

    `enable_expand`: it may return a sub-graph; `accept_all_inputs`: inputs that are not declared are passed on too.
    """

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_api_node: bool = False
    not_idempotent: bool = False
    enable_expand: bool = False
    accept_all_inputs: bool = False
    essentials_category: str | None = None

    def validate(self) -> None:
        """Raises ValueError when two inputs have the same id."""
        ids = [entry.id for entry in self.inputs]
        double = sorted({name for name in ids if ids.count(name) > 1})
        if double:
            raise ValueError(f"node {self.node_id}: input id {double[0]!r} is used twice; ids must be unique")

    def finalize(self) -> None:
        """Add the hidden values that go without saying."""
        if self.is_api_node:
            wanted = [Hidden.auth_token_comfy_org, Hidden.api_key_comfy_org]
        elif self.is_output_node:
            wanted = [Hidden.prompt, Hidden.extra_pnginfo]
        else:
            wanted = []
        self.hidden = [*self.hidden, *(kind for kind in wanted if kind not in self.hidden)]


class NodeOutput:
    """What `execute` returns: outputs in order, or `ui`, a sub-graph (`expand`), or a text that blocks what follows."""

    def __init__(
        self, *args: Any, ui: Any = None, expand: dict[str, Any] | None = None, block_execution: str | None = None
    ) -> None:
        self.args = args
        self.ui = ui
        self.expand = expand
        self.block_execution = block_execution

    @property
    def result(self) -> tuple[Any, ...] | None:
        return self.args or None

    def __getitem__(self, index: int) -> Any:
        return self.args[index]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NodeOutput:
        """From the dict a V1 node returns."""
        result = data.get("result", ())
        blocked = result.message if isinstance(result, ExecutionBlocker) else None
        args = () if isinstance(result, ExecutionBlocker) else tuple(result)
        return cls(*args, ui=data.get("ui"), expand=data.get("expand"), block_execution=blocked)


def as_v1_result(value: Any) -> Any:
    """A node's return value as V1 nodes return it: a tuple, a dict, or an ExecutionBlocker.

    Raises TypeError for anything else.
    """
    if value is None:
        return ()
    if isinstance(value, tuple | dict | ExecutionBlocker):
        return value
    if not isinstance(value, NodeOutput):
        raise TypeError(f"execute returned {type(value).__name__}; return io.NodeOutput(...)")
    result = ExecutionBlocker(value.block_execution) if value.block_execution is not None else value.args
    if value.ui is None and value.expand is None:
        return result
    answer: dict[str, Any] = {}
    if value.ui is not None:
        answer["ui"] = value.ui if isinstance(value.ui, dict) else value.ui.as_dict()
    if value.expand is not None:
        answer["expand"] = value.expand
    if value.args or value.expand is not None or value.block_execution is not None:
        answer["result"] = result
    return answer


def _nesting(name: str) -> Any:
    """A class method that calls the parent's with dynamic inputs as dicts."""

    def call(cls: type[ComfyNode], **kwargs: Any) -> Any:
        return getattr(super(cls, cls), name)(**nest(cls.STATIC_SCHEMA().inputs, kwargs))

    return classmethod(call)


class _AnyInput(dict[str, Any]):
    """Declares every input there could be."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> Any:
        return ("*", {})


class _FromSchema:
    """Class attribute computed from the node's schema."""

    def __init__(self, read: Callable[[Schema], Any]) -> None:
        self.read = read

    def __get__(self, instance: Any, owner: type[ComfyNode]) -> Any:
        return self.read(owner.STATIC_SCHEMA())


class ComfyNode(ABC):
    """Base of V3 nodes. Subclasses have `define_schema` and `execute`, both classmethods.

    They may have `validate_inputs`, `fingerprint_inputs` and `check_lazy_status`, the V1 functions VALIDATE_INPUTS,
    IS_CHANGED and check_lazy_status. No instance is made; `cls.hidden` holds the hidden values of a call.
    """

    hidden: ClassVar[HiddenHolder] = HiddenHolder()
    RELATIVE_PYTHON_MODULE: ClassVar[str | None] = None
    _static_schema: ClassVar[Schema]

    @classmethod
    @abstractmethod
    def define_schema(cls) -> Schema:
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def execute(cls, **kwargs: Any) -> Any:
        raise NotImplementedError

    # ---- the view of a V1 node -------------------------------------------------------------------------------------

    RETURN_TYPES = _FromSchema(lambda schema: tuple(entry.get_io_type() for entry in schema.outputs))
    RETURN_NAMES = _FromSchema(
        lambda schema: tuple(entry.display_name or entry.get_io_type() for entry in schema.outputs)
    )
    OUTPUT_IS_LIST = _FromSchema(lambda schema: tuple(entry.is_output_list for entry in schema.outputs))
    INPUT_IS_LIST = _FromSchema(lambda schema: schema.is_input_list)
    OUTPUT_NODE = _FromSchema(lambda schema: schema.is_output_node)
    CATEGORY = _FromSchema(lambda schema: schema.category)
    DESCRIPTION = _FromSchema(lambda schema: schema.description)
    DEPRECATED = _FromSchema(lambda schema: schema.is_deprecated)
    EXPERIMENTAL = _FromSchema(lambda schema: schema.is_experimental)
    API_NODE = _FromSchema(lambda schema: schema.is_api_node)
    NOT_IDEMPOTENT = _FromSchema(lambda schema: schema.not_idempotent)
    ACCEPT_ALL_INPUTS = _FromSchema(lambda schema: schema.accept_all_inputs)

    class _Function:
        def __get__(self, instance: Any, owner: type[ComfyNode]) -> str:
            return "EXECUTE_NORMALIZED_ASYNC" if inspect.iscoroutinefunction(owner.execute) else "EXECUTE_NORMALIZED"

    FUNCTION = _Function()

    @classmethod
    def GET_SCHEMA(cls) -> Schema:  # noqa: N802 - ComfyUI's name
        """The schema, made anew: its choices may have changed."""
        schema = cls.define_schema()
        schema.validate()
        schema.finalize()
        return schema

    @classmethod
    def STATIC_SCHEMA(cls) -> Schema:  # noqa: N802
        """A schema for what never changes; made once for a class."""
        if "_static_schema" not in cls.__dict__:
            cls._static_schema = cls.GET_SCHEMA()
        return cls._static_schema

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """Inputs under the names a prompt has; dynamic ones have several."""
        schema = cls.GET_SCHEMA()
        groups: dict[str, Any] = dict(declare_flat(schema.inputs))
        if schema.accept_all_inputs:
            groups["optional"] = _AnyInput(groups.get("optional", {}))
        if schema.hidden:
            groups["hidden"] = {kind.name: kind.value for kind in schema.hidden}
        return groups

    @classmethod
    def CHOSEN_INPUTS(cls, values: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:  # noqa: N802
        """(type, options) of the inputs that come with the choices made in `values`, under the names a prompt has."""
        return declare_chosen(cls.GET_SCHEMA().inputs, values)

    @classmethod
    def GET_NODE_INFO_V1(cls) -> dict[str, Any]:  # noqa: N802
        """The node's entry in /object_info."""
        schema = cls.GET_SCHEMA()
        groups: dict[str, Any] = dict(declare(schema.inputs))
        if schema.hidden:
            groups["hidden"] = {kind.name: kind.value for kind in schema.hidden}
        inputs = {
            group: {name: list(entry) if isinstance(entry, tuple) else [entry] for name, entry in members.items()}
            for group, members in groups.items()
        }
        info = {
            "input": inputs,
            "input_order": {group: list(members) for group, members in inputs.items()},
            "output": [entry.get_io_type() for entry in schema.outputs],
            "output_is_list": [entry.is_output_list for entry in schema.outputs],
            "output_name": [entry.display_name or entry.get_io_type() for entry in schema.outputs],
            "name": schema.node_id,
            "display_name": schema.display_name,
            "description": schema.description,
            "python_module": cls.RELATIVE_PYTHON_MODULE or "nodes",
            "category": schema.category,
            "output_node": schema.is_output_node,
            "deprecated": schema.is_deprecated,
            "experimental": schema.is_experimental,
            "api_node": schema.is_api_node,
        }
        templates = [getattr(entry, "template", None) for entry in schema.outputs]
        if any(templates):
            info["output_matchtypes"] = [template and template.template_id for template in templates]
        tooltips = [entry.tooltip for entry in schema.outputs]
        if any(tooltips):
            info["output_tooltips"] = tooltips
        return info

    @classmethod
    def PREPARE_CLASS_CLONE(cls, v3_data: Mapping[str, Any] | None) -> type[ComfyNode]:  # noqa: N802
        """A subclass for one call, with the call's hidden values."""
        schema = cls.STATIC_SCHEMA()
        members = {
            "hidden": HiddenHolder(v3_data, schema.hidden),
            "_static_schema": schema,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
        }
        if any(isinstance(entry, DynamicInput) for entry in schema.inputs):
            for name in ("validate_inputs", "fingerprint_inputs", "check_lazy_status"):
                if hasattr(cls, name):
                    members[name] = _nesting(name)
        return type(cls.__name__, (cls,), members)

    @classmethod
    def EXECUTE_NORMALIZED(cls, **kwargs: Any) -> Any:  # noqa: N802
        return as_v1_result(cls.execute(**nest(cls.STATIC_SCHEMA().inputs, kwargs)))

    @classmethod
    async def EXECUTE_NORMALIZED_ASYNC(cls, **kwargs: Any) -> Any:  # noqa: N802
        return as_v1_result(await cls.execute(**nest(cls.STATIC_SCHEMA().inputs, kwargs)))
