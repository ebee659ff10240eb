"""Nodes of Wan for sound, motion and paths of points: what they write into conditionings and latents."""

from __future__ import annotations

import json

import pytest
import torch

import comfy.latent_formats
from comfy_extras import nodes_wan
from comfy_nodes import wan_motion, wan_sound
from tests.nodes.test_video_nodes import PROMPT, SIZE, FramesVAE, fields

GREY = 0.5


def run(name, *args, **kwargs):
    return getattr(nodes_wan, name).execute(*args, **kwargs).args


def encoded(layers=2, states=100, channels=3, samples=32000):
    """An encoder's output whose states count up in time."""
    rising = torch.arange(states, dtype=torch.float32)[None, :, None].expand(1, -1, channels)
    return {"encoded_audio_all_layers": tuple(rising + i for i in range(layers)), "audio_samples": samples}


def test_states_at_another_rate():
    states = torch.arange(5.0)[None, :, None]
    assert wan_sound.at_rate(states, 50, 100)[0, :, 0].tolist() == pytest.approx([i * 4 / 9 for i in range(10)])
    # 2 s of sound: 60 states at 30 a second; frames at 16 a second take the nearest, and nothing follows the sound
    layers = torch.cat(encoded()["encoded_audio_all_layers"])
    chosen = wan_sound.states_of_frames(layers, 0, 12)
    steady = wan_sound.at_rate(layers, 50, 30)
    assert chosen.shape == (1, 2, 3, 12)
    assert torch.equal(chosen[0, :, :, :5], steady[:, [0, 2, 4, 6, 8]].transpose(1, 2))
    last = wan_sound.states_of_frames(layers, 24, 12)
    assert last[0, 0, 0, :8].all() and not last[..., 8:].any()
    assert wan_sound.states_of_frames(layers, 36, 12).shape[-1] == 0


def test_a_video_that_follows_a_sound():
    vae, one = FramesVAE(), torch.ones((1, 48, 32, 3))
    given = {"ref_image": one * 0.25, "control_video": one.repeat(5, 1, 1, 1), "ref_motion": one.repeat(9, 1, 1, 1)}
    positive, negative, latent = run(
        "WanSoundImageToVideo", PROMPT, PROMPT, vae, **SIZE, audio_encoder_output=encoded(), **given
    )
    found, without = fields(positive), fields(negative)
    assert latent["samples"].shape == (2, 16, 3, 6, 4)
    assert found["audio_embed"].shape == (1, 2, 3, 12) and not without["audio_embed"].any()
    assert (found["reference_latents"][0] == 0.25).all() and len(found["reference_latents"]) == 1
    before = found["reference_motion"]
    assert before.shape == (1, 16, 19, 6, 4)  # the last of 73 frames; grey before there is a video
    assert before[0, 0, :, 0, 0].tolist() == [GREY] * 16 + [1.0] * 3
    control = found["control_video"]
    empty = comfy.latent_formats.Wan21().process_out(torch.zeros((1, 16, 1, 1, 1)))
    assert (control[:, :, :2] == 1).all() and torch.equal(control[:1, :, 2:, :1, :1], empty)
    # the next clip: the sound goes on, and the video before is the latent so far
    video = {"samples": torch.full((2, 16, 3, 6, 4), 2.0)}
    positive, negative, latent = run(
        "WanSoundImageToVideoExtend", PROMPT, PROMPT, vae, 5, video, audio_encoder_output=encoded()
    )
    assert latent["samples"].shape == (2, 16, 2, 6, 4)
    assert (fields(positive)["reference_motion"] == 2).all() and "reference_latents" not in fields(positive)
    layers = torch.cat(encoded()["encoded_audio_all_layers"])
    assert torch.equal(fields(positive)["audio_embed"], wan_sound.states_of_frames(layers, 12, 8))


def test_a_subject_that_follows_a_sound():
    vae, one = FramesVAE(), torch.ones((1, 48, 32, 3))
    positive, negative, latent = run("WanHuMoImageToVideo", PROMPT, PROMPT, None, **SIZE)
    assert fields(positive)["audio_embed"].shape == (2, 3, 8, 5, 1280) and not fields(positive)["audio_embed"].any()
    assert fields(positive)["reference_latents"][0].shape == (2, 16, 1, 6, 4)
    heard = encoded(layers=33, channels=1280)
    positive, negative, latent = run(
        "WanHuMoImageToVideo", PROMPT, PROMPT, vae, **SIZE, audio_encoder_output=heard, ref_image=one
    )
    states = fields(positive)["audio_embed"]
    assert states.shape == (1, 3, 8, 5, 1280) and not fields(negative)["audio_embed"].any()
    assert (fields(positive)["reference_latents"][0] == 1).all() and not fields(negative)["reference_latents"][0].any()
    # layers in groups of eight, and the last: their means differ by as many as the layers count up
    apart = (states[0, 1, 1:, 1:] - states[0, 1, 1:, :-1])[..., 0]  # there is nothing before the first state
    assert torch.allclose(apart, torch.tensor([8.0, 8.0, 8.0, 4.5]), atol=1e-3) and not states[0, 1, 0].any()
    frames = torch.arange(1.0, 12)[:, None, None]
    found = wan_sound.windows(frames, 9)[..., 0, 0]
    assert found.tolist() == [[0, 0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert wan_sound.windows(frames[:6], 9)[2, :, 0, 0].tolist() == [4, 5, 6, 0, 0, 0, 0, 0]


def test_a_character_in_the_motion_of_a_video():
    vae, one = FramesVAE(), torch.ones((1, 48, 32, 3))
    video = (torch.arange(12.0) / 20)[:, None, None, None].expand(-1, 48, 32, 3)
    mask = torch.zeros((12, 48, 32))
    mask[:, :24] = 1.0
    positive, negative, latent, trim_latent, trim_image, offset = run(
        "WanAnimateToVideo", PROMPT, PROMPT, vae, **SIZE, continue_motion_max_frames=5, video_frame_offset=7,
        reference_image=one, face_video=video, pose_video=video, background_video=video, character_mask=mask,
        continue_motion=one.repeat(9, 1, 1, 1) * 0.75,
    )  # fmt: skip
    found = fields(positive)
    # the last five frames are there again: the clip begins at frame 2 of the videos, and the first five are cut off
    assert (trim_latent, trim_image, offset) == (1, 5, 11)
    assert latent["samples"].shape == (2, 16, 4, 6, 4)
    known, places = found["concat_latent_image"], found["concat_mask"]
    assert known[0, 0, :, 0, 0].tolist() == pytest.approx([1.0, 0.75, 0.75, 10 / 20])
    assert places.shape == (1, 4, 4, 6, 4) and not places[:, :, 0].any()
    # from frame 5 on the mask's upper half is to be made, and what the videos have no frames for
    assert places[0, :, 1:, 0, 0].T.tolist() == [[0] * 4, [0, 1, 1, 1], [1] * 4]
    assert places[0, :, 1:, 5, 0].T.tolist() == [[0] * 4, [0] * 4, [0, 1, 1, 1]]
    assert found["pose_video_latent"][0, 0, :, 0, 0].tolist() == pytest.approx([2 / 20, 6 / 20, 10 / 20])
    face = found["face_video_pixels"]
    assert face.shape == (1, 3, 9, 512, 512) and face[0, 0, :, 0, 0].tolist() == pytest.approx(
        [i / 10 - 1 for i in range(2, 11)]
    )
    assert (fields(negative)["face_video_pixels"] == -1).all()
    # a pose that ends stays; one that has ended before the clip is none
    few = {"continue_motion_max_frames": 5, "video_frame_offset": 8}
    positive, *_ = run("WanAnimateToVideo", PROMPT, PROMPT, vae, **SIZE, **few, pose_video=video, face_video=video[:8])
    assert fields(positive)["pose_video_latent"][0, 0, :, 0, 0].tolist() == pytest.approx([8 / 20, 11 / 20, 11 / 20])
    assert "face_video_pixels" not in fields(positive)


def test_pictures_whose_points_move():
    size = {"width": 64, "height": 64, "length": 81, "batch_size": 1}
    path = [{"x": 4 + 0.4 * i, "y": 4} for i in range(121)]  # to the right along the upper edge
    places, visible = wan_motion.track_points([path, path[:60]], 64, 64, 81)
    assert places.shape == (81, 2, 2) and visible[:, 0].eq(1).all()
    assert places[0, 0].tolist() == pytest.approx([-0.875, -0.875])
    assert visible[:, 1].tolist() == [1.0] * 40 + [-1.0] * 41
    # of each three points two are frames: 0, 1, 3, 4, 6, ...
    assert ((places[1:5, 0, 0] + 1) * 32).tolist() == pytest.approx([4.4, 5.2, 5.6, 6.4])
    start = torch.zeros((1, 64, 64, 3))
    start[:, :8, :8] = 1.0  # what moves
    positive, negative, latent = run(
        "WanTrackToVideo", PROMPT, PROMPT, FramesVAE(), json.dumps(path), **size, temperature=220.0, topk=2,
        start_image=start,
    )  # fmt: skip
    known, mask = fields(positive)["concat_latent_image"], fields(positive)["concat_mask"]
    assert known.shape == (1, 16, 21, 8, 8) and mask.shape == (1, 4, 21, 8, 8)
    assert not mask[:, :, 0].any()  # the first frame is known
    kind = comfy.latent_formats.Wan21()
    bright, grey = (kind.process_in(torch.full((1, 16, 1, 1, 1), value))[0, 0] for value in (1.0, GREY))
    seen = kind.process_in(known)[0, 0, 20, 0]  # the upper row of the last frame
    assert seen.argmax().item() == 6 if bright > grey else seen.argmin().item() == 6
    assert mask[0, 0, 20, 0].argmin().item() == 6 and mask[0, 0, 20, 7].min() > 0.99
    assert (
        fields(
            run("WanTrackToVideo", PROMPT, PROMPT, None, "[]", **size, temperature=1.0, topk=1, start_image=start)[0]
        )
        == {}
    )
    assert wan_motion.read_tracks("[{'x': 1, 'y': 2}]") == [[{"x": 1, "y": 2}]]
    with pytest.raises(ValueError, match="tracks are not JSON"):
        wan_motion.read_tracks("[{x}]")
    with pytest.raises(ValueError, match="list of points with x and y"):
        wan_motion.read_tracks('[[{"x": 1}]]')


def test_windows_in_frames_of_the_video():
    from comfy_extras import nodes_context_windows as context

    class Model:
        def __init__(self):
            self.model_options = {}

        def clone(self):
            return Model()

        def add_wrapper_with_key(self, *args):
            """Not called here."""

    made = context.WanContextWindowsManualNode.execute(Model(), 81, 30, "standard_static", 1, False, "pyramid").args[0]
    handler = made.model_options["context_handler"]
    assert (handler.context_length, handler.context_overlap, handler.dim) == (21, 8, 2)
