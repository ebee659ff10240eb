"""Reference pictures for models that edit."""

from __future__ import annotations

from typing import Any

import node_helpers
from comfy_api.latest import io
from comfy_nodes.v3 import extension


class ReferenceLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ReferenceLatent",
            category="advanced/conditioning/edit_models",
            description="Sets the guiding latent of an edit model; several can follow each other.",
            inputs=[io.Conditioning.Input("conditioning"), io.Latent.Input("latent", optional=True)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, conditioning: Any, latent: dict[str, Any] | None = None):
        if latent is None:
            return io.NodeOutput(conditioning)
        values = {"reference_latents": [latent["samples"]]}
        return io.NodeOutput(node_helpers.conditioning_set_values(conditioning, values, append=True))

    append = execute


comfy_entrypoint = extension(ReferenceLatent)
