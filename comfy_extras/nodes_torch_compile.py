"""A network compiled by torch."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_nodes.v3 import extension


class TorchCompileModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TorchCompileModel",
            category="_for_testing",
            is_experimental=True,
            inputs=[io.Model.Input("model"), io.Combo.Input("backend", options=["inductor", "cudagraphs"])],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, backend: str):
        model = model.clone()
        set_torch_compile_wrapper(model, backend)
        return io.NodeOutput(model)


comfy_entrypoint = extension(TorchCompileModel)
