"""VAEs for which no figures were recorded: LTX-Video's and HunyuanImage 2.1's, against torch's own layers and invariants."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from comfy.ldm.hunyuan_video import folding_vae
from comfy.ldm.lightricks.vae import causal_video_autoencoder as ltx
from comfy.vae import VAE
from tests.tiny_families import TINY
from tests.tiny_models import random_weights
from tests.tiny_vaes import folding_config, ltx_config, network

LTX = ["ltx 0.9.0", "ltx 0.9.1", "ltx 0.9.5"]
CAUSAL = [*LTX, "refiner"]


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_order_of_folded_places():
    """LTX-Video: channel, frame, row, column. HunyuanImage: frame, row, column, channel."""
    x = draw(2, 3, 4, 6, 8)
    for stride in ((2, 2, 2), (1, 2, 2), (2, 1, 1)):
        sizes = dict(zip("pqr", stride))
        want = rearrange(x, "b c (t p) (h q) (w r) -> b (c p q r) t h w", **sizes)
        assert torch.equal(ltx.fold(x, stride), want) and torch.equal(ltx.unfold(want, stride), x)
    for time in (1, 2):
        want = rearrange(x, "b c (t p) (h q) (w r) -> b (p q r c) t h w", p=time, q=2, r=2)
        assert torch.equal(folding_vae.fold(x, time), want) and torch.equal(folding_vae.unfold(want, time), x)


@pytest.mark.parametrize("kind", CAUSAL)
def test_later_frames_change_no_earlier_latents(kind):
    net = network(kind)
    if kind == "refiner":  # the attention in its middle sees all frames
        net.encoder.mid.attn_1.proj_out.weight.zero_()
    video = draw(1, 3, 17, 64, 64).clamp(-1, 1)
    whole = net.encode(video)
    assert whole.shape[2] == 3
    changed = torch.cat((video[:, :, :9], -video[:, :, 9:]), dim=2)
    close(net.encode(changed)[:, :, :2], whole[:, :, :2])
    close(net.encode(video[:, :, :9]), whole[:, :, :2])
    assert not torch.allclose(net.encode(changed)[:, :, 2], whole[:, :, 2], atol=1e-3)
    assert net.decode(whole).shape == video.shape
    with pytest.raises(ValueError, match="1, 9, 17"):
        net.encode(video[:, :, :12])


def test_pieces_of_the_refiner_are_the_whole_clip():
    net = network("refiner")
    x, encoder, decoder = draw(1, 3, 9, 16, 16), net.encoder, net.decoder
    parts = [encoder.conv_in, *folding_vae._stages(encoder.down)]
    middle = encoder._through(encoder.mid.parts(), encoder._through(parts, x, {}), {})
    close(encoder(x), encoder._out(middle, {}) + folding_vae._means(middle, encoder.moments))
    z = draw(1, 4, 5, 2, 3)
    middle = decoder._through(decoder.mid.parts(), decoder.conv_in(z, {}) + z.repeat_interleave(2, dim=1), {})
    close(decoder(z), decoder._out(decoder._through(folding_vae._stages(decoder.up), middle, {}), {}))
    # latents come in pairs, of which the first is doubled
    packed, mean = net.encode(x), encoder(x).chunk(2, dim=1)[0]
    assert packed.shape == (1, 8, 2, 2, 2) and torch.equal(packed[:, :4, 0], packed[:, 4:, 0])
    assert torch.equal(packed[:, 4:, 1], mean[:, :, 2]) and torch.equal(packed[:, :4, 1], mean[:, :, 1])
    assert torch.equal(net.decode(packed), decoder(mean))


def test_a_residual_block_of_ltx():
    block = ltx.ResnetBlock3D(4, 6, timed=False)
    for parameter in block.parameters():
        parameter.data = draw(*parameter.shape, seed=parameter.numel())
    x = draw(1, 4, 3, 5, 6)

    def norm(v):
        return v / (v.pow(2).mean(dim=1, keepdim=True) + 1e-8).sqrt()

    def conv(v, layer, before, after):
        v = torch.cat([v[:, :, :1]] * before + [v] + [v[:, :, -1:]] * after, dim=2)
        return F.conv3d(v, layer.conv.weight, layer.conv.bias, padding=(0, 1, 1))

    assert block.norm3 is not None and block.conv_shortcut is not None
    wide = F.layer_norm(x.movedim(1, -1), (4,), block.norm3.norm.weight, block.norm3.norm.bias, 1e-6).movedim(-1, 1)
    for causal, ends in ((True, (2, 0)), (False, (1, 1))):
        h = conv(F.silu(norm(conv(F.silu(norm(x)), block.conv1, *ends))), block.conv2, *ends)
        want = F.conv3d(wide, block.conv_shortcut.weight, block.conv_shortcut.bias) + h
        close(block(x, ltx._Context(causal)), want, 1e-4)


def test_time_and_noise_of_ltx():
    """A block that knows the time scales its input by what is made of it, and adds noise that is equal in all frames."""
    block = ltx.UNetMidBlock3D(4, 1, timed=True, noise=True, padding="zeros")
    for parameter in block.parameters():
        parameter.data = torch.zeros(parameter.shape)
    inner, x = block.res_blocks[0], draw(1, 4, 3, 5, 6)
    context = ltx._Context(False, torch.zeros(1, 256))
    assert torch.equal(block(x, context), x)
    inner.per_channel_scale2.data = torch.arange(4.0).reshape(4, 1, 1)
    added = block(x, ltx._Context(False, torch.zeros(1, 256))) - x
    close(added[:, 2], 2 * added[:, 1], 1e-4)
    close(added[:, :, 0], added[:, :, 2], 1e-4)
    assert not added[:, 0].any() and added[:, 1].std() > 0.5
    inner.per_channel_scale2.data.zero_()
    inner.conv2.conv.weight.data[:, :, 1, 1, 1] = torch.eye(4)
    # rows of the table: shift and scale before the first convolution, then before the second
    inner.scale_shift_table.data[2], inner.scale_shift_table.data[3] = 0.5, 2.0
    close(block(x, context), x + F.silu(torch.tensor(0.5)), 1e-4)


@pytest.mark.parametrize("kind", LTX)
def test_files_of_ltx(kind):
    """Sizes are read from the weights; what they do not show, from the metadata."""
    version = LTX.index(kind)
    weights = network(kind).state_dict()
    assert ltx.config_from_state_dict(weights, {}) == ltx_config(version)
    assert ltx.ratios(ltx_config(version)) == (8, 32)
    blocks = [["res_x", 1], ["compress_all", {"residual": False}], ["compress_all", {"residual": True}], ["compress_all", 1]]
    told = {"decoder_blocks": blocks, "causal_decoder": True}
    vae = VAE(sd=dict(weights), metadata={"config": json.dumps({"vae": told})})
    ups = [up.residual for up in vae.first_stage_model.decoder.up_blocks if hasattr(up, "residual")]
    assert ups == [False, True, False] and vae.first_stage_model.decoder.causal
    assert vae.downscale_index_formula == (8, 32, 32) and vae.working_dtypes == [torch.bfloat16, torch.float32]
    weights["per_channel_statistics.channel"] = torch.zeros(16)  # files have more statistics than are needed
    assert VAE(sd=weights).latent_channels == 16
    missing = {key: value for key, value in weights.items() if key != "decoder.conv_in.conv.bias"}
    with pytest.raises(ValueError, match="lacks 1 weights, first decoder.conv_in.conv.bias"):
        VAE(sd=missing)


def test_names_of_weights_of_ltx():
    """As the files of 0.9.0 and 0.9.1 have them."""
    plain, timed = ({*network(kind).state_dict()} for kind in LTX[:2])
    assert plain >= {
        "encoder.conv_in.conv.weight", "encoder.down_blocks.0.res_blocks.0.conv1.conv.weight",
        "encoder.down_blocks.1.conv.weight", "encoder.down_blocks.2.conv_shortcut.weight",
        "encoder.down_blocks.2.norm3.norm.bias", "decoder.up_blocks.1.conv.conv.bias", "decoder.conv_out.conv.bias",
        "per_channel_statistics.mean-of-means", "per_channel_statistics.std-of-means",
    }  # fmt: skip
    assert timed >= {
        "decoder.timestep_scale_multiplier", "decoder.last_time_embedder.timestep_embedder.linear_1.weight",
        "decoder.last_scale_shift_table", "decoder.up_blocks.0.time_embedder.timestep_embedder.linear_2.bias",
        "decoder.up_blocks.0.res_blocks.1.scale_shift_table", "decoder.up_blocks.2.res_blocks.0.per_channel_scale2",
    }  # fmt: skip


@pytest.mark.parametrize("video", [True, False])
def test_files_of_hunyuan_image(video):
    weights = network("refiner" if video else "hunyuan image").state_dict()
    assert folding_vae.config_from_state_dict(weights) == folding_config(video)
    vae = VAE(sd=weights)
    pictures = draw(2, 34, 50, 3).sigmoid()
    latent = vae.encode(pictures)
    if video:  # a batch of pictures is one of videos of a frame
        assert latent.shape == (2, 8, 1, 4, 6) and vae.not_video and vae.latent_channels == 8
        close(latent[1:], vae.encode(pictures[1:]))
        assert vae.decode(latent).shape == (2, 1, 32, 48, 3)
    else:
        assert latent.shape == (2, 4, 8, 12) and vae.video is None and vae.spacial_compression_encode() == 4
        assert vae.decode(latent).shape == (2, 32, 48, 3)
        assert vae.decode_tiled(latent, tile_x=8, tile_y=8, overlap=2).shape == (2, 32, 48, 3)


@pytest.mark.parametrize("kind", ["ltx 0.9.0", "ltx 0.9.5", "refiner"])
def test_tiles_give_the_whole(kind):
    """One tile is the whole; where no other tile reaches, a tile is what it is alone."""
    vae = VAE(sd=network(kind).state_dict())
    cell = vae.spacial_compression_decode()
    latent = draw(1, vae.latent_channels, 3, 5, 4)
    video = vae.decode(latent)
    assert video.shape == (1, 17, 5 * cell, 4 * cell, 3)
    close(vae.decode_tiled(latent, tile_x=4, tile_y=5, overlap=2, tile_t=3, overlap_t=1), video)
    tiled = vae.decode_tiled(latent, tile_x=4, tile_y=4, overlap=2, tile_t=2, overlap_t=1)
    if vae.video.kind.noise == 0:
        close(tiled[:, :1, : 2 * cell], vae.decode(latent[:, :, :2, :4])[:, :1, : 2 * cell], 1e-4)
    assert torch.equal(video, vae.decode(latent))  # noise is the same each time
    frames = draw(1, 9, 3 * cell, 2 * cell, 3).sigmoid()
    tiled = vae.encode_tiled(frames, tile_x=3 * cell, tile_y=3 * cell, overlap=cell, tile_t=9, overlap_t=1)
    close(tiled, vae.encode(frames))


def test_the_noise_that_decoders_with_a_time_expect():
    vae = VAE(sd=network("ltx 0.9.5").state_dict())
    latent = draw(1, 16, 2, 1, 2)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    want = vae.first_stage_model.decode(latent * 0.975 + noise * 0.025, 0.05)
    close(vae.decode(latent), (want.movedim(1, -1) / 2 + 0.5).clamp(0, 1))
    other = vae.first_stage_model.decode(latent, 0.5)
    assert not torch.allclose(other, vae.first_stage_model.decode(latent, 0.05), atol=1e-3)


@pytest.mark.parametrize("family, kind", [("ltxv", "ltx 0.9.1"), ("hunyuan_image", "hunyuan image")])
def test_whole_checkpoints_bring_their_vae(family, kind):
    """From a latent of the model's size to pictures, through nodes."""
    import comfy.sd
    import nodes

    weights = {f"model.diffusion_model.{k}": v for k, v in random_weights(TINY[family].shapes(), 1).items()}
    weights |= {f"vae.{key}": value for key, value in network(kind).state_dict().items()}
    model, clip, vae, _ = comfy.sd.load_state_dict_guess_config(weights)
    assert clip is None and vae is not None and vae.latent_channels in (4, 16)
    shape = (1, vae.latent_channels, 2, 2, 3) if vae.video else (1, vae.latent_channels, 4, 6)
    (pictures,) = nodes.VAEDecode().decode(vae, {"samples": draw(*shape)})
    assert pictures.shape == ((9, 64, 96, 3) if vae.video else (1, 16, 24, 3))
    (latent,) = nodes.VAEEncode().encode(vae, pictures)
    assert latent["samples"].shape == shape
