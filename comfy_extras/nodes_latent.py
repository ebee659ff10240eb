"""Arithmetic on latents and on batches of them."""

from __future__ import annotations

from typing import Any

import torch

import comfy.utils
from comfy_api.latest import io
from comfy_nodes.v3 import extension, share

ADVANCED = "latent/advanced"
Latent = dict[str, Any]


def like(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`source` brought to `target`'s size [B, C, ..., H, W]."""
    if source.shape[1:] != target.shape[1:]:
        source = comfy.utils.common_upscale(source, target.shape[-1], target.shape[-2], "bilinear", "center")
    return comfy.utils.repeat_to_batch_size(source, target.shape[0])


def two_latents(node_id: str, category: str = ADVANCED, *more: Any) -> io.Schema:
    return io.Schema(
        node_id=node_id,
        category=category,
        inputs=[io.Latent.Input("samples1"), io.Latent.Input("samples2"), *more],
        outputs=[io.Latent.Output()],
    )


class LatentAdd(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return two_latents("LatentAdd")

    @classmethod
    def execute(cls, samples1: Latent, samples2: Latent):
        first = samples1["samples"]
        return io.NodeOutput({**samples1, "samples": first + like(first, samples2["samples"])})


class LatentSubtract(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return two_latents("LatentSubtract")

    @classmethod
    def execute(cls, samples1: Latent, samples2: Latent):
        first = samples1["samples"]
        return io.NodeOutput({**samples1, "samples": first - like(first, samples2["samples"])})


class LatentMultiply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LatentMultiply",
            category=ADVANCED,
            inputs=[io.Latent.Input("samples"), share("multiplier", 1.0, 10.0, -10.0)],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, samples: Latent, multiplier: float):
        return io.NodeOutput({**samples, "samples": samples["samples"] * multiplier})


def _direction(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    length = torch.linalg.vector_norm(x, dim=1)
    return torch.nan_to_num(x / length), length


class LatentInterpolate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return two_latents("LatentInterpolate", ADVANCED, share("ratio", 1.0))

    @classmethod
    def execute(cls, samples1: Latent, samples2: Latent, ratio: float):
        """Directions over the channels and lengths are interpolated apart; `ratio` is the first one's share.

        As in ComfyUI the length [B, H, W] is broadcast over [B, C, H, W], so the batch must be one or fit.
        """
        first = samples1["samples"]
        way1, length1 = _direction(first)
        way2, length2 = _direction(like(first, samples2["samples"]))
        way, _ = _direction(way1 * ratio + way2 * (1.0 - ratio))
        return io.NodeOutput({**samples1, "samples": way * (length1 * ratio + length2 * (1.0 - ratio))})


_AXES = {"x": -1, "y": -2, "t": -3}


def axis_of(dim: str, samples: torch.Tensor) -> int:
    """Tensor axis of x, y or t. Raises ValueError for t on pictures."""
    axis = _AXES[dim.lstrip("-")]
    if axis == -3 and samples.ndim < 5:
        raise ValueError("dim t needs a video latent; this one is a picture")
    return axis


class LatentConcat(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return two_latents("LatentConcat", ADVANCED, io.Combo.Input("dim", options=["x", "-x", "y", "-y", "t", "-t"]))

    @classmethod
    def execute(cls, samples1: Latent, samples2: Latent, dim: str):
        """With a minus sign the second comes first."""
        first = samples1["samples"]
        parts = [first, comfy.utils.repeat_to_batch_size(samples2["samples"], first.shape[0])]
        if dim.startswith("-"):
            parts.reverse()
        return io.NodeOutput({**samples1, "samples": torch.cat(parts, dim=axis_of(dim, first))})


class LatentCut(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        limit = 16384
        return io.Schema(
            node_id="LatentCut",
            category=ADVANCED,
            inputs=[
                io.Latent.Input("samples"),
                io.Combo.Input("dim", options=["x", "y", "t"]),
                io.Int.Input("index", default=0, min=-limit, max=limit, step=1),
                io.Int.Input("amount", default=1, min=1, max=limit, step=1),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, samples: Latent, dim: str, index: int, amount: int):
        """`amount` cells from `index` on, which counts from the end when negative; both are cut to what there is."""
        tensor = samples["samples"]
        axis = axis_of(dim, tensor)
        size = tensor.shape[axis]
        start = min(index, size - 1) if index >= 0 else max(index + size, 0)
        return io.NodeOutput({**samples, "samples": torch.narrow(tensor, axis, start, min(amount, size - start))})


class LatentCutToBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LatentCutToBatch",
            category=ADVANCED,
            inputs=[
                io.Latent.Input("samples"),
                io.Combo.Input("dim", options=["t", "x", "y"]),
                io.Int.Input("slice_size", default=1, min=1, max=16384, step=1),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, samples: Latent, dim: str, slice_size: int):
        """Slices of an axis one after the other in the batch; what does not fill a slice is left out."""
        tensor = samples["samples"]
        if dim == "t" and tensor.ndim < 5:
            return io.NodeOutput(samples)
        axis = axis_of(dim, tensor) % tensor.ndim
        size = min(slice_size, tensor.shape[axis])
        count = tensor.shape[axis] // size
        slices = tensor.narrow(axis, 0, count * size).unflatten(axis, (count, size)).movedim(axis, 1)
        return io.NodeOutput({**samples, "samples": slices.flatten(0, 1)})


class LatentBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return two_latents("LatentBatch", "latent/batch")

    @classmethod
    def execute(cls, samples1: Latent, samples2: Latent):
        first, second = samples1["samples"], samples2["samples"]
        if first.shape[1:] != second.shape[1:]:
            second = comfy.utils.common_upscale(second, first.shape[3], first.shape[2], "bilinear", "center")
        indices = [
            index
            for latent, tensor in ((samples1, first), (samples2, second))
            for index in latent.get("batch_index", range(tensor.shape[0]))
        ]
        joined = {**samples1, "samples": torch.cat((first, second), dim=0), "batch_index": indices}
        return io.NodeOutput(joined)

    batch = execute


class LatentBatchSeedBehavior(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LatentBatchSeedBehavior",
            category=ADVANCED,
            inputs=[
                io.Latent.Input("samples"),
                io.Combo.Input("seed_behavior", options=["random", "fixed"], default="fixed"),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, samples: Latent, seed_behavior: str):
        """fixed: every picture of the batch gets the first one's noise."""
        changed = dict(samples)
        if seed_behavior == "random":
            changed.pop("batch_index", None)
        else:
            first = samples.get("batch_index", [0])[0]
            changed["batch_index"] = [first] * samples["samples"].shape[0]
        return io.NodeOutput(changed)


class LatentApplyOperation(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LatentApplyOperation",
            category=ADVANCED + "/operations",
            is_experimental=True,
            inputs=[io.Latent.Input("samples"), io.LatentOperation.Input("operation")],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, samples: Latent, operation: Any):
        return io.NodeOutput({**samples, "samples": operation(latent=samples["samples"])})


class LatentApplyOperationCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LatentApplyOperationCFG",
            category=ADVANCED + "/operations",
            is_experimental=True,
            inputs=[io.Model.Input("model"), io.LatentOperation.Input("operation")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, operation: Any):
        """Applies the operation to the difference guidance works on, at every step."""

        def change(arguments: dict[str, Any]) -> list[torch.Tensor]:
            predictions = arguments["conds_out"]
            if len(predictions) == 2:
                predictions[0] = operation(latent=predictions[0] - predictions[1]) + predictions[1]
            else:
                predictions[0] = operation(latent=predictions[0])
            return predictions

        model = model.clone()
        model.set_model_sampler_pre_cfg_function(change)
        return io.NodeOutput(model)


class LatentOperationTonemapReinhard(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LatentOperationTonemapReinhard",
            category=ADVANCED + "/operations",
            is_experimental=True,
            inputs=[share("multiplier", 1.0, 100.0)],
            outputs=[io.LatentOperation.Output()],
        )

    @classmethod
    def execute(cls, multiplier: float):
        """Compresses lengths over the channels with v / (v + 1), scaled by mean + 5 deviations."""

        def tonemap(latent: torch.Tensor, **more: Any) -> torch.Tensor:
            length = (torch.linalg.vector_norm(latent, dim=1) + 1e-10)[:, None]
            axes = tuple(range(1, length.ndim))
            top = (length.std(dim=axes, keepdim=True) * 5 + length.mean(dim=axes, keepdim=True)) * multiplier
            relative = length * (1.0 / top)
            return latent / length * (relative / (relative + 1.0) * top)

        return io.NodeOutput(tonemap)


class LatentOperationSharpen(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LatentOperationSharpen",
            category=ADVANCED + "/operations",
            is_experimental=True,
            inputs=[
                io.Int.Input("sharpen_radius", default=9, min=1, max=31, step=1),
                share("sigma", 1.0, 10.0, 0.1, 0.1),
                share("alpha", 0.1, 5.0),
            ],
            outputs=[io.LatentOperation.Output()],
        )

    @classmethod
    def execute(cls, sharpen_radius: int, sigma: float, alpha: float):
        """Unsharp masking of the direction over the channels; lengths are kept."""
        from comfy_nodes.filters import sharpening_kernel

        kernel = sharpening_kernel(sharpen_radius, sigma, alpha)

        def sharpen(latent: torch.Tensor, **more: Any) -> torch.Tensor:
            length = (torch.linalg.vector_norm(latent, dim=1) + 1e-6)[:, None]
            channels = latent.shape[1]
            weights = kernel.to(latent).repeat(channels, 1, 1).unsqueeze(1)
            padded = torch.nn.functional.pad(latent / length, (sharpen_radius,) * 4, "reflect")
            return torch.nn.functional.conv2d(padded, weights, groups=channels) * length

        return io.NodeOutput(sharpen)


for _node in (LatentAdd, LatentSubtract, LatentMultiply, LatentInterpolate):
    _node.op = _node.execute

comfy_entrypoint = extension(
    LatentAdd,
    LatentSubtract,
    LatentMultiply,
    LatentInterpolate,
    LatentConcat,
    LatentCut,
    LatentCutToBatch,
    LatentBatch,
    LatentBatchSeedBehavior,
    LatentApplyOperation,
    LatentApplyOperationCFG,
    LatentOperationTonemapReinhard,
    LatentOperationSharpen,
)
