"""Sigmas written by hand, guidance and attention set for a model, conditionings from a file."""

from __future__ import annotations

import re
from typing import Any

import torch

import comfy.patcher_extension
import comfy.utils
import folder_paths
from comfy.ldm.modules import attention as attention_module
from comfy_api.latest import io
from comfy_nodes.model_files import watches_files
from comfy_nodes.v3 import extension, share

NUMBER = re.compile(r"[-+]?(?:\d*\.\d+|\d+\.?)(?:[eE][-+]?\d+)?")
SUFFIX = " attention"
OVERRIDE = "optimized_attention_override"


class ManualSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ManualSigmas",
            category="sampling/custom_sampling/schedulers",
            inputs=[io.String.Input("sigmas", default="1, 0.5", multiline=False)],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, sigmas: str):
        """The numbers of a text, whatever separates them."""
        numbers = [float(number) for number in NUMBER.findall(sigmas)]
        if not numbers:
            raise ValueError(f"there is no number in the sigmas {sigmas!r}; write them like 1.0, 0.5, 0")
        return io.NodeOutput(torch.tensor(numbers, dtype=torch.float32))


class CFGOverride(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CFGOverride",
            display_name="CFG Override",
            category="advanced/guidance",
            description="Another guidance scale in a part of sampling.",
            inputs=[
                io.Model.Input("model"),
                share("cfg", 1.0, 100.0, 0.0, 0.1, round=0.01),
                share("start_percent", 0.0, step=0.001),
                share("end_percent", 1.0, step=0.001),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, cfg: float, start_percent: float, end_percent: float):
        model = model.clone()
        sampling = model.get_model_object("model_sampling")
        highest, lowest = (float(sampling.percent_to_sigma(percent)) for percent in (start_percent, end_percent))

        def override(executor: Any, x: torch.Tensor, timestep: torch.Tensor, *more: Any, **named: Any) -> Any:
            guider, sigma = executor.class_obj, float(timestep[0])
            if not lowest < sigma <= highest or not hasattr(guider, "cfg"):
                return executor(x, timestep, *more, **named)
            before, guider.cfg = guider.cfg, cfg
            try:
                return executor(x, timestep, *more, **named)
            finally:
                guider.cfg = before

        kind = comfy.patcher_extension.WrappersMP.PREDICT_NOISE
        model.add_wrapper_with_key(kind, f"CFGOverride {start_percent} {end_percent}", override)
        return io.NodeOutput(model)


class ModelAttentionBackend(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = [f"{name}{SUFFIX}" for name in attention_module.REGISTERED_ATTENTION_FUNCTIONS]
        return io.Schema(
            node_id="ModelAttentionBackend",
            display_name="Model Attention Backend",
            category="advanced/model",
            description="Computes attention of this model by one of the functions installed here.",
            inputs=[io.Model.Input("model"), io.Combo.Input("attention", options=names)],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model: Any, attention: str):
        chosen = attention_module.get_attention_function(attention.removesuffix(SUFFIX))

        def override(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            options = dict(kwargs.pop("transformer_options", None) or {})
            options.pop(OVERRIDE, None)
            return chosen(*args, transformer_options=options, **kwargs)

        override.rows_independent = True
        model = model.clone()
        model.model_options["transformer_options"][OVERRIDE] = override
        return io.NodeOutput(model)


@watches_files(conditioning_name="embeddings")
class ConditioningLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = folder_paths.get_filename_list("embeddings")
        return io.Schema(
            node_id="ConditioningLoader",
            display_name="Load Conditioning",
            category="loaders",
            description="A conditioning computed before, from models/embeddings.",
            inputs=[io.Combo.Input("conditioning_name", options=names)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning_name: str):
        """The file's tensor `conditioning`; its other tensors become fields."""
        path = folder_paths.get_full_path_or_raise("embeddings", conditioning_name)
        fields = comfy.utils.load_torch_file(path, safe_load=True)
        if "conditioning" not in fields:
            raise ValueError(f"{conditioning_name} has no tensor 'conditioning'; it is no saved conditioning")
        return io.NodeOutput([[fields.pop("conditioning"), fields]])


comfy_entrypoint = extension(ManualSigmas, CFGOverride, ModelAttentionBackend, ConditioningLoader)
