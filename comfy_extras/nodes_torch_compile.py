"""A network compiled by torch."""

from __future__ import annotations

from typing import Any

import torch

import comfy.patcher_extension
from comfy.ldm import dit
from comfy_api.latest import io
from comfy_nodes.v3 import extension

KEY = "torch.compile"


class _Compiled:
    """APPLY_MODEL: the network's call goes through torch.compile.

    Not while tokens are spread over ranks: a graph cannot go across an exchange, and the engine compiles the parts
    between exchanges itself.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.network: Any = None
        self.function: Any = None

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        model = executor.class_obj
        if dit.active_plan() is not None:
            return executor(*args, **kwargs)
        if self.network is not model.diffusion_model:
            self.network = model.diffusion_model
            self.function = torch.compile(self.network, backend=self.backend)
        before, model.network_runner = model.network_runner, self.function
        try:
            return executor(*args, **kwargs)
        finally:
            model.network_runner = before


class TorchCompileModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TorchCompileModel", category="_for_testing", is_experimental=True,
            inputs=[io.Model.Input("model"), io.Combo.Input("backend", options=["inductor", "cudagraphs"])],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, backend: str):
        model = model.clone()
        kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, _Compiled(backend))
        return io.NodeOutput(model)


comfy_entrypoint = extension(TorchCompileModel)
