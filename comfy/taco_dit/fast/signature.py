"""What a captured call depends on: the structure of its arguments, and the modules that were run."""

from __future__ import annotations

from typing import Any

import torch

_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype, torch.device)


class NotCapturable(TypeError):
    """An argument of a kind whose changes a captured call could not see."""


def flatten(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The structure of an argument: shapes in place of tensors, which are appended to `tensors`, other values as they are.

    Two arguments of equal structure differ in the contents of their tensors only. Raises NotCapturable for values that are
    neither tensors nor plain data, at any depth.
    """
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return "tensor", tuple(value.shape), value.dtype, str(value.device)
    if isinstance(value, dict):
        return "dict", tuple((key, flatten(item, tensors)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(flatten(item, tensors) for item in value)
    if isinstance(value, _PLAIN):
        return value
    raise NotCapturable(f"an argument of type {type(value).__name__}")


def rebuild(value: Any, tensors: list[torch.Tensor]) -> Any:
    """`value` with its tensors replaced, in the order of `flatten`, by those of `tensors`, which is emptied."""
    if isinstance(value, torch.Tensor):
        return tensors.pop(0)
    if isinstance(value, dict):
        return {key: rebuild(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [rebuild(item, tensors) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


class ModuleIdentity:
    """The modules of a network and the replacements of their methods at one moment; equal to another of the same
    objects.

    It holds the objects, so that an address is not reused while it is compared with.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self.parts: list[Any] = []
        self.hooked = False
        for module in network.modules():
            own = vars(module)
            self.parts += [
                module,
                own.get("forward"),
                own.get("_forward"),
                own.get("forward_orig"),
                type(module).forward,
            ]
            self.hooked = self.hooked or bool(module._forward_hooks or module._forward_pre_hooks)

    def same(self, other: ModuleIdentity) -> bool:
        """Whether both are of the same objects."""
        return len(self.parts) == len(other.parts) and all(a is b for a, b in zip(self.parts, other.parts))
