"""Attention weights scaled by their part, to see what it does."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_nodes.v3 import extension, share

EXPERIMENTS = "_for_testing/attention_experiments"
UNET_PARTS = ("to_q", "to_k", "to_v", "to_out.0")
CLIP_PARTS = tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out"))


def scale_weights(patcher: Any, factors: dict[str, float]) -> None:
    """Multiply weights and biases of the layers whose names end so."""
    for key in patcher.model_state_dict():
        layer = key.removesuffix(".weight").removesuffix(".bias")
        for ending, factor in factors.items():
            if layer != key and layer.endswith(ending):
                # a patch of strength 0 that scales the weight it is added to
                patcher.add_patches({key: (None,)}, 0.0, factor)


def attention_node(node_id: str, kind: Any, name: str, parts: tuple[str, ...]) -> type[io.ComfyNode]:
    """A node with a factor each for q, k, v and the output projection."""

    class Multiply(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            factors = [share(part, 1.0, 10.0) for part in ("q", "k", "v", "out")]
            return io.Schema(
                node_id=node_id,
                category=EXPERIMENTS,
                is_experimental=True,
                inputs=[kind.Input(name), *factors],
                outputs=[kind.Output()],
            )

        @classmethod
        def execute(cls, q: float, k: float, v: float, out: float, **given: Any):
            changed = given[name].clone()
            scale_weights(getattr(changed, "patcher", changed), dict(zip(parts, (q, k, v, out))))
            return io.NodeOutput(changed)

    Multiply.__name__ = Multiply.__qualname__ = node_id
    return Multiply


def _of(attention: str) -> tuple[str, ...]:
    return tuple(f"{attention}.{part}" for part in UNET_PARTS)


UNetSelfAttentionMultiply = attention_node("UNetSelfAttentionMultiply", io.Model, "model", _of("attn1"))
UNetCrossAttentionMultiply = attention_node("UNetCrossAttentionMultiply", io.Model, "model", _of("attn2"))
CLIPAttentionMultiply = attention_node("CLIPAttentionMultiply", io.Clip, "clip", CLIP_PARTS)


class UNetTemporalAttentionMultiply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        names = ("self_structural", "self_temporal", "cross_structural", "cross_temporal")
        return io.Schema(
            node_id="UNetTemporalAttentionMultiply",
            category=EXPERIMENTS,
            is_experimental=True,
            inputs=[io.Model.Input("model"), *(share(name, 1.0, 10.0) for name in names)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, self_structural: float, self_temporal: float, cross_structural: float, cross_temporal: float
    ):
        """Scales what attention adds, apart for layers over space and (`time_stack`) over time."""
        model = model.clone()
        factors = {"attn1": (self_structural, self_temporal), "attn2": (cross_structural, cross_temporal)}
        for key in model.model_state_dict():
            for attention, (structural, temporal) in factors.items():
                if key.endswith((f"{attention}.to_out.0.weight", f"{attention}.to_out.0.bias")):
                    model.add_patches({key: (None,)}, 0.0, temporal if ".time_stack." in key else structural)
        return io.NodeOutput(model)


comfy_entrypoint = extension(
    UNetSelfAttentionMultiply, UNetCrossAttentionMultiply, CLIPAttentionMultiply, UNetTemporalAttentionMultiply
)
