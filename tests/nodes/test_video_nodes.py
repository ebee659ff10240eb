"""Nodes of video models: what they write into conditionings and latents."""

from __future__ import annotations

import math

import pytest
import torch

import comfy.latent_formats

GREY = 0.5


class FramesVAE:
    """Encodes frames to their means over 8 x 8 pixels; latent frame i is the last frame that it stands for."""

    def __init__(self, channels: int = 16, cell: int = 8, step: int = 4) -> None:
        self.latent_channels, self.cell, self.step = channels, cell, step
        self.downscale_index_formula = (step, cell, cell)

    def spacial_compression_encode(self) -> int:
        return self.cell

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        frames, height, width, _ = pixels.shape
        rows, cols = height // self.cell, width // self.cell
        mean = pixels.reshape(frames, rows, self.cell, cols, self.cell, -1).mean(dim=(2, 4, 5))
        return mean[:: self.step][None, None].repeat(1, self.latent_channels, 1, 1, 1)


PROMPT = [[torch.zeros((1, 3, 8)), {}]]
SIZE = {"width": 32, "height": 48, "length": 9, "batch_size": 2}


def fields(conditioning):
    assert len(conditioning) == 1
    return conditioning[0][1]


def run(name, *args, **kwargs):
    import comfy_extras.nodes_lt as lt
    import comfy_extras.nodes_wan as wan

    node = getattr(wan, name, None) or getattr(lt, name)
    return node.execute(*args, **kwargs).args


def test_a_video_from_its_first_frames():
    start = torch.ones((5, 48, 32, 3))
    positive, negative, latent = run("WanImageToVideo", PROMPT, PROMPT, FramesVAE(), **SIZE, start_image=start)
    assert latent["samples"].shape == (2, 16, 3, 6, 4) and not latent["samples"].any()
    known, mask = (fields(positive)[name] for name in ("concat_latent_image", "concat_mask"))
    assert known[0, 0, :, 0, 0].tolist() == [1.0, 1.0, GREY]
    assert mask[0, 0, :, 0, 0].tolist() == [0.0, 0.0, 1.0]
    assert fields(negative).keys() == {"concat_latent_image", "concat_mask"}
    assert fields(run("WanImageToVideo", PROMPT, PROMPT, None, **SIZE)[0]) == {}


def test_a_video_between_two_frames():
    one = torch.ones((1, 48, 32, 3))
    positive, _, _ = run(
        "WanFirstLastFrameToVideo", PROMPT, PROMPT, FramesVAE(), **SIZE, start_image=one, end_image=one * 0
    )
    mask = fields(positive)["concat_mask"]
    assert mask.shape == (1, 4, 3, 6, 4)
    # the first latent frame is the first frame, the last frame is the last part of the last latent frame
    assert mask[0, :, :, 0, 0].T.tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert fields(positive)["concat_latent_image"][0, 0, :, 0, 0].tolist() == [1.0, GREY, 0.0]


def test_controls_and_starts_are_channels():
    control, start = torch.ones((9, 48, 32, 3)), torch.full((1, 48, 32, 3), 0.25)
    positive, _, _ = run(
        "WanFunControlToVideo", PROMPT, PROMPT, FramesVAE(), **SIZE, start_image=start, control_video=control
    )
    known = fields(positive)["concat_latent_image"]
    empty = comfy.latent_formats.Wan21().process_out(torch.zeros((1, 16, 1, 1, 1)))
    assert known.shape == (1, 32, 3, 6, 4) and torch.equal(known[:, :16], torch.ones_like(known[:, :16]))
    assert (known[:, 16:, 0] == 0.25).all() and torch.equal(known[:, 16:, 1:2, :1, :1], empty)
    positive, _, latent = run(
        "Wan22FunControlToVideo", PROMPT, PROMPT, FramesVAE(48, 16), **SIZE, ref_image=start, control_video=control
    )
    assert latent["samples"].shape == (2, 48, 3, 3, 2)
    assert fields(positive)["concat_mask_index"] == 48 and len(fields(positive)["reference_latents"]) == 1


def test_vace_controls_are_chained():
    video, masks = torch.ones((5, 48, 32, 3)), torch.zeros((5, 48, 32))
    masks[:, :24] = 1.0
    vae = FramesVAE()
    first = run("WanVaceToVideo", PROMPT, PROMPT, vae, **SIZE, strength=0.5, control_video=video, control_masks=masks)
    positive, negative, latent, trim = run(
        "WanVaceToVideo", *first[:2], vae, **SIZE, strength=2.0, reference_image=video[:1]
    )
    assert trim == 1 and latent["samples"].shape == (2, 16, 4, 6, 4) and first[2]["samples"].shape[2] == 3
    found = fields(positive)
    assert found["vace_strength"] == [0.5, 2.0] and fields(negative)["vace_strength"] == [0.5, 2.0]
    control, places = found["vace_frames"][0], found["vace_mask"][0]
    assert control.shape == (1, 32, 3, 6, 4) and places.shape == (1, 64, 3, 6, 4)
    # where the mask is 0 the video is kept, where it is 1 it is to change; after the control's end all may change
    assert control[0, 0, 0, :, 0].tolist() == [GREY] * 3 + [1.0] * 3
    assert control[0, 16, 0, :, 0].tolist() == [1.0] * 3 + [GREY] * 3
    assert places[0, :, 0, 0].all() and not places[0, :, 0, 5].any() and places[0, :, 2].all()
    assert found["vace_frames"][1].shape[2] == 4 and not found["vace_mask"][1][:, :, 0].any()


def test_camera_subjects_and_known_frames():
    one = torch.ones((1, 48, 32, 3))
    rays = torch.zeros((1, 24, 3, 48, 32))
    positive, _, _ = run(
        "WanCameraImageToVideo", PROMPT, PROMPT, FramesVAE(), **SIZE, start_image=one, camera_conditions=rays
    )
    assert fields(positive)["camera_conditions"] is rays and fields(positive)["concat_mask"].shape == (1, 4, 3, 6, 4)
    positive, text, without, latent = run(
        "WanPhantomSubjectToVideo", PROMPT, PROMPT, FramesVAE(), **SIZE, images=one.repeat(2, 1, 1, 1)
    )
    assert fields(positive)["time_dim_concat"].shape == (1, 16, 2, 6, 4)
    assert torch.equal(fields(text)["time_dim_concat"], fields(positive)["time_dim_concat"])
    assert not torch.equal(fields(without)["time_dim_concat"], fields(positive)["time_dim_concat"])
    (out,) = run("Wan22ImageToVideoLatent", FramesVAE(48, 16), **{**SIZE, "height": 64}, start_image=one)
    assert out["samples"].shape == (2, 48, 3, 4, 2) and (out["samples"][:, :, 0] == 1).all()
    assert out["noise_mask"][0, 0, :, 0, 0].tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["v1 (concat)", "v2 (replace)", "custom"])
def test_hunyuan_video_from_a_picture(kind):
    from comfy_extras.nodes_hunyuan import HunyuanImageToVideo

    one = torch.ones((1, 48, 32, 3))
    positive, out = HunyuanImageToVideo().encode(PROMPT, FramesVAE(), **SIZE, guidance_type=kind, start_image=one)
    wanted = {
        "v1 (concat)": {"concat_latent_image", "concat_mask"}, "v2 (replace)": {"guiding_frame_index"},
        "custom": {"ref_latent"},
    }  # fmt: skip
    assert fields(positive).keys() == wanted[kind]
    assert ("noise_mask" in out) == (kind == "v2 (replace)") == bool(out["samples"].any())


def test_ltx_schedule_and_guides():
    (sigmas,) = run("LTXVScheduler", 20, 2.05, 0.95, True, 0.1)
    assert len(sigmas) == 21 and abs(sigmas[0] - 1) < 1e-6 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()
    assert sigmas[-2].item() == pytest.approx(0.1, abs=1e-6)
    (plain,) = run("LTXVScheduler", 4, 2.05, 0.95, False, 0.1, {"samples": torch.zeros((1, 128, 1, 32, 32))})
    power = math.exp(0.95)  # 1024 tokens: the base shift
    assert plain[1].item() == pytest.approx(power / (power + 1 / 0.75 - 1), rel=1e-5)
    places = torch.tensor([[[0, 0, 8, 8]] * 3])
    guided = [[PROMPT[0][0], {"keyframe_idxs": places}]]
    latent = {"samples": torch.zeros((1, 128, 5, 1, 2)), "noise_mask": torch.ones((1, 1, 5, 1, 1))}
    positive, _, out = run("LTXVCropGuides", guided, PROMPT, latent)
    assert out["samples"].shape[2] == out["noise_mask"].shape[2] == 3 and fields(positive)["keyframe_idxs"] is None
    assert run("LTXVCropGuides", PROMPT, PROMPT, latent)[2] is latent
    known = run("LTXVImgToVideo", PROMPT, PROMPT, FramesVAE(128, 32, 8), torch.ones((1, 64, 64, 3)), 64, 64, 17, 1, 0.8)
    assert known[2]["noise_mask"][0, 0, :, 0, 0].tolist() == pytest.approx([0.2, 1.0, 1.0])


def test_ltx_guides_are_tokens_beside_the_video():
    vae = FramesVAE(128, 32, 8)
    latent = {"samples": torch.zeros((2, 128, 5, 2, 3))}
    ones = torch.ones((20, 40, 50, 3))  # 17 frames of them are used: three latent frames
    positive, negative, out = run("LTXVAddGuide", PROMPT, PROMPT, vae, latent, ones, 12, 0.75)
    # begins at frame 9, the second latent frame: two latent frames beside the video, and the third in it
    places = fields(positive)["keyframe_idxs"]
    assert places.shape == (1, 3, 2 * 2 * 3) and torch.equal(places, fields(negative)["keyframe_idxs"])
    assert places[0, 0].unique().tolist() == [9, 17] and places[0, 2].unique().tolist() == [0, 32, 64]
    assert places[0, :, 4].tolist() == [9, 32, 32]
    assert out["samples"].shape == (2, 128, 7, 2, 3)
    assert out["samples"][0, 0, :, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert out["noise_mask"][0, 0, :, 0, 0].tolist() == [1, 1, 1, 1, 0.25, 0.25, 0.25]
    assert not latent["samples"].any()
    # a picture at the last frame, and nothing in front of it is a single frame
    again, _, two = run("LTXVAddGuide", positive, negative, vae, out, ones[:1], -1, 1.0)
    places = fields(again)["keyframe_idxs"]
    assert places.shape[2] == 18 and places[0, 0, 12:].unique().tolist() == [32]
    assert two["samples"].shape[2] == 8 and two["noise_mask"][0, 0, 7, 0, 0] == 0
    _, _, cropped = run("LTXVCropGuides", again, again, two)
    assert cropped["samples"].shape[2] == cropped["noise_mask"].shape[2] == 5
    whole, _, _ = run("LTXVAddGuide", PROMPT, PROMPT, vae, latent, ones, 0, 1.0)
    assert fields(whole)["keyframe_idxs"][0, 0].unique().tolist() == [0, 1]  # the first is one frame
    with pytest.raises(ValueError, match="17 frames at frame 33 ends after the video, which has 33"):
        run("LTXVAddGuide", PROMPT, PROMPT, vae, latent, ones, 40, 1.0)


def test_pictures_as_a_video_keeps_them():
    picture = torch.rand((1, 1, 6, 3), generator=torch.Generator().manual_seed(0))
    picture = torch.nn.functional.interpolate(picture.movedim(-1, 1), (33, 50), mode="bilinear").movedim(1, -1)
    some, more = (run("LTXVPreprocess", picture, loss)[0] for loss in (20, 50))
    assert some.shape == more.shape == (1, 32, 50, 3)
    losses = [(kept - picture[:, :32]).abs().mean() for kept in (some, more)]
    assert 0 < losses[0] < losses[1] < 0.2 and torch.equal(some, run("LTXVPreprocess", picture, 20)[0])
    assert run("LTXVPreprocess", picture, 0)[0] is picture


def test_paths_of_a_camera():
    from comfy_extras import nodes_camera_trajectory as camera

    still, *_ = camera.WanCameraEmbedding.execute("Static", 32, 16, 9).args
    assert still.shape == (1, 24, 3, 16, 32)
    # nothing moves: no moments, and the same unit directions in every frame
    assert not still[:, :12].any() and torch.equal(still[:, :, 0], still[:, :, 2])
    assert torch.allclose(still[0, 12::4].square().sum(0), torch.ones((3, 16, 32)))
    assert abs(still[0, 20, 0, 7:9, 15:17].mean()) > 0.9  # the middle looks ahead
    moved, *_ = camera.WanCameraEmbedding.execute("Pan Right", 32, 16, 8, speed=2.0).args
    assert moved.shape[2] == 2 and not moved[0, :12, 0].any() and moved[0, :12, 1].any()
    path = camera.poses("ClockWise (CW)", 4, 1.0)
    assert torch.allclose(path[3, :3, :3] @ path[3, :3, :3].T, torch.eye(3, dtype=torch.float64))
    assert math.acos(float(path[3, 0, 0])) == pytest.approx(3 / 4 * math.pi / 3)
