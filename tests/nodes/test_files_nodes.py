"""Nodes that read and write files, and the small ones without figures of their own."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import folder_paths
import nodes


@pytest.fixture
def folders(tmp_path):
    folder_paths.set_base_directory(str(tmp_path))
    for name in ("input", "output", "temp"):
        (tmp_path / name).mkdir()
    yield tmp_path
    folder_paths.set_base_directory(None)


def out(all_nodes, name, **inputs):
    return all_nodes[name].execute(**inputs).args


def test_pictures_come_back_as_they_were_saved(folders):
    images = torch.rand(2, 5, 7, 3)
    shown = nodes.SaveImage().save_images(images, "a/b%width%", {"1": {}}, {"workflow": {"x": 1}})["ui"]["images"]
    assert [entry["filename"] for entry in shown] == ["b7_00001_.png", "b7_00002_.png"]
    assert shown[0]["subfolder"] == "a"
    with Image.open(folders / "output/a/b7_00001_.png") as picture:
        assert json.loads(picture.text["workflow"]) == {"x": 1}
    loaded, mask = nodes.LoadImage().load_image("a/b7_00002_.png [output]")
    assert (loaded[0] - images[1]).abs().max() <= 1 / 255
    assert mask.shape == (1, 64, 64)
    again = nodes.SaveImage().save_images(images[:1], "a/b%width%")["ui"]["images"]
    assert again[0]["filename"] == "b7_00003_.png"
    temp = nodes.PreviewImage().save_images(images[:1])["ui"]["images"][0]
    assert temp["type"] == "temp"


def test_metadata_can_be_left_out(folders, monkeypatch):
    from comfy.cli_args import args

    monkeypatch.setattr(args, "disable_metadata", True)
    nodes.SaveImage().save_images(torch.rand(1, 4, 4, 3), "x", {"1": {}}, {"workflow": {}})
    with Image.open(folders / "output/x_00001_.png") as picture:
        assert picture.text == {}


def test_results_stay_in_the_output_folder(folders):
    with pytest.raises(ValueError, match="leads outside the output folder"):
        nodes.SaveImage().save_images(torch.rand(1, 4, 4, 3), "../x")


def test_transparency_becomes_a_mask(folders):
    Image.new("RGBA", (6, 4), (255, 0, 0, 51)).save(folders / "input/a.png")
    image, mask = nodes.LoadImage().load_image("a.png")
    assert image.shape == (1, 4, 6, 3)
    assert torch.allclose(mask, torch.full((1, 4, 6), 0.8))
    assert torch.allclose(nodes.LoadImageMask().load_image("a.png", "alpha")[0], torch.full((1, 4, 6), 0.8))
    assert torch.allclose(nodes.LoadImageMask().load_image("a.png", "red")[0], torch.ones(1, 4, 6))
    assert nodes.LoadImage.VALIDATE_INPUTS("../a.png") == "Invalid image file: ../a.png"
    assert nodes.LoadImage.VALIDATE_INPUTS("a.png") is True
    first = nodes.LoadImage.IS_CHANGED("a.png")
    Image.new("RGB", (6, 4)).save(folders / "input/a.png")
    assert nodes.LoadImage.IS_CHANGED("a.png") != first
    with pytest.raises(FileNotFoundError, match=r"b\.png is not in the input folder"):
        nodes.LoadImage().load_image("b.png")


def test_frames_of_an_animation_are_a_batch(folders):
    frames = [Image.new("RGB", (4, 4), (i * 80, 0, 0)) for i in range(3)]
    frames[0].save(folders / "input/a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert nodes.LoadImage().load_image("a.webp")[0].shape[0] == 3


def test_latents_come_back(folders):
    import shutil

    latent = {"samples": torch.randn(1, 4, 3, 2)}
    entry = nodes.SaveLatent().save(latent, "latents/x", {"1": {}})["ui"]["latents"][0]
    assert entry == {"filename": "x_00001_.latent", "subfolder": "latents", "type": "output"}
    shutil.copy(folders / "output/latents/x_00001_.latent", folders / "input/x.latent")
    assert nodes.LoadLatent.INPUT_TYPES()["required"]["latent"][0] == ["x.latent"]
    assert torch.equal(nodes.LoadLatent().load("x.latent")[0]["samples"], latent["samples"])


def test_a_missing_model_is_named(folders):
    with pytest.raises(FileNotFoundError, match=r"'checkpoints' with filename 'x\.safetensors' not found; put it into"):
        nodes.CheckpointLoaderSimple().load_checkpoint("x.safetensors")
    with pytest.raises(RuntimeError, match="clip input is invalid"):
        nodes.CLIPTextEncode().encode(None, "x")
    with pytest.raises(RuntimeError, match="vae input is missing"):
        nodes.VAEDecode().decode(None, {})


def test_a_latent_of_another_model_is_refused(monkeypatch):
    import comfy.sample

    class Model:
        def get_model_object(self, name):
            return type("Format", (), {"latent_channels": 16})

    monkeypatch.setattr(comfy.sample, "fix_empty_latent_channels", lambda model, samples: samples)
    with pytest.raises(ValueError, match="has 4 channels but this model works on 16"):
        nodes.common_ksampler(Model(), 0, 1, 1.0, "euler", "simple", [], [], {"samples": torch.ones(1, 4, 8, 8)})


def test_videos_come_back(all_nodes, folders):
    images = torch.rand(1, 16, 24, 3).repeat(6, 1, 1, 1)
    sound = {"waveform": torch.sin(torch.arange(44100) / 20.0).reshape(1, 1, -1), "sample_rate": 44100}
    (video,) = out(all_nodes, "CreateVideo", images=images, fps=12.0, audio=sound)
    node = all_nodes["SaveVideo"].PREPARE_CLASS_CLONE({"PROMPT": {"1": {}}, "EXTRA_PNGINFO": {"workflow": {"x": 1}}})
    shown = node.execute(video=video, filename_prefix="v/x", format="auto", codec="auto").ui.as_dict()["images"][0]
    assert shown["filename"] == "x_00001_.mp4"
    (loaded,) = out(all_nodes, "LoadVideo", file="v/x_00001_.mp4 [output]")
    assert loaded.get_dimensions() == (24, 16)
    frames, audio, rate = out(all_nodes, "GetVideoComponents", video=loaded)
    assert frames.shape == images.shape
    assert rate == 12.0
    assert audio["sample_rate"] == 44100
    assert (frames - images).abs().mean() < 0.2
    import av

    with av.open(str(folders / "output/v/x_00001_.mp4")) as container:
        assert json.loads(container.metadata["workflow"]) == {"x": 1}
    loaded.save_to(str(folders / "output/copy.mp4"))
    with av.open(str(folders / "output/copy.mp4")) as container:
        assert container.streams.video[0].frames == 6


def test_animations(all_nodes, folders):
    images = torch.rand(3, 8, 8, 3)
    shown = all_nodes["SaveAnimatedWEBP"]().save_images(images, 6.0, "a", True, 80, "default", prompt={})["ui"]
    with Image.open(folders / "output" / shown["images"][0]["filename"]) as picture:
        assert picture.n_frames == 3
    shown = all_nodes["SaveAnimatedPNG"]().save_images(images, 6.0, 4, "a", {"1": "ü→"})["ui"]
    with Image.open(folders / "output" / shown["images"][0]["filename"]) as picture:
        assert picture.n_frames == 3


@pytest.mark.parametrize(
    ("name", "inputs", "result"),
    [
        ("StringConcatenate", {"string_a": "a", "string_b": "b", "delimiter": "-"}, "a-b"),
        ("StringSubstring", {"string": "abcd", "start": 1, "end": 3}, "bc"),
        ("StringLength", {"string": "abc"}, 3),
        ("CaseConverter", {"string": "a b", "mode": "Title Case"}, "A B"),
        ("StringTrim", {"string": " a ", "mode": "Left"}, "a "),
        ("StringContains", {"string": "Abc", "substring": "aB", "case_sensitive": False}, True),
        ("StringCompare", {"string_a": "Abc", "string_b": "ab", "mode": "Starts With", "case_sensitive": False}, True),
        ("RegexReplace", {"string": "aaa", "regex_pattern": "A", "replace": "b", "count": 2}, "bba"),
        ("PrimitiveInt", {"value": 3}, 3),
    ],
)
def test_texts_and_values(all_nodes, name, inputs, result):
    assert out(all_nodes, name, **inputs) == (result,)


@pytest.mark.parametrize(
    ("mode", "result"),
    [
        ("First Match", "a1"),
        ("All Matches", "a\nb"),
        ("First Group", "1"),
        ("All Groups", "1\n2"),
    ],
)
def test_regular_expressions(all_nodes, mode, result):
    inputs = {"case_insensitive": True, "multiline": False, "dotall": False}
    text = {"string": "a1 b2", "regex_pattern": r"([a-z])(\d)", **inputs}
    assert out(all_nodes, "RegexExtract", mode=mode, group_index=2, **text) == (result,)
    assert out(all_nodes, "RegexMatch", string="x", regex_pattern="(", **inputs) == (False,)


def test_transparency_can_be_split_and_joined(all_nodes):
    image = torch.rand(2, 4, 4, 4)
    colour, mask = out(all_nodes, "SplitImageWithAlpha", image=image)
    assert torch.allclose(out(all_nodes, "JoinImageWithAlpha", image=colour, alpha=mask)[0], image)
    over, alpha = out(
        all_nodes,
        "PorterDuffImageComposite",
        source=colour,
        source_alpha=torch.zeros(2, 4, 4),
        destination=torch.rand(2, 4, 4, 3),
        destination_alpha=mask,
        mode="SRC_OVER",
    )
    assert torch.allclose(over, colour)
    assert torch.equal(alpha, torch.zeros(2, 4, 4))


def test_batches_are_cut_anew(all_nodes):
    images = [torch.rand(3, 4, 4, 3), torch.rand(2, 4, 4, 3)]
    (parts,) = out(all_nodes, "RebatchImages", images=images, batch_size=[2])
    assert [len(part) for part in parts] == [2, 2, 1]
    latents = [{"samples": torch.rand(3, 4, 2, 2)}, {"samples": torch.rand(1, 4, 2, 3), "batch_index": [9]}]
    (parts,) = out(all_nodes, "RebatchLatents", latents=latents, batch_size=[2])
    assert [part["batch_index"] for part in parts] == [[0, 1], [2], [9]]
    assert parts[0]["noise_mask"].shape == (2, 1, 16, 16)


@pytest.mark.parametrize(
    ("direction", "match", "shape"),
    [
        ("right", True, (1, 8, 6 + 2 + 16, 3)),
        ("down", True, (1, 8 + 2 + 3, 6, 3)),
        ("left", False, (1, 8, 6 + 2 + 8, 3)),
    ],
)
def test_pictures_are_stitched(all_nodes, direction, match, shape):
    first, second = torch.rand(1, 8, 6, 3), torch.rand(1, 4, 8, 3)
    (image,) = all_nodes["ImageStitch"]().stitch(first, direction, match, 2, "red", second)
    assert image.shape == shape
    assert torch.equal(
        image[:, :, 6] if direction == "right" else image[:, 8] if direction == "down" else image[:, :, 8],
        torch.tensor([1.0, 0, 0]).expand(1, shape[1 if direction != "down" else 2], 3),
    )


def test_sizes(all_nodes):
    image = torch.rand(1, 30, 60, 3)
    assert all_nodes["ImageScaleToMaxDimension"]().upscale(image, "area", 20)[0].shape == (1, 10, 20, 3)
    (total,) = out(all_nodes, "ImageScaleToTotalPixels", image=image, upscale_method="bilinear", megapixels=0.01)
    assert abs(total.shape[1] * total.shape[2] - 0.01 * 1024 * 1024) < 200
    (padded,) = all_nodes["ResizeAndPadImage"]().resize_and_pad(image, 40, 40, "white", "area")
    assert padded.shape == (1, 40, 40, 3)
    assert padded[0, 0, 0].tolist() == [1, 1, 1]
    (kontext,) = out(all_nodes, "FluxKontextImageScale", image=image)
    assert kontext.shape[1:3] == (720, 1456) or kontext.shape[1:3] == (688, 1504)


def test_skipped_layers_guide_away(all_nodes, monkeypatch):
    import comfy.samplers

    class Sampling:
        def percent_to_sigma(self, percent):
            return 10 * (1 - percent)

    class Model:
        hook = None

        def clone(self):
            return Model()

        def get_model_object(self, name):
            return Sampling()

        def set_model_sampler_post_cfg_function(self, function):
            self.hook = function

    monkeypatch.setattr(
        comfy.samplers,
        "calc_cond_batch",
        lambda model, conds, x, sigma, options: [
            torch.zeros(1) if options["transformer_options"]["patches_replace"]["dit"] else None
        ],
    )
    (model,) = out(
        all_nodes, "SkipLayerGuidanceSD3", model=Model(), layers="7, 8", scale=2.0, start_percent=0.1, end_percent=0.5
    )
    arguments = {
        "denoised": torch.ones(1),
        "cond_denoised": torch.ones(1),
        "cond": [],
        "input": None,
        "model": None,
        "model_options": {"transformer_options": {}},
    }
    assert model.hook({**arguments, "sigma": torch.tensor([7.0])}).item() == 3.0
    assert model.hook({**arguments, "sigma": torch.tensor([1.0])}).item() == 1.0
