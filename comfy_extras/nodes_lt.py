"""Nodes of LTX-Video. Latents are [B, 128, F, h, w] with F = (length - 1) / 8 + 1 and 32 pixels a cell and side."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any

import torch

import comfy.model_management
import comfy.model_sampling
import node_helpers
from comfy.missing import missing_names
from comfy_api.latest import io
from comfy_extras.nodes_model_advanced import with_sampling
from comfy_nodes.fields import MAX_RESOLUTION
from comfy_nodes.image import scaled
from comfy_nodes.v3 import batch, extension, share, side
from comfy_nodes.vae import need_vae

CHANNELS, CELL, STEP = 128, 32, 8
BESIDE = 2  # latent frames of a guide that are put beside the video; those after them replace the video's
FEWEST, MOST = 1024, 4096  # tokens at which the base and the largest shift hold


def size_inputs(least: int) -> list[Any]:
    """Size and length of the video, and how many at once."""
    frames = io.Int.Input("length", default=97, min=least, max=MAX_RESOLUTION, step=STEP)
    return [side("width", 768, low=64, step=CELL), side("height", 512, low=64, step=CELL), frames, batch()]


def empty(width: int, height: int, length: int, count: int) -> torch.Tensor:
    """A latent of zeros."""
    shape = (count, CHANNELS, (length - 1) // STEP + 1, height // CELL, width // CELL)
    return torch.zeros(shape, device=comfy.model_management.intermediate_device())


def prompts() -> list[Any]:
    return [io.Conditioning.Input("positive"), io.Conditioning.Input("negative")]


def prompt_outputs() -> list[Any]:
    return [io.Conditioning.Output(display_name=name) for name in ("positive", "negative")]


class EmptyLTXVLatentVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=cls.__name__, category="latent/video/ltxv", inputs=size_inputs(1), outputs=[io.Latent.Output()]
        )

    @classmethod
    def execute(cls, width: int, height: int, length: int, batch_size: int = 1):
        return io.NodeOutput({"samples": empty(width, height, length, batch_size)})

    generate = execute


class LTXVImgToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        strength = io.Float.Input("strength", default=1.0, min=0.0, max=1.0)
        inputs = [*prompts(), io.Vae.Input("vae"), io.Image.Input("image"), *size_inputs(9), strength]
        outputs = [*prompt_outputs(), io.Latent.Output(display_name="latent")]
        return io.Schema(node_id=cls.__name__, category="conditioning/video_models", inputs=inputs, outputs=outputs)

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, image: torch.Tensor, width: int, height: int, length: int,
        batch_size: int, strength: float,
    ):  # fmt: skip
        """The video begins with the picture; below a strength of 1 it may differ."""
        need_vae(vae)
        known = vae.encode(scaled(image, width, height, "bilinear", "center")[..., :3])
        latent = empty(width, height, length, batch_size)
        mask = latent.new_ones((batch_size, 1, latent.shape[2], 1, 1))
        latent[:, :, : known.shape[2]] = known
        mask[:, :, : known.shape[2]] = 1.0 - strength
        return io.NodeOutput(positive, negative, {"samples": latent, "noise_mask": mask})

    generate = execute


class LTXVConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        rate = share("frame_rate", 25.0, high=1000.0)
        inputs = [*prompts(), rate]
        return io.Schema(
            node_id=cls.__name__, category="conditioning/video_models", inputs=inputs, outputs=prompt_outputs()
        )

    @classmethod
    def execute(cls, positive: Any, negative: Any, frame_rate: float):
        values = {"frame_rate": frame_rate}
        return io.NodeOutput(*(node_helpers.conditioning_set_values(c, values) for c in (positive, negative)))

    append = execute


def get_noise_mask(latent: dict[str, Any]) -> torch.Tensor:
    """A copy of a latent's mask [B, 1, F, 1 or h, 1 or w] of what is to be made: everything without one."""
    if latent.get("noise_mask") is not None:
        mask: torch.Tensor = latent["noise_mask"].clone()
        return mask
    samples = latent["samples"]
    return torch.ones((samples.shape[0], 1, samples.shape[2], 1, 1), device=samples.device)


def get_keyframe_idxs(cond: Any) -> tuple[torch.Tensor | None, int]:
    """Where tokens of guides are, [B, 3, n], and how many latent frames they are."""
    places = next((fields["keyframe_idxs"] for _, fields in cond if fields.get("keyframe_idxs") is not None), None)
    return places, 0 if places is None else torch.unique(places[:, 0]).numel()


def guide_places(guide: torch.Tensor, first: int, ratios: tuple[int, int, int]) -> torch.Tensor:
    """Where a guide's latent cells [B, C, f, h, w] begin in the video, in frames and pixels: [B, 3, f * h * w].

    first: the frame of the video at which it begins. ratios: (frames, rows, columns) a cell.
    """
    axes = [torch.arange(size, device=guide.device) * ratio for size, ratio in zip(guide.shape[2:], ratios)]
    if first == 0 or guide.shape[2] == 1:  # the first latent frame is a single frame of the video
        axes[0] = (axes[0] + 1 - ratios[0]).clamp(min=0)
    axes[0] = axes[0] + first
    places = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    return places.unsqueeze(0).repeat(guide.shape[0], 1, 1)


def _with_places(cond: Any, places: torch.Tensor) -> Any:
    before, _ = get_keyframe_idxs(cond)
    joined = places if before is None else torch.cat((before, places), dim=2)
    return node_helpers.conditioning_set_values(cond, {"keyframe_idxs": joined})


class LTXVAddGuide(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        image = io.Image.Input(
            "image", tooltip="A picture that the video follows, or a video, which is cut to 1, 9, 17, ... frames."
        )
        frame = io.Int.Input(
            "frame_idx", default=0, min=-9999, max=9999,
            tooltip="The frame at which it begins; below 0 counted from the end. A video of 9 frames or more begins at "
            "frame 0, 1, 9, 17, ...: other frames are rounded down to these.",
        )  # fmt: skip
        inputs = [*prompts(), io.Vae.Input("vae"), io.Latent.Input("latent"), image, frame, share("strength", 1.0)]
        outputs = [*prompt_outputs(), io.Latent.Output(display_name="latent")]
        return io.Schema(node_id=cls.__name__, category="conditioning/video_models", inputs=inputs, outputs=outputs)

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, latent: dict[str, Any], image: torch.Tensor, frame_idx: int,
        strength: float,
    ):  # fmt: skip
        """The guide's first latent frames are tokens beside the video, at their place in it; others replace the video's.

        Raises ValueError when the guide is longer than the video.
        """
        need_vae(vae)
        samples, mask = latent["samples"], get_noise_mask(latent)
        ratios = vae.downscale_index_formula
        step, rows, columns = ratios
        frames = image[: (image.shape[0] - 1) // step * step + 1]
        size = samples.shape[-1] * columns, samples.shape[-2] * rows
        guide = vae.encode(scaled(frames, *size, "bilinear", "disabled")[..., :3])
        length = samples.shape[2] - get_keyframe_idxs(positive)[1]
        first = frame_idx if frame_idx >= 0 else max((length - 1) * step + 1 + frame_idx, 0)
        if frames.shape[0] > 1 and first:
            first = (first - 1) // step * step + 1
        start = (first + step - 1) // step
        if start + guide.shape[2] > samples.shape[2]:
            raise ValueError(
                f"a guide of {frames.shape[0]} frames at frame {first} ends after the video, which has "
                f"{(length - 1) * step + 1}; let it begin earlier, or give fewer frames"
            )
        beside, within = guide[:, :, :BESIDE], guide[:, :, BESIDE:]
        places = guide_places(beside, first, ratios)
        positive, negative = (_with_places(cond, places) for cond in (positive, negative))
        inside = slice(start + beside.shape[2], start + guide.shape[2])
        if within.shape[2]:
            samples = samples.clone()
            samples[:, :, inside] = within
        mask[:, :, start : inside.start] = 1.0
        mask[:, :, inside] = 1.0 - strength
        added = mask.new_full((mask.shape[0], 1, beside.shape[2], *mask.shape[3:]), 1.0 - strength)
        beside = beside.to(samples).expand(samples.shape[0], -1, -1, -1, -1)
        out = {"samples": torch.cat((samples, beside), dim=2), "noise_mask": torch.cat((mask, added), dim=2)}
        return io.NodeOutput(positive, negative, out)

    generate = execute


class LTXVCropGuides(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        outputs = [*prompt_outputs(), io.Latent.Output(display_name="latent")]
        inputs = [*prompts(), io.Latent.Input("latent")]
        return io.Schema(node_id=cls.__name__, category="conditioning/video_models", inputs=inputs, outputs=outputs)

    @classmethod
    def execute(cls, positive: Any, negative: Any, latent: dict[str, Any]):
        """Takes away the frames of guides, which are at the end."""
        _, frames = get_keyframe_idxs(positive)
        if not frames:
            return io.NodeOutput(positive, negative, latent)
        kept = latent["samples"].shape[2] - frames
        out = {"samples": latent["samples"][:, :, :kept], "noise_mask": get_noise_mask(latent)[:, :, :kept]}
        without = [node_helpers.conditioning_set_values(c, {"keyframe_idxs": None}) for c in (positive, negative)]
        return io.NodeOutput(*without, out)

    crop = execute


def shift_of(max_shift: float, base_shift: float, latent: dict[str, Any] | None) -> float:
    """The shift for a latent's number of tokens, on the line through both ends; that of 4096 without a latent."""
    tokens = MOST if latent is None else math.prod(latent["samples"].shape[2:])
    slope = (max_shift - base_shift) / (MOST - FEWEST)
    return tokens * slope + base_shift - slope * FEWEST


def shifts() -> list[Any]:
    return [share("max_shift", 2.05, high=100.0), share("base_shift", 0.95, high=100.0)]


class ModelSamplingLTXV(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [io.Model.Input("model"), *shifts(), io.Latent.Input("latent", optional=True)]
        return io.Schema(node_id=cls.__name__, category="advanced/model", inputs=inputs, outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model: Any, max_shift: float, base_shift: float, latent: dict[str, Any] | None = None):
        kinds = comfy.model_sampling
        shift = shift_of(max_shift, base_shift, latent)
        return io.NodeOutput(with_sampling(model, kinds.ModelSamplingFlux, kinds.CONST, shift=shift))

    patch = execute


class LTXVScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        stretch = io.Boolean.Input(
            "stretch", default=True, tooltip="Stretch the sigmas so that the last one before 0 is `terminal`."
        )
        terminal = share("terminal", 0.1, high=0.99, tooltip="The last sigma before 0, with `stretch`.")
        inputs = [io.Int.Input("steps", default=20, min=1, max=10000), *shifts(), stretch, terminal]
        return io.Schema(
            node_id=cls.__name__, category="sampling/custom_sampling/schedulers",
            inputs=[*inputs, io.Latent.Input("latent", optional=True)], outputs=[io.Sigmas.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, steps: int, max_shift: float, base_shift: float, stretch: bool, terminal: float,
        latent: dict[str, Any] | None = None,
    ):  # fmt: skip
        """e^s / (e^s + 1 / u - 1) for u from 1 to 0; s grows with the number of tokens."""
        power = math.exp(shift_of(max_shift, base_shift, latent))
        u = torch.linspace(1.0, 0.0, steps + 1)
        sigmas = torch.where(u > 0, power / (power + (1 / u.clamp(min=1e-9) - 1)), 0.0)
        if stretch:
            last = 1 - sigmas[-2]
            stretched = 1 - (1 - sigmas[:-1]) / (last / (1 - terminal)) if last > 0 else sigmas[:-1]
            sigmas = torch.cat((stretched, sigmas[-1:]))
        return io.NodeOutput(sigmas)

    get_sigmas = execute


def compressed(image: torch.Tensor, crf: int) -> torch.Tensor:
    """A picture [H, W, 3] in 0..1 as a video of one frame keeps it, with even sides. crf: x264's loss, 0 (none) to 51.

    One thread encodes, so that the result does not depend on the machine's cores.
    """
    import av

    height, width = (size // 2 * 2 for size in image.shape[:2])
    pixels = (image[:height, :width, :3] * 255.0).to("cpu", torch.uint8).numpy()
    with BytesIO() as file:
        with av.open(file, "w", format="mp4") as video:
            stream = video.add_stream(
                "libx264", rate=1, options={"crf": str(crf), "preset": "veryfast", "threads": "1"}
            )
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            video.mux(stream.encode(frame))
            video.mux(stream.encode())
        file.seek(0)
        with av.open(file) as video:
            kept = next(video.decode(video=0)).to_ndarray(format="rgb24")
    return torch.from_numpy(kept).to(image) / 255.0


class LTXVPreprocess(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        loss = io.Int.Input(
            "img_compression", default=35, min=0, max=100, tooltip="How much is lost: the model was trained on videos."
        )
        inputs, outputs = [io.Image.Input("image"), loss], [io.Image.Output(display_name="output_image")]
        return io.Schema(node_id=cls.__name__, category="image", inputs=inputs, outputs=outputs)

    @classmethod
    def execute(cls, image: torch.Tensor, img_compression: int):
        """Each picture compressed as a frame of a video; at 0 they stay as they are."""
        if img_compression == 0:
            return io.NodeOutput(image)
        return io.NodeOutput(torch.stack([compressed(one, img_compression) for one in image]))

    preprocess = execute


comfy_entrypoint = extension(
    EmptyLTXVLatentVideo, LTXVImgToVideo, ModelSamplingLTXV, LTXVConditioning, LTXVScheduler, LTXVAddGuide,
    LTXVPreprocess, LTXVCropGuides,
)  # fmt: skip
__getattr__ = missing_names(__name__, {"_append_guide_attention_entry": "attention of guides by strength (LTX-2)"})
