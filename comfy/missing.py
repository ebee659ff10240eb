"""Names that custom nodes import and whose feature this version does not have yet.

They exist, so that a pack that imports them loads; using one says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


class FeatureMissingError(NotImplementedError):
    """A feature of ComfyUI that this version of TACO-DiT does not have yet."""


def missing(feature: str) -> NoReturn:
    """Raise FeatureMissingError for a feature."""
    raise FeatureMissingError(f"{feature} is not in this version of TACO-DiT; remove its nodes from the workflow")


def missing_function(feature: str) -> Callable[..., Any]:
    """A function that raises FeatureMissingError."""

    def call(*args: Any, **kwargs: Any) -> Any:
        missing(feature)

    return call


def missing_class(name: str, feature: str) -> type[Any]:
    """A class that can be subclassed and compared with, but whose instances cannot be made."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        missing(feature)

    return type(name, (), {"__init__": refuse, "__doc__": f"Part of {feature}, which this version does not have yet."})
