"""The xDiT nodes: loaders and samplers that take a choice of GPUs and of a strategy.

None of them is needed: every workflow runs parallel as it is. Workflows that were made with them run here.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import nodes
from comfy.taco_dit import runtime
from comfy.taco_dit.core.dispatcher import POLICIES, STRATEGIES, Dispatcher, parse_devices
from comfy_extras.nodes_custom_sampler import SamplerCustomAdvanced

CATEGORY = "TACO-DiT/xDiT"
_SETTINGS = ("enable_multi_gpu", "gpu_devices", "parallel_strategy", "scheduling_strategy")


def _settings() -> dict[str, Any]:
    return {
        "enable_multi_gpu": ("BOOLEAN", {"default": True, "tooltip": "Off: one GPU."}),
        "gpu_devices": ("STRING", {"default": "0,1,2,3", "tooltip": "Numbers of GPUs, with commas between."}),
        "parallel_strategy": (list(STRATEGIES), {"default": "Hybrid", "tooltip": "How GPUs share a picture."}),
        "scheduling_strategy": (list(POLICIES), {"default": "round_robin", "tooltip": "Which group gets a run."}),
    }


def _dispatcher(inputs: dict[str, Any]) -> Dispatcher:
    """Takes the settings out of a loader's inputs. Raises ConfigError."""
    enabled, devices, strategy, policy = (inputs.pop(name) for name in _SETTINGS)
    return Dispatcher(parse_devices(devices), strategy, policy, enabled)


def _loader(name: str, base: Any) -> Any:
    """A loader with the inputs and outputs of `base`, the settings, and a dispatcher as last output."""

    class Loader(base):  # type: ignore[misc]
        RETURN_TYPES = (*base.RETURN_TYPES, "XDIT_DISPATCHER")
        RETURN_NAMES = (*(kind.lower() for kind in base.RETURN_TYPES), "dispatcher")
        OUTPUT_TOOLTIPS = ()
        FUNCTION = "load"
        CATEGORY = globals()["CATEGORY"]

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            inputs = base.INPUT_TYPES()
            return {**inputs, "required": {**inputs["required"], **_settings()}}

        def load(self, **inputs: Any) -> tuple[Any, ...]:
            """What `base` loads, and the dispatcher."""
            dispatcher = _dispatcher(inputs)
            return (*getattr(self, base.FUNCTION)(**inputs), dispatcher)

    Loader.__name__ = Loader.__qualname__ = name
    return Loader


class MultiGPUModelLoader:
    """A dispatcher for a model that is loaded already."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), **_settings()}}

    RETURN_TYPES = ("MODEL", "XDIT_DISPATCHER")
    RETURN_NAMES = ("model", "dispatcher")
    FUNCTION = "load"
    CATEGORY = CATEGORY

    def load(self, model: Any, **inputs: Any) -> tuple[Any, Dispatcher]:
        """The model as it is, and the dispatcher."""
        return model, _dispatcher(inputs)


def _say(note: str, node_id: str | None) -> None:
    """On the console of the first rank, and in the node."""
    from server import PromptServer

    if runtime.current().lockstep.is_first:
        logging.warning("TACO-DiT: %s", note)
    if node_id and getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.send_progress_text(note, node_id)


def _planned(patcher: Any, dispatcher: Dispatcher, node_id: str | None) -> Any:
    """A clone of a model's patcher for this run only."""
    plan = dispatcher.plan(patcher.model)
    if plan.note:
        _say(f"{dispatcher.strategy} runs on {plan.note}", node_id)
    patcher = patcher.clone()
    patcher.taco_parallel = plan.parallel
    return patcher


def _with_dispatcher(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        **inputs,
        "optional": {**inputs.get("optional", {}), "dispatcher": ("XDIT_DISPATCHER",)},
        "hidden": {**inputs.get("hidden", {}), "unique_id": "UNIQUE_ID"},
    }


class XDiTKSampler(nodes.KSampler):
    """KSampler on the GPUs of a dispatcher."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return _with_dispatcher(nodes.KSampler.INPUT_TYPES())

    FUNCTION = "sample_dispatched"
    CATEGORY = CATEGORY

    def sample_dispatched(
        self, model: Any, dispatcher: Dispatcher | None = None, unique_id: str | None = None, **inputs: Any
    ) -> tuple[Any]:
        """The latent; without a dispatcher exactly KSampler's."""
        return self.sample(model if dispatcher is None else _planned(model, dispatcher, unique_id), **inputs)


class MultiGPUSampler(XDiTKSampler):
    """XDiTKSampler by its other name."""


class XDiTSamplerAdvanced(SamplerCustomAdvanced):
    """SamplerCustomAdvanced on the GPUs of a dispatcher."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return _with_dispatcher(SamplerCustomAdvanced.INPUT_TYPES())

    FUNCTION = "sample_dispatched"
    CATEGORY = CATEGORY

    def sample_dispatched(
        self, guider: Any, dispatcher: Dispatcher | None = None, unique_id: str | None = None, **inputs: Any
    ) -> tuple[Any, Any]:
        """Both latents; the guider that came in keeps its own model."""
        if dispatcher is not None:
            guider = copy.copy(guider)
            guider.model_patcher = _planned(guider.model_patcher, dispatcher, unique_id)
        return self.sample(guider=guider, **inputs)


NODE_CLASS_MAPPINGS = {
    **{
        name: _loader(name, base)
        for name, base in (
            ("XDiTCheckpointLoader", nodes.CheckpointLoaderSimple),
            ("XDiTUNetLoader", nodes.UNETLoader),
            ("XDiTVAELoader", nodes.VAELoader),
            ("XDiTCLIPLoader", nodes.CLIPLoader),
            ("XDiTDualCLIPLoader", nodes.DualCLIPLoader),
        )
    },
    "XDiTKSampler": XDiTKSampler,
    "XDiTSamplerAdvanced": XDiTSamplerAdvanced,
    "MultiGPUModelLoader": MultiGPUModelLoader,
    "MultiGPUSampler": MultiGPUSampler,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "XDiTCheckpointLoader": "Load Checkpoint (xDiT Multi-GPU)",
    "XDiTUNetLoader": "Load UNet (xDiT Multi-GPU)",
    "XDiTKSampler": "KSampler (xDiT Multi-GPU)",
    "XDiTSamplerAdvanced": "XDiT Sampler (Advanced)",
}
