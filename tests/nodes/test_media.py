"""Pictures, videos and sounds from strangers: formats, limits, links, and nothing left open."""

from __future__ import annotations

import io
import os
import re

import av
import numpy as np
import pytest
import torch
from PIL import Image

import comfy.cli_args
import folder_paths
import nodes
from comfy import media
from comfy_api.input_impl import VideoFromFile
from comfy_api.latest._audio import read_audio
from comfy_extras.nodes_train import LoadImageSetFromFolderNode, caption_of, picture_paths
from tests import attack_files


@pytest.fixture
def limits(monkeypatch):
    """`limits(max_image_frames=2)` for one test."""

    def change(**values):
        for name, value in values.items():
            monkeypatch.setattr(comfy.cli_args.args, name, value)

    return change


@pytest.fixture
def folders(tmp_path):
    base = tmp_path / "base"
    folder_paths.set_base_directory(str(base))
    for name in ("input", "output", "temp"):
        (base / name).mkdir(parents=True)
    yield base
    folder_paths.set_base_directory(None)


def saved(format, mode="RGB", **more):
    buffer = io.BytesIO()
    Image.new(mode, (6, 4), 1).save(buffer, format, **more)
    return buffer.getvalue()


@pytest.mark.parametrize("name", attack_files.PICTURES)
def test_bombs_are_refused_before_they_are_decoded(folders, name, monkeypatch):
    file, make = attack_files.PICTURES[name]
    (folders / "input" / file).write_bytes(make())

    def decoded(*arguments):
        raise AssertionError("the picture was decoded")

    monkeypatch.setattr(Image.Image, "convert", decoded)
    for node in (nodes.LoadImage().load_image, lambda image: nodes.LoadImageMask().load_image(image, "red")):
        with pytest.raises(media.MediaError, match=re.escape(file)) as raised:
            node(file)
        assert "--max-image-" in str(raised.value) or "format that is opened (PNG, " in str(raised.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO"])
def test_common_formats_are_opened(format):
    if format == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    mode = "P" if format == "GIF" else "RGB"
    with media.open_picture(io.BytesIO(saved(format, mode))) as picture:
        assert picture.size == (6, 4) and picture.format == format


@pytest.mark.parametrize("format, mode", [("EPS", "RGB"), ("PCX", "RGB"), ("TGA", "RGB"), ("SGI", "L")])
def test_other_formats_are_not(format, mode):
    with pytest.raises(media.MediaError, match=r"drawing is not a picture of a format that is opened \(PNG"), \
            media.open_picture(io.BytesIO(saved(format, mode)), "drawing"):  # fmt: skip
        pass


def test_moving_pictures_and_pages_are_batches(folders):
    for name, content in (("a.gif", attack_files.gif_frames(3, 20)), ("a.webp", attack_files.webp_frames(3, 20))):
        (folders / "input" / name).write_bytes(content)
        images, masks = nodes.LoadImage().load_image(name)
        assert images.shape == (3, 20, 20, 3) and masks.shape[0] == 3
    pages = [Image.new("RGB", size, color) for size, color in (((6, 4), 10), ((6, 4), 20), ((9, 9), 30))]
    pages[0].save(folders / "input/a.tif", save_all=True, append_images=pages[1:])
    assert nodes.LoadImage().load_image("a.tif")[0].shape == (2, 4, 6, 3)


def test_each_limit_is_named(limits):
    gif = attack_files.gif_frames(3, 20)
    for flags, words in (
        ({"max_image_pixels": 399}, "declares 20 x 20, more than 399 pixels; .* --max-image-pixels"),
        ({"max_image_frames": 2}, "more than 2 frames; .* --max-image-frames"),
        ({"max_image_gib": 3 * 400 * 15 / 2**30}, "in 3 frames, .* --max-image-gib"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in flags.items():
                patch.setattr(comfy.cli_args.args, name, value)
            with pytest.raises(media.MediaError, match=words), media.open_picture(io.BytesIO(gif), "a.gif"):
                pass
    limits(max_image_pixels=400, max_image_frames=3, max_image_gib=3 * 400 * 16 / 2**30)
    with media.open_picture(io.BytesIO(gif)) as picture:
        assert picture.n_frames == 3


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_damaged_gifs_are_counted_to_their_end(cut):
    content = attack_files.gif_frames(3, 20)[:cut]
    try:
        with media.open_picture(io.BytesIO(content)) as picture:
            assert picture.size[0] <= 20
    except (media.MediaError, OSError):
        pass


def test_gifs_of_pillow_are_counted_right():
    frames = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (9, 7, 3), np.uint8)) for i in range(5)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], loop=0, comment=b"x" * 600, duration=50)
    assert media._gif_frames(buffer, 100) == (5, 7, 9)
    assert media._gif_frames(buffer, 2)[0] == 3


def test_the_file_is_closed_also_after_an_error(folders, limits):
    Image.new("RGB", (6, 4)).save(folders / "input/a.png")
    path = str(folders / "input/a.png")

    def opened():
        return [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")
                if os.path.islink(f"/proc/self/fd/{number}")]  # fmt: skip

    with media.open_picture(path):
        assert path in opened()
    limits(max_image_pixels=1)
    with pytest.raises(media.MediaError), media.open_picture(path):
        pass
    assert path not in opened()


def test_packs_get_the_limit_of_the_flag(limits, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    limits(max_image_pixels=1000)
    media.configure()
    assert Image.MAX_IMAGE_PIXELS == 1000


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def links(folders):
    outside = folders.parent / "outside"
    outside.mkdir()
    Image.new("RGB", (6, 4)).save(outside / "secret.png")
    for name in ("input", "output", "temp"):
        os.symlink(outside, folders / name / "link")
        os.symlink(outside / "secret.png", folders / name / "link.png")
    return folders


@pytest.mark.parametrize("name", ["link.png", "link/secret.png", "link.png [output]", "link/secret.png [temp]"])
def test_links_out_of_the_folders_are_refused(links, name):
    assert nodes.LoadImage.VALIDATE_INPUTS(name) is not True
    with pytest.raises(ValueError, match="symbolic link out of"):
        nodes.LoadImage().load_image(name)
    with pytest.raises(ValueError, match="symbolic link"):
        nodes.LoadImage.IS_CHANGED(name)


def test_nothing_is_saved_through_a_link(links):
    with pytest.raises(ValueError, match="leads outside the output folder"):
        nodes.SaveImage().save_images(torch.zeros(1, 4, 4, 3), "link/stolen")
    assert os.listdir(links.parent / "outside") == ["secret.png"]


def test_folders_that_are_links_themselves_work(folders, tmp_path):
    real = tmp_path / "data"
    real.mkdir()
    Image.new("RGB", (6, 4)).save(real / "a.png")
    (folders / "input").rmdir()
    os.symlink(real, folders / "input")
    assert nodes.LoadImage().load_image("a.png")[0].shape == (1, 4, 6, 3)
    os.symlink(real / "a.png", folders / "output" / "b.png")
    assert nodes.LoadImage().load_image("b.png [output]")[0].shape == (1, 4, 6, 3), "from one of our folders to another"


def test_model_folders_may_hold_links(folders, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/x.safetensors").write_bytes(b"")
    loras = folders / "models/loras"
    loras.mkdir(parents=True)
    os.symlink(tmp_path / "models/x.safetensors", loras / "x.safetensors")
    assert folder_paths.get_full_path("loras", "x.safetensors") == str(loras / "x.safetensors")


def test_training_pictures_that_are_links_outside_are_left_out(links):
    folder = links / "input/set"
    folder.mkdir()
    os.symlink(links.parent / "outside/secret.png", folder / "a.png")
    with pytest.raises(ValueError, match="holds no picture"):
        picture_paths(str(folder))
    Image.new("RGB", (6, 4)).save(folder / "b.png")
    assert picture_paths(str(folder)) == [str(folder / "b.png")]
    (folder / "b.txt").write_text(" a caption\n")
    assert caption_of(str(folder / "b.png"), str(folder)) == "a caption"
    (folder / "b.txt").unlink()
    (links.parent / "outside/secret.txt").write_text("secret")
    os.symlink(links.parent / "outside/secret.txt", folder / "b.txt")
    assert caption_of(str(folder / "b.png"), str(folder)) == ""
    with pytest.raises(ValueError, match="symbolic link"):
        LoadImageSetFromFolderNode().load_images("link")


# ---- videos and sounds -----------------------------------------------------------------------------------------------


def video(path, frames=6, side=64, sound=False):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=10)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))


def wave(path, samples=48_000):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, samples), np.int16), "s16", "mono")
        frame.sample_rate, frame.pts = 48_000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def test_videos_and_sounds_above_the_limit_are_refused(tmp_path, limits):
    video(tmp_path / "a.mp4")
    wave(tmp_path / "a.wav")
    assert VideoFromFile(str(tmp_path / "a.mp4")).get_components().images.shape == (6, 64, 64, 3)
    assert read_audio(str(tmp_path / "a.wav"))[0].shape == (1, 48_000)
    limits(max_video_gib=6 * 64 * 64 * 12 / 2**30 - 1e-9)
    with pytest.raises(media.MediaError, match=r"a\.mp4 would take more than .* --max-video-gib"):
        VideoFromFile(str(tmp_path / "a.mp4")).get_components()
    with pytest.raises(media.MediaError, match="the video would take more"):
        VideoFromFile(io.BytesIO((tmp_path / "a.mp4").read_bytes())).get_components()
    limits(max_video_gib=100_000 / 2**30)
    with pytest.raises(media.MediaError, match=r"a\.wav would take more than"):
        read_audio(str(tmp_path / "a.wav"))
    limits(max_video_gib=None, max_image_pixels=64 * 63)
    with pytest.raises(media.MediaError, match="declares 64 x 64, more than"):
        VideoFromFile(str(tmp_path / "a.mp4")).get_components()


def test_a_video_is_refused_by_what_it_declares(tmp_path, limits, monkeypatch):
    video(tmp_path / "a.mp4")
    limits(max_video_gib=64 * 64 * 12 / 2**30)
    monkeypatch.setattr(media.DecodedBytes, "frame", lambda *arguments: pytest.fail("a frame was decoded"))
    with pytest.raises(media.MediaError, match="--max-video-gib"):
        VideoFromFile(str(tmp_path / "a.mp4")).get_components()


@pytest.mark.parametrize("name", ["a.m3u8", "a.mp4", "a.wav"])
def test_files_that_name_other_files_are_not_opened(tmp_path, name):
    wave(tmp_path / "secret.wav")
    for content in (attack_files.playlist(str(tmp_path / "secret.wav")), b"ffconcat version 1.0\nfile secret.wav\n",
                    b"v=0\nm=audio 5004 RTP/AVP 0\nc=IN IP4 127.0.0.1\n"):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(media.MediaError, match="not a video or sound of a format"):
            read_audio(str(tmp_path / name))
        with pytest.raises(media.MediaError, match="not a video or sound of a format"):
            VideoFromFile(str(tmp_path / name)).get_dimensions()
    with pytest.raises(FileNotFoundError):
        media.open_container(str(tmp_path / "none.mp4"))


def test_the_limit_of_videos_follows_the_machine(limits):
    import psutil

    limits(max_video_gib=None)
    assert media.video_bytes() == max(4 * 2**30, psutil.virtual_memory().total // 4)
    limits(max_video_gib=1.5)
    assert media.video_bytes() == 1.5 * 2**30
