"""Image, latent and mask nodes give the recorded figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "goldens" / "12_image_latent_nodes"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the recorded figures are not beside this checkout")


class BlockMeanVAE:
    """Stands in for a VAE: a latent is the mean of each 8x8 block."""

    def encode(self, pixels):
        return torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)

    def spacial_compression_encode(self):
        return 8


@pytest.fixture(scope="module")
def golden():
    import safetensors.torch

    return json.loads((FOLDER / "index.json").read_text()), safetensors.torch.load_file(FOLDER / "tensors.safetensors")


def cases():
    return list(json.loads((FOLDER / "index.json").read_text())["ops"]) if FOLDER.is_dir() else []


def compare(got, want, tensors, tolerance):
    if isinstance(want, str) and want in tensors:
        expected = tensors[want]
        assert tuple(got.shape) == tuple(expected.shape)
        error = (got.float() - expected).abs().max() / max(1.0, expected.abs().max().item())
        assert error <= tolerance
    else:
        assert list(got) == list(want)


class Run:
    """Runs a case by its name; `nodes` are the node classes, `t` the recorded tensors."""

    def __init__(self, all_nodes, tensors):
        self.nodes = all_nodes
        self.t = tensors

    def call(self, node, *arguments, **keywords):
        cls = self.nodes[node]
        if hasattr(cls, "GET_SCHEMA"):
            return cls.execute(*arguments, **keywords).args
        return getattr(cls(), cls.FUNCTION)(*arguments, **keywords)

    def latent(self, name="latent", **more):
        return {"samples": self.t[name], **more}

    def __call__(self, name, args):
        for prefix, method in (
            ("latent_upscale_by_", self.upscale_by),
            ("latent_upscale_", self.upscale),
            ("latent_composite_masked", self.composite_masked),
            ("image_composite_masked", self.image_composite_masked),
            ("latent_", self.latents),
            ("image_scale_by_", self.image_scale_by),
            ("image_scale_", self.image_scale),
            ("mask_composite_", self.mask_composite),
            ("mask_grow_", self.mask_grow),
            ("mask_", self.masks),
            ("image_", self.images),
            ("vae_encode", self.vae),
            ("outpaint", self.outpaint),
            ("inpaint_model", self.inpaint_model),
        ):
            if name.startswith(prefix):
                return method(name.removeprefix(prefix), args)
        raise AssertionError(f"no test for {name}")

    def upscale(self, rest, args):
        method, crop = ("bilinear", "disabled")
        for suffix in ("_disabled", "_center"):
            if rest.endswith(suffix):
                method, crop = rest.removesuffix(suffix), suffix[1:]
        return self.call("LatentUpscale", self.latent(args["input"]), method, args["width"], args["height"], crop)[0]

    def upscale_by(self, rest, args):
        return self.call("LatentUpscaleBy", self.latent(), rest, args["scale"])[0]

    def latents(self, rest, args):
        first, second, same = (self.latent(name) for name in ("latent", "latent_b", "latent_same"))
        if rest.startswith("rotate"):
            return self.call("LatentRotate", first, args["rotation"])[0]
        if rest.startswith("flip"):
            return self.call("LatentFlip", first, args["flip"])[0]
        if rest.startswith("composite"):
            return self.call("LatentComposite", first, second, args["x"], args["y"], "normal", args["feather"])[0]
        mask = self.t["mask"]
        simple = {
            "crop": lambda: self.call("LatentCrop", first, **args),
            "set_mask": lambda: self.call("SetLatentNoiseMask", first, mask),
            "add": lambda: self.call("LatentAdd", first, same),
            "multiply": lambda: self.call("LatentMultiply", first, args["multiplier"]),
            "batch": lambda: self.call("LatentBatch", first, second),
            "blend": lambda: self.call("LatentBlend", first, second, args["factor"]),
            "from_batch": lambda: self.call("LatentFromBatch", self.two(), args["batch_index"], args["length"]),
            "from_batch_mask": lambda: self.call(
                "LatentFromBatch", {**self.two(), "noise_mask": mask, "batch_index": [4, 5, 6, 7]}, 2, 1
            ),
            "repeat": lambda: self.call(
                "RepeatLatentBatch", self.latent(batch_index=[0, 5], noise_mask=torch.cat([mask, 1 - mask])), 2
            ),
            "interpolate_batch1": lambda: self.call(
                "LatentInterpolate", *({"samples": latent["samples"][:1]} for latent in (first, same)), args["ratio"]
            ),
        }
        return simple[rest]()[0]

    def two(self):
        return {"samples": torch.cat([self.t["latent"], self.t["latent_same"]])}

    def composite_masked(self, rest, args):
        return self.call(
            "LatentCompositeMasked",
            self.latent(),
            self.latent("latent_b"),
            args["x"],
            args["y"],
            rest.endswith("True"),
            self.t["mask"],
        )[0]

    def image_composite_masked(self, rest, args):
        return self.call(
            "ImageCompositeMasked",
            self.t["image"],
            self.t["image_b"],
            args["x"],
            args["y"],
            rest.endswith("True"),
            self.t["mask"],
        )

    def image_scale(self, rest, args):
        method, crop = ("bilinear", "disabled") if rest == "height_only" else rest.rsplit("_", 1)
        return self.call("ImageScale", self.t["image"], method, args["width"], args["height"], crop)

    def image_scale_by(self, rest, args):
        return self.call("ImageScaleBy", self.t["image"], rest, args["scale"])

    def images(self, rest, args):
        image = self.t["image"]
        if rest == "invert":
            return self.call("ImageInvert", image)
        if rest == "batch_resized":
            return self.call("ImageBatch", image, self.t["image_b"])
        return self.call("ImageToMask", image, rest.removeprefix("to_mask_"))

    def outpaint(self, rest, args):
        image, mask = self.call("ImagePadForOutpaint", self.t["image"], **args)
        return {"image": image, "mask": mask}

    def vae(self, rest, args):
        return self.call("VAEEncodeForInpaint", BlockMeanVAE(), self.t["image"], self.t["mask"], args["grow_mask_by"])[
            0
        ]

    def inpaint_model(self, rest, args):
        empty = [[torch.zeros(1, 1, 1), {}]]
        positive, negative, latent = self.call(
            "InpaintModelConditioning", empty, empty, self.t["image"], BlockMeanVAE(), self.t["mask"]
        )
        assert negative[0][1].keys() == positive[0][1].keys()
        return {**positive[0][1], **latent}

    def mask_composite(self, rest, args):
        return self.call("MaskComposite", self.t["mask"], self.t["mask_hard"], args["x"], args["y"], rest)

    def mask_grow(self, rest, args):
        return self.call("GrowMask", self.t["mask_hard"], args["expand"], args["tapered"])

    def masks(self, rest, args):
        node = {
            "invert": "InvertMask",
            "crop": "CropMask",
            "feather": "FeatherMask",
            "threshold": "ThresholdMask",
            "to_image": "MaskToImage",
        }[rest]
        return self.call(node, self.t["mask"], **args)


@pytest.mark.parametrize("name", cases())
def test_node(golden, all_nodes, name):
    index, tensors = golden
    case = index["ops"][name]
    if "raises" in case:
        first, second = ({"samples": tensors[key]} for key in ("latent", "latent_same"))
        with pytest.raises(RuntimeError):
            all_nodes["LatentInterpolate"].execute(first, second, 0.4)
        return
    before = {key: value.clone() for key, value in tensors.items()}
    got = Run(all_nodes, tensors)(name, case["args"])
    tolerance = 1.01 / 255 if "lanczos" in name else 1e-5
    for key, want in case["result"].items():
        compare(got[0] if key == "out" else got[key], want, tensors, tolerance)
    assert all(torch.equal(before[key], tensors[key]) for key in before), "an input was changed"


@pytest.mark.parametrize("family", ["SD15", "SDXL", "SD3", "Flux", "Wan21", "HunyuanVideo"])
def test_preview(golden, family):
    import comfy.latent_formats
    import latent_preview

    _, tensors = golden
    latent_format = getattr(comfy.latent_formats, family)()
    previewer = latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors, getattr(latent_format, "latent_rgb_factors_bias", None)
    )
    image = previewer.decode_latent_to_preview(tensors[f"preview/{family}/latent"])
    got = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)
    assert (got.int() - tensors[f"preview/{family}/rgb"].int()).abs().max() <= 1
