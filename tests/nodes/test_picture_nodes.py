"""Picture nodes without recorded figures: edges, shapes, palettes, upscalers, 3D, training data, WebSocket."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
import torch
from PIL import Image

import folder_paths
import nodes
from tests.nodes.helpers import encode, run
from tests.tiny_parts import upscaler


@pytest.fixture
def folders(tmp_path):
    folder_paths.set_base_directory(str(tmp_path))
    for name in ("input", "output", "temp", "models/upscale_models"):
        (tmp_path / name).mkdir(parents=True)
    yield tmp_path
    folder_paths.set_base_directory(None)


def square(size=32, low=8, high=24):
    image = torch.zeros(1, size, size, 3)
    image[:, low:high, low:high] = 1
    return image


def test_edges(all_nodes):
    edges = run(all_nodes, "Canny", image=square(), low_threshold=0.4, high_threshold=0.8)[0]
    assert edges.shape == (1, 32, 32, 3) and set(edges.unique().tolist()) == {0.0, 1.0}
    rows = edges[0, 16, :, 0].nonzero().flatten().tolist()
    assert len(rows) == 2 and abs(rows[0] - 8) <= 1 and abs(rows[1] - 23) <= 1
    assert edges[0, :5].sum() == 0 and edges[0, 14:18, 14:18].sum() == 0
    with pytest.raises(ValueError, match="low_threshold 0.9 is above"):
        run(all_nodes, "Canny", image=square(), low_threshold=0.9, high_threshold=0.2)


def test_shapes_grow_and_shrink(all_nodes):
    areas = {
        name: float(run(all_nodes, "Morphology", image=square(), operation=name, kernel_size=3)[0][..., 0].sum())
        for name in ("erode", "dilate", "open", "close", "gradient", "bottom_hat", "top_hat")
    }
    assert areas == {
        "erode": 14**2,
        "dilate": 18**2,
        "open": 256,
        "close": 256,
        "gradient": 18**2 - 14**2,
        "bottom_hat": 0,
        "top_hat": 0,
    }


def test_luma_and_chroma(all_nodes):
    image = torch.rand(2, 4, 4, 3)
    parts = run(all_nodes, "ImageRGBToYUV", image=image)
    torch.testing.assert_close(parts[0][..., 0], image @ torch.tensor([0.299, 0.587, 0.114]), atol=1e-5, rtol=0)
    back = run(all_nodes, "ImageYUVToRGB", Y=parts[0], U=parts[1], V=parts[2])[0]
    torch.testing.assert_close(back, image, atol=3e-3, rtol=0)


@pytest.mark.parametrize("dither", ["none", "floyd-steinberg", "bayer-2", "bayer-4", "bayer-8", "bayer-16"])
def test_palettes(all_nodes, dither):
    ramp = torch.linspace(0, 1, 64).expand(2, 16, 64)[..., None].expand(-1, -1, -1, 3)
    out = run(all_nodes, "ImageQuantize", image=ramp, colors=4, dither=dither)[0]
    assert out.shape == ramp.shape and len(out[0].reshape(-1, 3).unique(dim=0)) <= 4
    assert (out.mean() - ramp.mean()).abs() < 0.1
    if dither != "none":  # a mixture of colours inside what is one colour without
        plain = run(all_nodes, "ImageQuantize", image=ramp, colors=4, dither="none")[0]
        assert (out != plain).any()


def test_thresholds_of_ordered_dithering():
    from comfy_extras.nodes_post_processing import bayer_matrix

    torch.testing.assert_close(bayer_matrix(2), np.array([[-1.5, 0.5], [1.5, -0.5]]) / 4)
    matrix = bayer_matrix(4)
    assert matrix.shape == (4, 4) and len(np.unique(matrix)) == 16 and abs(matrix.sum()) < 1e-9


def test_upscale_models(all_nodes, folders):
    from safetensors.torch import save_file

    save_file(upscaler(), folders / "models/upscale_models/tiny2x.safetensors")
    save_file({"x": torch.zeros(1)}, folders / "models/upscale_models/none.safetensors")
    model = run(all_nodes, "UpscaleModelLoader", model_name="tiny2x.safetensors")[0]
    assert model.scale == 2
    image = torch.rand(2, 20, 30, 3)
    large = run(all_nodes, "ImageUpscaleWithModel", upscale_model=model, image=image)[0]
    assert large.shape == (2, 40, 60, 3)
    whole = model.model(image.movedim(-1, 1)).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(large, whole.detach(), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no upscale model that spandrel knows"):
        run(all_nodes, "UpscaleModelLoader", model_name="none.safetensors")


def test_upscaling_in_smaller_tiles_when_memory_runs_out(all_nodes):
    from comfy_extras import nodes_upscale_model as module

    sizes = []

    class Double:
        scale = 2

        def __call__(self, x):
            sizes.append(x.shape[-1])
            if x.shape[-1] > 128:
                raise torch.OutOfMemoryError("too large")
            return torch.nn.functional.interpolate(x, scale_factor=2)

    out = module.upscale(Double(), torch.rand(1, 3, 130, 300))
    assert out.shape == (1, 3, 260, 600) and max(sizes) > 128 and sizes[-1] <= 128
    Double.__call__ = lambda self, x: (_ for _ in ()).throw(torch.OutOfMemoryError("never"))
    with pytest.raises(torch.OutOfMemoryError):
        module.upscale(Double(), torch.rand(1, 3, 8, 8))


def test_models_photographed_in_the_page(all_nodes, folders):
    (folders / "input/3d/toys").mkdir(parents=True)
    for name in ("toys/a.glb", "b.OBJ", "notes.txt"):
        (folders / "input/3d" / name).write_bytes(b"x")
    assert all_nodes["Load3D"].INPUT_TYPES()["required"]["model_file"][0] == ["3d/b.OBJ", "3d/toys/a.glb"]
    assert all_nodes["Load3DAnimation"].INPUT_TYPES()["required"]["model_file"][0] == ["3d/toys/a.glb"]
    Image.new("RGBA", (6, 4), (255, 0, 0, 128)).save(folders / "temp/shot.png")
    shots = {**dict.fromkeys(("image", "mask", "normal", "lineart"), "shot.png [temp]"), "camera_info": {"fov": 1}}
    out = run(all_nodes, "Load3D", model_file="3d/b.OBJ", image=shots, width=6, height=4)
    assert out[0].shape == (1, 4, 6, 3) and out[1].shape == (1, 4, 6) and out[2] == "3d/b.OBJ" and out[5] == {"fov": 1}
    assert len(run(all_nodes, "Load3DAnimation", model_file="3d/toys/a.glb", image=shots, width=6, height=4)) == 6
    with pytest.raises(ValueError, match="took no picture of 3d/b.OBJ"):
        run(all_nodes, "Load3D", model_file="3d/b.OBJ", image={}, width=6, height=4)
    for name in ("Preview3D", "Preview3DAnimation"):
        assert run(all_nodes, name, model_file="m.glb", camera_info=1) == {"ui": {"result": ["m.glb", 1]}}


def test_training_pictures(all_nodes, tiny, tiny_folder):
    folder = tiny_folder / "input/set/2_cats"
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "red").save(folder / "a.png")
    Image.new("RGB", (4, 4), "blue").save(folder / "b.png")
    (folder / "a.txt").write_text("a cat\n")
    node = all_nodes["LoadImageSetFromFolderNode"]
    assert "set" in node.INPUT_TYPES()["required"]["folder"][0]
    for method in ("Stretch", "Crop", "Pad"):
        images = run(all_nodes, "LoadImageSetFromFolderNode", folder="set", resize_method=method)[0]
        assert images.shape == (4, 6, 8, 3)
    with pytest.raises(ValueError, match="b.png is 4 x 4, not 8 x 6; set resize_method"):
        run(all_nodes, "LoadImageSetFromFolderNode", folder="set")
    images, conditioning = run(
        all_nodes,
        "LoadImageTextSetFromFolderNode",
        folder="set",
        clip=tiny[1],
        resize_method="Crop",
        width=16,
        height=16,
    )
    assert images.shape == (4, 16, 16, 3) and len(conditioning) == 4
    torch.testing.assert_close(conditioning[0][0], encode(all_nodes, tiny[1], "a cat")[0][0])
    (tiny_folder / "input/empty").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="holds no picture"):
        run(all_nodes, "LoadImageSetFromFolderNode", folder="empty")


def test_losses_are_plotted(all_nodes, folders):
    shown = run(all_nodes, "LossGraphNode", loss={"loss": [math.exp(-i / 9) for i in range(40)]}, filename_prefix="l")
    with Image.open(folders / "output" / shown["ui"]["images"][0]["filename"]) as picture:
        assert (np.array(picture) == (0, 0, 255)).all(-1).sum() > 300
    assert run(all_nodes, "LossGraphNode", loss={"loss": [1.0]}, filename_prefix="l")
    with pytest.raises(ValueError, match="no losses to plot"):
        run(all_nodes, "LossGraphNode", loss={}, filename_prefix="l")


def test_pictures_over_the_websocket(monkeypatch):
    import os

    import comfy.utils

    path = os.path.join(os.path.dirname(os.path.abspath(nodes.__file__)), "custom_nodes/websocket_image_save.py")
    assert asyncio.run(nodes.load_custom_node(path))
    node = nodes.NODE_CLASS_MAPPINGS.pop("SaveImageWebsocket")
    sent = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **more: sent.append(preview))
    assert node().save_images(torch.rand(2, 4, 6, 3)) == {}
    assert [(kind, picture.size, limit) for kind, picture, limit in sent] == [("PNG", (6, 4), None)] * 2


def test_parts_of_videos(all_nodes):
    sound = {"waveform": torch.arange(4000.0).view(1, 1, -1), "sample_rate": 1000}
    images = torch.arange(40.0).view(40, 1, 1, 1).expand(-1, 2, 2, 3)
    video = run(all_nodes, "CreateVideo", images=images, fps=10.0, audio=sound)[0]

    def cut(start, duration, strict=False):
        part = run(all_nodes, "Video Slice", video=video, start_time=start, duration=duration, strict_duration=strict)[
            0
        ]
        parts = part.get_components()
        return parts.images[:, 0, 0, 0].tolist(), parts.audio["waveform"][0, 0]

    frames, samples = cut(1.0, 0.5)
    assert frames == [10, 11, 12, 13, 14] and (float(samples[0]), len(samples)) == (1000.0, 500)
    assert cut(-0.3, 0.0)[0] == [37, 38, 39] and len(cut(3.5, 9.0)[0]) == 5
    for start, duration, strict in ((3.5, 9.0, True), (9.0, 1.0, False)):
        with pytest.raises(ValueError, match="the video lasts 4.000 s"):
            cut(start, duration, strict)


def test_meshes_are_saved(all_nodes, folders):
    import json
    import struct
    from types import SimpleNamespace

    points = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 2, 0]]])
    mesh = SimpleNamespace(vertices=points, faces=torch.tensor([[[0, 1, 2]]]))
    shown = run(all_nodes, "SaveGLB", mesh=mesh, filename_prefix="mesh/x", prompt={"1": {}})["ui"]["3d"][0]
    data = (folders / "output/mesh" / shown["filename"]).read_bytes()
    magic, version, length, size, _ = struct.unpack("<4sIIII", data[:20])
    assert (magic, version, length) == (b"glTF", 2, len(data)) and size % 4 == 0
    scene = json.loads(data[20 : 20 + size])
    assert scene["asset"]["extras"]["prompt"] == '{"1": {}}' and scene["accessors"][0]["max"] == [1, 2, 0]
    binary = data[28 + size :]
    assert np.frombuffer(binary[:36], "<f4").tolist() == points.flatten().tolist()
    assert np.frombuffer(binary[36:48], "<u4").tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="nothing to save"):
        run(all_nodes, "SaveGLB", mesh=SimpleNamespace(vertices=points[:, :0], faces=mesh.faces), filename_prefix="x")
