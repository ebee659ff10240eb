"""UNets and video VAEs on rows of pictures, with what custom nodes do to them, compared with whole pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from comfy.ldm.hunyuan_video.vae import HunyuanVideoVAE
from comfy.ldm.wan.vae import WanVAE
from comfy.taco_dit.parallel import rows_tensor
from comfy.taco_dit.parallel.spatial_parallel import SpatialPlan, run_by_rows

from .tiny import tiny_unet

CPU = torch.device("cpu")
SIZES = [(9, 13), (5, 6), (1, 3)]  # rows and columns of latents; of one row most ranks hold nothing


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def deviation(one, many):
    assert one.shape == many.shape
    return ((many - one).abs().max() / one.abs().max()).item()


def mixed(h, options):
    """A picture with something of all its rows, as a patch of input blocks; it is also written into."""
    h[:, :1] *= 0.9
    return h + 0.1 * h.mean(dim=2, keepdim=True).roll(1, 1)


def mixed_skip(h, skip, options):
    scaled = torch.fft.ifftn(torch.fft.fftn(skip, dim=(-2, -1)) * 0.9, dim=(-2, -1)).real
    return h.flip(-2), scaled


def smaller(h, options):
    """Half the size in the middle of the network, as PatchModelAddDownscale."""
    if options["block"] == ("input", 1):
        return F.interpolate(h, scale_factor=0.5, mode="bilinear")
    return h


def as_skip(h, skip, options):
    if h.shape[-2:] != skip.shape[-2:]:
        h = F.interpolate(h, size=skip.shape[-2:], mode="bilinear")
    return h, skip


def fewer_tokens(n, context, value, extra):
    """Queries of half the tokens, which an output patch brings back (token merging)."""
    return n[:, ::2], context, value


def all_tokens(n, extra):
    rows, cols = extra["activations_shape"][-2:]
    return n.repeat_interleave(2, dim=1)[:, : rows * cols]


def other_context(n, context, value, extra):
    return (
        n + n.mean(dim=1, keepdim=True),
        torch.cat((context, context[:, :2] * 0.5), 1),
        torch.cat((value, value[:, 1:3]), 1),
    )


def replaced(q, k, v, extra):
    heads = extra["n_heads"]
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return out - 0.1 * out.cumsum(dim=1) / out.shape[1]


def override(original, q, k, v, heads, **kwargs):
    return original(q, k, v, heads, **kwargs) + 0.1 * v.mean(dim=1, keepdim=True)[..., : q.shape[-1]]


def middle(x, extra):
    return x + 0.1 * x.flip(1)


def patches(**kinds):
    return {"patches": {kind: [function] for kind, function in kinds.items()}}


CASES = {
    "plain": {},
    "input": patches(input_block_patch=mixed),
    "after skip": patches(input_block_patch_after_skip=mixed),
    "output": patches(output_block_patch=mixed_skip),
    "downscale": patches(input_block_patch=smaller, output_block_patch=as_skip),
    "token merging": patches(attn1_patch=fewer_tokens, attn1_output_patch=all_tokens),
    "prompt": patches(attn2_patch=other_context, attn2_output_patch=lambda n, extra: n * 0.9, middle_patch=middle),
    "embedding": patches(emb_patch=lambda emb, channels, options: emb * 1.1),
    "replaced": {
        "patches_replace": {
            "attn1": {("middle", 0): replaced},
            "attn2": {("input", 3): replaced, ("middle", 0): replaced},
        }
    },
    "override": {"optimized_attention_override": override},
}


def residuals(network, x):
    """What a ControlNet adds, with one that does not fit (it is left out)."""
    shapes = []

    def note(h, options):
        shapes.append(h.shape)
        return h

    network(x, *arguments(x.shape[0]), transformer_options=patches(input_block_patch=note))
    inputs = [draw(*shape, seed=i) * 0.3 for i, shape in enumerate(shapes)]
    return {"input": inputs, "middle": [draw(*shapes[-1], seed=9)], "output": [*inputs[:-1], draw(1, 2, 3, 3)]}


def arguments(batch):
    """Times, text and vector."""
    return torch.linspace(100, 900, batch), draw(batch, 7, 24, seed=2), draw(batch, 48, seed=3)


def unets(group):
    """{(case, size): deviation} of a UNet by rows."""
    network, found = tiny_unet(), {}
    called = SpatialPlan(group, CPU).around(network)
    for height, width in SIZES:
        x = draw(2, 4, height, width)
        for case, options in CASES.items():
            if case == "downscale" and height < 4:
                continue
            many = called(x, *arguments(2), transformer_options=options)
            found[case, height] = deviation(network(x, *arguments(2), transformer_options=options), many)
        control = residuals(network, x)
        one, many = (call(x, *arguments(2), control=control, transformer_options={}) for call in (network, called))
        found["control", height] = deviation(one, many)
    return found


def _weights(network):
    weights = {}
    for seed, (key, value) in enumerate(network.state_dict().items()):
        noise = draw(*value.shape, seed=seed)
        norm = value.ndim == 1 and key.endswith("weight") or key.endswith("gamma")
        weights[key] = 1 + 0.1 * noise if norm else 0.5 * noise / max(1, value[0].numel()) ** 0.5
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False).double()  # in fp32 whole pictures differ as much from exact ones


def video_vaes():
    """{kind: (network, latent channels, pixels a cell and side)}."""
    hunyuan = {"ch": 32, "in_channels": 3, "ch_mult": [1, 2, 2], "num_res_blocks": 1, "z_channels": 4, "out_ch": 3}
    wan = WanVAE(dim=8, decoder_dim=12, z_dim=6, num_res_blocks=1)
    wan22 = WanVAE(
        dim=8,
        decoder_dim=12,
        z_dim=6,
        num_res_blocks=1,
        residual=True,
        image_channels=3,
        temperal_downsample=(False, True, True),
    )
    return {
        "wan 2.1": (_weights(wan), 6, 8),
        "wan 2.2": (_weights(wan22), 6, 16),
        "hunyuan": (_weights(HunyuanVideoVAE(hunyuan)), 4, 4),
    }


def videos(group):
    """({(kind, what, rows): deviation} of video VAEs by rows, names of functions that needed whole pictures)."""
    found, before = {}, set(rows_tensor._said)
    rows_tensor._said.clear()
    for kind, (network, channels, space) in video_vaes().items():
        for rows, cols, frames in ((5, 3, 2), (2, 2, 3)):
            latent, video = (
                draw(1, channels, frames, rows, cols).double(),
                draw(1, 3, 4 * frames - 3, rows * space, cols * space).double(),
            )
            many = run_by_rows(network.decode, latent, group, CPU)
            found[kind, "decode", rows] = deviation(network.decode(latent), many)
            many = run_by_rows(network.encode, video, group, CPU, space)
            found[kind, "encode", rows] = deviation(network.encode(video), many)
    said = set(rows_tensor._said)
    rows_tensor._said.update(before)
    return found, said
