"""Names that custom nodes import and whose feature this version does not have yet.

They exist, so that a pack that imports them loads; using one says what is missing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
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


def missing_names(owner: str, features: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` for names whose feature is missing: classes and functions that say so at use."""

    def look_up(name: str) -> Any:
        if name not in features:
            raise AttributeError(f"module {owner!r} has no attribute {name!r}")
        feature = features[name]
        return missing_class(name, feature) if name[0].isupper() else missing_function(feature)

    return look_up


class _MissingModule(ModuleType):
    """Any class or function of a module whose feature is missing."""

    feature = ""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (name.isupper() and "_" in name):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}: {self.feature} is missing")
        value = missing_names(self.__name__, {name: self.feature})(name)
        setattr(self, name, value)  # the same class each time
        return value


class _MissingModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of features that are missing, after all modules that exist."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        known = [name for name in MODULES if name == fullname or name.startswith(f"{fullname}.")]
        if not known:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        module = _MissingModule(spec.name)
        name = next(name for name in MODULES if name == spec.name or name.startswith(f"{spec.name}."))
        module.feature = MODULES[name]
        return module

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def provide_modules() -> None:
    """Let node packs import the modules of MODULES. Called before packs are loaded; once is enough."""
    if not any(isinstance(finder, _MissingModules) for finder in sys.meta_path):
        sys.meta_path.append(_MissingModules())


# modules of ComfyUI that packs import, and whose feature is missing
MODULES: dict[str, str] = {
    **{
        f"comfy.ldm.{module}": f"the model family of comfy.ldm.{module.split('.')[0]}"
        for module in (
            "anima.model",
            "anima.lllite",
            "ace.ace_step15",
            "cascade.stage_c_coder",
            "cosmos.predict2",
            "ernie.model",
            "hidream.model",
            "hidream_o1.model",
            "lens.model",
            "lightricks.av_model",
            "lightricks.symmetric_patchifier",
            "lightricks.vae.audio_vae",
            "lumina.controlnet",
            "minimax.model",
        )
    },
    "comfy.ldm.modules.distributions.distributions": "the VAE's distribution",
    "comfy.ldm.modules.sub_quadratic_attention": "sub-quadratic attention",
    "cuda_malloc": "the choice of CUDA's allocator by program",
    "comfy.diffusers_convert": "the conversion of diffusers' UNets",
    "comfy.k_diffusion.utils": "k-diffusion's training tools",
    "comfy.text_encoders.ace15": "ACE-Step",
    "comfy.taesd.taehv": "tiny VAEs for video",
    "comfy_extras.chainner_models.model_loading": "chaiNNer's loader (spandrel replaces it)",
    "comfy_extras.nodes_stable3d": "Stable Zero123",
    "comfy_api_nodes.util": "remote, paid nodes",
}
