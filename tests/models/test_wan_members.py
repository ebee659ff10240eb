"""Wan networks for sound and motion: each frame's tokens see what belongs to their frame, against plain computation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from comfy.ldm import dit
from comfy.ldm.wan import animate, frames, sound
from tests.tiny_families import TINY
from tests.tiny_models import random_weights


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(name):
    net = TINY[name].network("cpu")
    net.load_state_dict(random_weights({key: tuple(value.shape) for key, value in net.state_dict().items()}, 3))
    return net.eval().requires_grad_(False)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


X, T, TEXT = noise(1, 16, 3, 6, 8), torch.tensor([500.0]), noise(1, 4, 4096, seed=1)


def test_tokens_attend_to_their_frame_only():
    """As an attention for each frame by itself; tokens after the frames get nothing."""
    tokens, video = noise(2, 3, 5, 8, seed=2), noise(2, 3 * 4 + 5, 8)
    state = frames.with_frames(dit.DiTState({"img": video}, {}, {}), tokens, 12).shard(None)
    q, kv = noise(2, 2, 17, 4, seed=3), noise(2, 2, 15, 4, seed=4)
    got = frames.attend(q, kv, kv, 2, state, dit.call_of(None))
    by_frame, keys = (rearrange(t, "b h (f n) d -> (b f) h n d", f=3) for t in (q[:, :, :12], kv))
    want = rearrange(F.scaled_dot_product_attention(by_frame, keys, keys), "(b f) h n d -> b (f n) (h d)", b=2)
    close(got[:, :12], want)
    added = frames.add_reached(video, got, state)
    close(added[:, :12], video[:, :12] + want)
    assert torch.equal(added[:, 12:], video[:, 12:])
    with pytest.raises(ValueError, match="17 video tokens cannot belong to 3 frames"):
        frames.with_frames(dit.DiTState({"img": video}, {}, {}), tokens)


def test_s2v_takes_sound_control_reference_and_the_video_before():
    net = network("wan_s2v")
    given = {
        "audio_embed": noise(1, 3, 12, 12, seed=5), "control_video": noise(1, 16, 3, 6, 8, seed=6),
        "reference_latent": noise(1, 16, 1, 6, 8, seed=7), "reference_motion": noise(1, 16, 4, 8, 8, seed=8),
    }  # fmt: skip
    plain, every = net(X, T, TEXT), net(X, T, TEXT, **given)
    assert plain.shape == every.shape == X.shape
    for name in given:
        without = net(X, T, TEXT, **{key: value for key, value in given.items() if key != name})
        assert not torch.allclose(without, every, atol=1e-3), name
    # a sound that is too short ends in silence, and later states than the video's change nothing
    longer = torch.cat((given["audio_embed"], noise(1, 3, 12, 7)), dim=-1)
    close(net(X, T, TEXT, **{**given, "audio_embed": longer}), every)
    short = given["audio_embed"][..., :9]
    close(net(X, T, TEXT, audio_embed=short), net(X, T, TEXT, audio_embed=F.pad(short, (0, 3))))
    for layer in net.audio_injector.injector:
        layer.o.weight.zero_(), layer.o.bias.zero_()
    close(net(X, T, TEXT, audio_embed=short), plain)


def test_sound_encoder_of_s2v():
    """Weighted layers; four states make a frame; what comes later changes no earlier frame."""
    encoder = network("wan_s2v").casual_audio_encoder
    states = noise(1, 3, 12, 12, seed=5)
    tokens, vectors = encoder(states)
    assert tokens.shape == (1, 3, 3, 256) and vectors.shape == (1, 3, 256)
    close(tokens[0, :, 2], encoder.encoder.padding_tokens[0, 0].expand(3, -1))
    later = torch.cat((states[..., :5], -states[..., 5:]), dim=-1)
    close(encoder(later)[0][:, :2], tokens[:, :2])
    assert not torch.allclose(encoder(later)[0][:, 2], tokens[:, 2], atol=1e-3)
    weights = F.silu(encoder.weights)
    same = (states * weights / weights.sum()).sum(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    close(encoder(same)[1], vectors)


def test_the_video_before_is_packed_by_age():
    net = network("wan_s2v")
    latent = noise(1, 16, 30, 8, 16)
    tokens, table = net.frame_packer(latent, net)
    assert tokens.shape[1] == table.shape[1] == 4 * 8 + 2 * 4 + 4 * 1 * 2
    packer = net.frame_packer
    close(tokens[:, :32], packer.proj(latent[:, :, -1:]).flatten(2).transpose(1, 2))
    close(tokens[:, 32:40], packer.proj_2x(latent[:, :, -3:-1]).flatten(2).transpose(1, 2))
    close(tokens[:, 40:], packer.proj_4x(latent[:, :, -19:-3]).flatten(2).transpose(1, 2))
    close(table[:, :32], net.rope_encode(1, 8, 16, t_start=-1))
    close(table[:, 32:40], net.rope_encode(1, 8, 16, t_start=-3, steps_h=2, steps_w=4))
    # the last place of each axis is that of the last patch
    close(table[:, 39], net.rope_encode(1, 8, 16, t_start=-3)[:, -1])
    shorter = packer(latent[:, :, -1:], net)[0]
    close(shorter[:, :32], tokens[:, :32])
    close(shorter[:, 32:], packer(latent[:, :, -1:] * 0, net)[0][:, 32:])


def test_humo_takes_sound_and_a_picture():
    net, model = network("wan_humo"), TINY["wan_humo"].model("cpu")
    fields = {"audio_embed": noise(1, 3, 8, 1, 4), "reference_latents": [noise(1, 16, 1, 6, 8, seed=2)]}
    conds = {name: cond.cond for name, cond in model.extra_conds(noise=X, device="cpu", **fields).items()}
    concat, reference = conds["c_concat"], conds["reference_latent"]
    assert concat.shape == (1, 20, 3, 6, 8) and not concat[:, :4].any()
    assert concat[0, 4, :, 0, 0].tolist() == pytest.approx([0.8660, 1.0869, 0.8642])
    assert reference.shape == (1, 36, 1, 6, 8) and not reference[:, :16].any() and reference[:, 16:20].all()
    x = torch.cat((X, concat), dim=1)
    every = net(x, T, TEXT, audio_embed=conds["audio_embed"], reference_latent=reference)
    assert every.shape == X.shape
    assert not torch.allclose(every, net(x, T, TEXT, audio_embed=conds["audio_embed"]), atol=1e-3)
    assert not torch.allclose(every, net(x, T, TEXT, reference_latent=reference), atol=1e-3)
    silence = net(x, T, TEXT, audio_embed=conds["audio_embed"] * 0, reference_latent=reference)
    close(net(x, T, TEXT, audio_embed=conds["audio_embed"][:, :0], reference_latent=reference), silence)


def test_motion_of_a_face():
    net = network("wan_animate")
    encoder = net.motion_encoder
    pictures = noise(3, 3, 16, 16)
    motions = encoder(pictures)
    assert motions.shape == (3, 24)
    close(motions[1:2], encoder(pictures[1:2]))
    # directions are orthogonal: amounts of motion keep their length
    amounts = encoder.enc.fc(encoder.enc.net_app(pictures))
    close(motions.norm(dim=1), amounts.norm(dim=1))
    block = encoder.enc.net_app.convs[1]
    blur, conv, active = block.conv2
    x = noise(1, 4, 8, 8)
    padded = F.pad(x, (2, 2, 2, 2))
    row = (1, 3, 3, 1)
    blurred = sum(row[i] * row[j] / 64 * padded[:, :, i : i + 9, j : j + 9] for i in range(4) for j in range(4))
    close(blur(x), blurred)
    want = F.conv2d(blurred, conv.weight / (4 * 9) ** 0.5, stride=2) + active.bias
    close(block.conv2(x), torch.where(want > 0, want, 0.2 * want) * 2**0.5)
    assert block(x).shape == (1, 6, 4, 4)


def test_animate_takes_a_pose_and_a_face():
    net = network("wan_animate")
    x, pose, face = noise(1, 36, 3, 6, 8), noise(1, 16, 1, 6, 8, seed=2), noise(1, 3, 8, 16, 16, seed=3)
    plain = net(x, T, TEXT)
    assert not torch.allclose(net(x, T, TEXT, pose_latents=pose), plain, atol=1e-3)
    assert not torch.allclose(net(x, T, TEXT, face_pixel_values=face), plain, atol=1e-3)
    # the first frame is the character's picture; the motion's frames follow, as far as there are any
    added = net.patches(x, pose_latents=pose) - net.patches(x)
    assert not added[:, :, 0].any() and added[:, :, 1].any() and not added[:, :, 2].any()
    close(added[:, :, 1:2], net.pose_patch_embedding(pose))
    tokens = net.faces(face, 5)
    assert tokens.shape == (1, 5, 5, 256) and not tokens[:, 0].any() and not tokens[:, 3:].any()
    close(tokens[:, 1:3], net.face_encoder(net.motion_encoder(face[0].transpose(0, 1))[None]))
    assert [block.name for block in net.block_list()] == ["blocks.0", "face_adapter.fuser_blocks.0", "blocks.1"]


def test_blocks_that_are_called_by_foreign_code():
    """Whole in, whole out: as inside the network."""
    net = network("wan_s2v")
    given = {"audio_embed": noise(1, 3, 12, 12, seed=5), "reference_latent": noise(1, 16, 1, 6, 8, seed=7)}
    want = net(X, T, TEXT, **given)
    for module in net.modules():
        if isinstance(module, (sound.SoundAttention, animate.FaceBlock)):
            module.register_forward_hook(lambda *args: None)  # makes it foreign
    close(net(X, T, TEXT, **given), want)
    net = network("wan_animate")
    x, face = noise(1, 36, 3, 6, 8), noise(1, 3, 8, 16, 16, seed=3)
    want = net(x, T, TEXT, face_pixel_values=face)
    net.face_adapter.fuser_blocks[0].register_forward_hook(lambda *args: None)
    close(net(x, T, TEXT, face_pixel_values=face), want)
    net = network("wan_humo")
    audio = noise(1, 3, 8, 1, 4)
    want = net(x, T, TEXT, audio_embed=audio)
    net.blocks[0].register_forward_hook(lambda *args: None)
    close(net(x, T, TEXT, audio_embed=audio), want)
