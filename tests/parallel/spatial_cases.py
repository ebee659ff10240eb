"""Networks on rows of pictures, run on one rank of several and compared with the whole picture."""

from __future__ import annotations

import contextlib
import functools
import time

import torch
import torch.nn.functional as F
from torch import nn

import comfy.model_management
import nodes
from comfy.ldm.dit_state import DenoiserCall, Tokens
from comfy.ldm.models.autoencoder import AutoencoderKL, config_from_state_dict
from comfy.ldm.modules import attention as attention_module
from comfy.sd import VAE
from comfy.taco_dit import runtime
from comfy.taco_dit.core import spread
from comfy.taco_dit.core.config_manager import ParallelConfig, TacoConfig
from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
from comfy.taco_dit.core.lockstep import RankLockstep
from comfy.taco_dit.parallel import rows_tensor, spatial_parallel
from comfy.taco_dit.parallel.rows_tensor import RowsTensor, whole
from comfy.taco_dit.parallel.spatial_parallel import RowsPlan, run_by_rows
from tests import tiny_models, tiny_vaes

CPU = torch.device("cpu")
SIZES = [(1, 9, 7), (2, 5, 6), (1, 4, 5), (1, 3, 4), (1, 2, 3), (2, 1, 2)]  # pictures, rows and columns of latents


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def deviation(one, many):
    assert one.shape == many.shape and one.dtype == many.dtype, (one.shape, many.shape)
    return ((many.double() - one.double()).abs().max() / one.double().abs().max().clamp_min(1e-12)).item()


@functools.cache
def tiny_vae():
    return tiny_models.random_weights(tiny_models.vae_shapes(), 3)


def tiny_network():
    config, embed_dim = config_from_state_dict(tiny_vae())
    network = AutoencoderKL(config, embed_dim)
    network.load_state_dict(tiny_vae())
    return network.eval()


def in_place(x):
    y = x * 1
    y += 1
    y[:, :2] = 0
    y[:, :, 0] = 2
    y[..., 3:].mul_(3)
    return F.silu(y, inplace=True)


def self_attention(x):
    """As a UNet's transformer block writes it."""
    batch, channels, height, width = x.shape
    tokens = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    tokens = F.layer_norm(tokens, (channels,))
    q, k, v = (tokens @ draw(channels, 8, seed=s) for s in (5, 6, 7))
    q, k, v = (t.view(batch, height * width, 2, 4).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    scores = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    out = (out + scores).transpose(1, 2).reshape(batch, height * width, 8)
    out = F.linear(out, draw(channels, 8, seed=8))
    return x + out.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def attention_seam(x):
    """Attention as networks call it, under both of its names."""
    tokens = x.flatten(2).movedim(1, 2)
    q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in (tokens, tokens * 2, tokens + 1))
    out = attention_module.attention(q, k, v, attention_module.AttentionSpec(2, Tokens((q.shape[2],))), DenoiserCall())
    out = out + attention_module.optimized_attention(tokens, tokens, tokens, 4)
    return out.movedim(2, 1).reshape(x.shape)


def cross_attention(x):
    tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
    mask = draw(tokens.shape[2], 5, seed=3) > -1
    mask[:, 0] = True
    out = F.scaled_dot_product_attention(tokens, draw(1, 1, 5, x.shape[1], seed=2), draw(1, 1, 5, 6, seed=4), mask)
    return out.squeeze(1).movedim(2, 1).unflatten(2, x.shape[2:])


def causal_video(x):
    """Frames before rows: a causal convolution over three axes, with frames of its own in front."""
    clip = (
        x.unsqueeze(2).expand(-1, -1, 3, -1, -1)
        if not isinstance(x, RowsTensor)
        else torch.cat([x.unsqueeze(2)] * 3, 2)
    )
    clip = torch.cat([clip[:, :, :1], clip[:, :, :1], clip], dim=2)
    clip = F.conv3d(F.pad(clip, (1, 1, 1, 1, 0, 0)), draw(4, x.shape[1], 3, 3, 3))
    first, rest = clip.split([1, 2], dim=2)
    return torch.cat([rest, first], dim=2)[:, :, -1]


def uneven_up(x):
    """A UNet's way back to an odd size, and the skip connection from there."""
    small = F.conv2d(x, draw(x.shape[1], x.shape[1], 3, 3), stride=2, padding=1)
    large = F.interpolate(small, size=x.shape[2:], mode="nearest")
    return torch.cat([large, x], dim=1)


def reduced(x):
    """Norms and sums along channels, as video VAEs have them."""
    y = (
        F.normalize(x, dim=1)
        + x.pow(2).mean(1, keepdim=True)
        + x.sum(1)[:, None]
        + x.mean(dim=(1, 3))[:, None, :, None]
    )
    return y * x.unbind(1)[0].unsqueeze(1) + x.select(3, 2).unsqueeze(-1) + x.new_full((1, 1), 2.0)


def broadcast(x):
    """With scales by row, by column, of one row, and by channel from a reduction over the whole picture."""
    height, width = x.shape[2:]
    gain = x.mean(dim=(2, 3), keepdim=True)
    return torch.addcmul(x * draw(height, 1) - draw(1, width), draw(x.shape[0], 1, height, width), x) * gain + draw(
        1, 1
    )


def foreign(x):
    """Things that need the whole picture."""
    y = torch.fft.fft2(x).real.cumsum(2)
    assert bool(torch.isfinite(x).all()) and x.max().item() > 0
    return y.roll(1, 2).flip(2) + x[:, :, x.shape[2] // 2 :].mean(2, keepdim=True)


def conv(kernel, **settings):
    return lambda x: F.conv2d(x, draw(6, x.shape[1], *kernel), draw(6, seed=2), **settings)


# name: (function, whether its result is dealt)
OPERATIONS = {
    "conv 3": (conv((3, 3), padding=1), True), "conv 1": (conv((1, 1)), True),
    "conv 5": (conv((5, 3), padding=(2, 1)), True), "conv without padding": (conv((3, 3)), True),
    "conv much padding": (conv((3, 3), padding=3), True), "conv stride 2": (conv((3, 3), stride=2, padding=1), True),
    "conv stride 2, even": (conv((4, 4), stride=2, padding=1), True),
    "conv stride 3": (conv((3, 3), stride=3), True), "conv dilated": (conv((3, 3), padding=2, dilation=2), True),
    "conv same": (conv((3, 3), padding="same"), False),
    "downsampler": (lambda x: conv((3, 3), stride=2)(F.pad(x, (0, 1, 0, 1))), True),
    "padded above": (lambda x: F.pad(x, (0, 0, 2, 0), value=3.0), True),
    "reflected columns": (lambda x: F.pad(x, (1, 1, 0, 0), mode="reflect"), True),
    "reflected rows": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), False),
    "group norm": (lambda x: F.group_norm(x + 100, 4, draw(8), draw(8, seed=2)), True),
    "group norm plain": (lambda x: nn.GroupNorm(2, 8, affine=False)(x), True),
    "up 2": (lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"), True), "uneven up": (uneven_up, True),
    "exact up": (lambda x: F.interpolate(x, size=(13, 17), mode="nearest-exact"), True),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), False),
    "reduced": (reduced, True),
    "repeated": (lambda x: x.repeat_interleave(2, dim=2).repeat_interleave(3, 3), True),
    "pooled": (lambda x: F.avg_pool2d(x, 2), True), "broadcast": (broadcast, True), "in place": (in_place, True),
    "self-attention": (self_attention, True), "attention seam": (attention_seam, True), "channels last": (
        lambda x: F.group_norm(conv((3, 3), padding=1)(x.contiguous(memory_format=torch.channels_last)), 3), True
    ),
    "cross-attention": (cross_attention, True),
    "causal video": (causal_video, True), "foreign": (foreign, False),
    "half": (lambda x: (x.half().float().clamp(-1, 1), x.to(torch.float64))[1], True),
    "chunks": (lambda x: torch.cat([F.gelu(a) * b for a, b in [x.chunk(2, dim=1)]], dim=3), True),
}  # fmt: skip


def operations(group):
    """{(name, rows): (deviation, dealt as expected)} of single operations."""
    found = {}
    for name, (operation, dealt) in OPERATIONS.items():
        for rows in (11, 6, 3):
            picture = draw(2, 8, rows, 5)
            out = operation(RowsPlan(group, CPU).deal(picture))
            found[name, rows] = deviation(operation(picture), whole(out)), isinstance(out, RowsTensor) is dealt
    return found


def networks(group):
    """{(what, size): deviation} of a VAE with the real layout."""
    found, network = {}, tiny_network()
    for size in SIZES:
        pictures, height, width = size
        latent, picture = draw(pictures, 16, height, width), draw(pictures, 3, height * 8, width * 8)
        found["decode", size] = deviation(network.decode(latent), run_by_rows(network.decode, latent, group, CPU))
        many = run_by_rows(network.encode, picture, group, CPU, 8)
        found["encode", size] = deviation(network.encode(picture), many)
    found["encode", "any rows"] = deviation(network.encode(picture), run_by_rows(network.encode, picture, group, CPU))
    for kind in tiny_vaes.KINDS:
        found |= folded(kind, group)
    return found


def folded(kind, group):
    """{(what, kind): deviation} of a VAE that folds places or frames."""
    network = tiny_vaes.network(kind)
    space = {"hunyuan image": 4, "wan22": 16}.get(kind, 32 if kind.startswith("ltx") else 8)
    rows, columns = (3, 1) if space > 8 else (5, 2)
    frames = () if kind == "hunyuan image" else (9,)
    pixels = draw(1, 3, *frames, rows * space, columns * space)
    latent = network.encode(pixels)
    many = run_by_rows(network.encode, pixels, group, CPU, space)
    return {
        ("encode", kind): deviation(latent, many),
        ("decode", kind): deviation(network.decode(latent), run_by_rows(network.decode, latent, group, CPU)),
    }


def replaced_parts(group):
    """Deviations of VAEs of which a pack has replaced a module, or hooked one."""
    found, latent = {}, draw(1, 16, 7, 5)

    class Sharpened(type(tiny_network().decoder.mid.block_1)):
        def forward(self, x):
            return super().forward(x) + (x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1))

    subclassed, hooked = tiny_network(), tiny_network()
    subclassed.decoder.mid.block_1.__class__ = Sharpened
    hooked.decoder.up[1].block[0].register_forward_hook(lambda module, args, out: out - out.mean((2, 3), keepdim=True))
    for name, network in {"subclassed": subclassed, "hooked": hooked}.items():
        found[name] = deviation(network.decode(latent), run_by_rows(network.decode, latent, group, CPU))
    return found


def memory(group):
    """The largest share of a whole activation that a convolution of this rank was given."""
    shares, original = [], F.conv2d

    def counted(picture, *args):
        if isinstance(picture, RowsTensor):
            shares.append((picture.local.numel(), picture.numel()))
        return original(picture, *args)

    F.conv2d = counted
    try:
        run_by_rows(tiny_network().decode, draw(1, 16, 6, 4), group, CPU)
    finally:
        F.conv2d = original
    assert len(shares) > 20
    return max(mine / total for mine, total in shares)


# --- inside prompts ---------------------------------------------------------------------------------------------------


def through_nodes(vae):
    """{node: results}."""
    classes = nodes.NODE_CLASS_MAPPINGS
    found = {}
    for pictures in (1, 2, 3):
        samples = {"samples": draw(pictures, 16, 9, 7)}
        pixels = draw(pictures, 72, 56, 3, seed=2).sigmoid()
        found["VAEDecode", pictures] = classes["VAEDecode"]().decode(vae, samples)[0]
        found["VAEEncode", pictures] = classes["VAEEncode"]().encode(vae, pixels)[0]["samples"]
    found["VAEDecodeTiled", 1] = classes["VAEDecodeTiled"]().decode(vae, {"samples": draw(1, 16, 12, 9)}, 64, 16)[0]
    tiled = classes["VAEEncodeTiled"]().encode(vae, pixels[:1], 64, 16)
    found["VAEEncodeTiled", 1] = tiled[0]["samples"]
    mask = torch.zeros(1, 72, 56)
    mask[:, 20:40, 10:30] = 1
    found["VAEEncodeForInpaint", 1] = classes["VAEEncodeForInpaint"]().encode(vae, pixels[:1], mask)[0]["samples"]
    return found


@contextlib.contextmanager
def counted(owner, name):
    """How often a function is called inside."""
    original, calls = getattr(owner, name), []

    def count(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    setattr(owner, name, count)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


class Failing:
    """Lets a convolution of this rank raise, the `at`-th from now on."""

    def __init__(self, vae, error, at):
        self.vae, self.error, self.left = vae, error, at

    def __enter__(self):
        self.handles = [
            module.register_forward_pre_hook(self.count)
            for module in self.vae.first_stage_model.modules()
            if isinstance(module, nn.Conv2d)
        ]

    def count(self, module, args):
        self.left -= 1
        if self.left == 0:
            raise self.error

    def __exit__(self, *exc):
        for handle in self.handles:
            handle.remove()


class NoMemory(RowsPlan):
    """A plan whose rank runs out of memory at its 20th operation."""

    left = 20

    def compute(self, function, *args, **kwargs):
        def run(*args, **kwargs):
            NoMemory.left -= 1
            if NoMemory.left == 0:
                raise comfy.model_management.OOM_EXCEPTION("on purpose")
            return function(*args, **kwargs)

        return super().compute(run, *args, **kwargs)


def video_vae():
    """A tiny VAE of Wan 2.2's kind."""
    return VAE(sd=tiny_vaes.network("wan22").state_dict())


def whole_videos(vae):
    """Results for one, two and three videos at once."""
    made = [vae.decode(draw(count, 6, 2, 3, 2)) for count in (1, 2, 3)]
    return [*made, vae.encode(draw(1, 5, 48, 32, 3).sigmoid()), vae.encode(draw(2, 5, 48, 32, 3).sigmoid())]


def video_in_tiles(vae):
    """A video decoded in tiles of space and time, and encoded."""
    video = vae.decode_tiled(draw(1, 6, 3, 5, 3), tile_x=2, tile_y=2, overlap=1, tile_t=2, overlap_t=1)
    return video, vae.encode_tiled(video[0], tile_x=32, tile_y=32, overlap=16, tile_t=5, overlap_t=1)


def out_of_memory(manager, vae):
    """One rank runs out of memory: all decode in tiles. (deviation from tiles, whether it happened here, calls of tiles)"""
    latent = draw(1, 16, 9, 7)
    expected = vae._decode_tiled(latent, 64, 64, 16).movedim(1, -1)
    original = spatial_parallel.RowsPlan
    if manager.rank == manager.world_size - 1:
        spatial_parallel.RowsPlan = NoMemory
    try:
        with counted(vae, "_decode_tiled") as calls:
            got = vae.decode(latent)
    finally:
        spatial_parallel.RowsPlan = original
    return deviation(expected, got), NoMemory.left < 0, len(calls)


def spread_without_memory(manager):
    """Whether this rank hears that another ran out of memory with its items."""

    def work(item):
        if manager.rank == manager.world_size - 1:
            raise comfy.model_management.OOM_EXCEPTION("on purpose")
        return torch.zeros(2)

    try:
        spread.spread(range(5), work)
    except comfy.model_management.OOM_EXCEPTION:
        return True
    return False


def failing(manager, lockstep, vae, error):
    """Rank 1 raises in the middle of a decode; (what this rank raises, seconds until then)."""
    lockstep.begin("fails")
    begun, raised = time.monotonic(), None
    try:
        with Failing(vae, error, 9) if manager.rank == 1 else contextlib.nullcontext():
            vae.decode(draw(1, 16, 9, 7))
    except Exception as problem:
        raised = lockstep.fail(problem, "7")
    with contextlib.suppress(Exception):
        lockstep.end()
    return type(raised).__name__, time.monotonic() - begun


def prompts(manager):
    """What nodes give inside prompts of all ranks, with one rank's results beside."""
    vae = VAE(sd=dict(tiny_vae()))
    one = through_nodes(vae)
    videos = video_vae()
    video, clips = video_in_tiles(videos), whole_videos(videos)
    lockstep = RankLockstep(manager)
    lockstep.join({"rank": manager.rank, "device": "cpu", "host": "here", "pid": None})
    comfy.model_management.set_interrupt_check(lockstep.interrupt_check)
    engine = TACODiTExecutionEngine(TacoConfig(), manager, lockstep)
    found = {}
    before = runtime.active()
    runtime.activate(runtime.Runtime(engine.config, manager, lockstep, engine))
    try:
        lockstep.begin("nodes")
        with counted(spatial_parallel, "run_by_rows") as by_rows:
            found["small"] = deviation(one["VAEDecode", 1], vae.decode(draw(1, 16, 9, 7))), len(by_rows)
        spread.ROWS_FROM_PIXELS = 72 * 56
        with counted(spatial_parallel, "run_by_rows") as by_rows, counted(spread, "spread") as dealt:
            many = through_nodes(vae)
        found["nodes"] = {key: deviation(one[key], many[key]) for key in one}
        found["calls"] = len(by_rows), len(dealt)
        with counted(spread, "spread") as dealt:
            again = video_in_tiles(videos)
        found["video"] = [deviation(*pair) for pair in zip(video, again)], len(dealt)
        spread.ROWS_FROM_PIXELS = 5 * 48 * 32
        with counted(spatial_parallel, "run_by_rows") as by_rows, counted(spread, "spread") as dealt:
            again = whole_videos(videos)
        found["clips"] = [deviation(*pair) for pair in zip(clips, again)], len(by_rows), len(dealt)
        spread.ROWS_FROM_PIXELS = 72 * 56
        found["memory"] = out_of_memory(manager, vae), spread_without_memory(manager)
        off = TacoConfig(parallel=ParallelConfig(spatial_parallel=False))
        runtime.activate(runtime.Runtime(off, manager, lockstep, engine))
        with counted(spatial_parallel, "run_by_rows") as by_rows:
            found["off"] = deviation(one["VAEDecode", 1], vae.decode(draw(1, 16, 9, 7))), len(by_rows)
        runtime.activate(runtime.Runtime(engine.config, manager, lockstep, engine))
        lockstep.end()
        found["raised"] = failing(manager, lockstep, vae, ArithmeticError("on purpose"))
        cancelled = comfy.model_management.InterruptProcessingException()
        found["cancelled"] = failing(manager, lockstep, vae, cancelled)
        lockstep.begin("after")
        found["after"] = deviation(one["VAEDecode", 1], vae.decode(draw(1, 16, 9, 7)))
        lockstep.end()
    finally:
        runtime.activate(before)
    return found


def everything(manager):
    """All of the above on one rank."""
    group = manager.data.group(range(manager.world_size))
    with torch.inference_mode():
        return {
            "operations": operations(group), "networks": networks(group), "replaced": replaced_parts(group),
            "memory": memory(group), "said": sorted(rows_tensor._said), "prompts": prompts(manager),
        }  # fmt: skip
