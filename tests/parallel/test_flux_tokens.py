"""Flux on shards of its tokens equals Flux on whole tokens, also with everything custom nodes do to it."""

from __future__ import annotations

import types

import pytest
import torch

import comfy.ldm.flux.layers as layers
from comfy.ldm import dit
from comfy.taco_dit.core.plan import ParallelDims
from comfy.taco_dit.parallel.exchange import CollectiveExchange, Here
from comfy.taco_dit.parallel.ring_parallel import native_plan
from comfy.taco_dit.parallel.sequence_parallel import HeadMeeting, UlyssesPlan

from .ranks import run_ranks
from .tiny import inputs, tiny_flux

# Latent sizes of 72x104 pixels and others whose tokens no degree divides; prompts of 1 to 13 tokens.
SHAPES = [(9, 13, 11, 1), (10, 14, 7, 2), (5, 3, 1, 1), (4, 4, 13, 3)]


def _plain(network, arguments, options):
    return network(**arguments, transformer_options=options)


def _control(network, arguments, options):
    generator = torch.Generator().manual_seed(7)
    tokens = -(-arguments["x"].shape[2] // 2) * -(-arguments["x"].shape[3] // 2)
    batch = arguments["x"].shape[0]
    residuals = {
        "input": [torch.randn((batch, tokens, 96), generator=generator), None],
        "output": [None, torch.randn((batch, max(1, tokens - 2), 96), generator=generator)],
    }
    return network(**arguments, control=residuals, transformer_options=options)


def _mask(network, arguments, options):
    x = arguments["x"]
    tokens = -(-x.shape[2] // 2) * -(-x.shape[3] // 2) + arguments["context"].shape[1]
    mask = torch.rand((x.shape[0], tokens, tokens), generator=torch.Generator().manual_seed(3))
    return network(**arguments, attention_mask=mask * 4, transformer_options=options)


def _references(network, arguments, options):
    reference = torch.randn((arguments["x"].shape[0], 16, 6, 5), generator=torch.Generator().manual_seed(5))
    return network(**arguments, ref_latents=[reference], transformer_options=options)


def _replaced_forward(network, arguments, options):
    """A custom node's forward_orig: embeds, loops over the blocks with keywords, decides by token statistics."""

    def forward_orig(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None, control=None,
                     transformer_options={}, attn_mask=None):  # noqa: B006  # fmt: skip
        img = self.img_in(img)
        vec = self.time_in(layers.timestep_embedding(timesteps, 256).to(img.dtype))
        vec = vec + self.guidance_in(layers.timestep_embedding(guidance, 256).to(img.dtype)) + self.vector_in(y)
        txt = self.txt_in(txt)
        pe = self.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        scale = 1.0 + (img.abs().mean() / txt.abs().mean()).item()
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=pe)
        return self.final_layer(img[:, txt.shape[1] :] * scale, vec)

    network.forward_orig = types.MethodType(forward_orig, network)
    return _plain(network, arguments, options)


def _replaced_block(network, arguments, options):
    """patches_replace: a block skipped, one run on changed tokens that depend on all tokens."""
    seen = []

    def skip(args, extra):
        seen.append(args["img"].shape[1])
        return {"img": args["img"], "txt": args["txt"]}

    def mean_free(args, extra):
        args = dict(args)
        args["img"] = args["img"] - args["img"].mean(dim=1, keepdim=True)
        return extra["original_block"](args)

    options["patches_replace"] = {"dit": {("double_block", 0): skip, ("single_block", 1): mean_free}}
    out = _plain(network, arguments, options)
    tokens = -(-arguments["x"].shape[2] // 2) * -(-arguments["x"].shape[3] // 2)
    assert seen == [tokens], "a foreign block must see every picture token"
    return out


def _shorter_blocks(network, arguments, options):
    """The list of blocks replaced by one entry that runs them all, as some packs do."""

    class All(torch.nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.blocks = blocks

        def forward(self, img, txt, vec, pe, attn_mask=None, transformer_options=None):
            for block in self.blocks:
                img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
            return img * (1 + img.mean()), txt

    network.double_blocks = torch.nn.ModuleList([All(network.double_blocks)])
    return _plain(network, arguments, options)


def _swapped_class(network, arguments, options):
    class Other(layers.SingleStreamBlock):
        def forward(self, x, vec, pe, attn_mask=None, **kwargs):
            return super().forward(x + x.mean(dim=1, keepdim=True), vec, pe, attn_mask)

    network.single_blocks[1].__class__ = Other
    return _plain(network, arguments, options)


def _post_input(network, arguments, options):
    """A patch that adds text tokens after the input layers."""

    def more_text(args):
        args["txt"] = torch.cat((args["txt"], args["txt"][:, :1] * 0.5), dim=1)
        args["txt_ids"] = torch.cat((args["txt_ids"], args["txt_ids"][:, :1]), dim=1)
        return args

    def after(args):
        return {"img": args["img"] * (1 + args["img"].std()), "txt": args["txt"]}

    options["patches"] = {"post_input": [more_text], "double_block": [after]}
    return _plain(network, arguments, options)


def _attention_override(network, arguments, options):
    """An override that treats the first tokens differently: it must see all tokens in order."""
    text = arguments["context"].shape[1]

    def override(original, q, k, v, heads, **kwargs):
        v = v.clone()
        v[:, :, :text] *= 0.25
        return original(q, k, v, heads, **kwargs)

    options["optimized_attention_override"] = override
    return _plain(network, arguments, options)


def _replaced_attention(network, arguments, options):
    """flux.layers.attention replaced by assignment; it rotates by itself and damps the first tokens."""
    before = layers.attention
    text = arguments["context"].shape[1]

    def mine(q, k, v, pe, mask=None, transformer_options=None):
        v = v.clone()
        v[:, :, :text] *= 0.25
        return before(q, k, v, pe=pe, mask=mask)

    layers.attention = mine
    try:
        return _plain(network, arguments, options)
    finally:
        layers.attention = before


CASES = [
    _plain, _control, _mask, _references, _replaced_forward, _replaced_block, _shorter_blocks, _swapped_class,
    _post_input, _attention_override, _replaced_attention,
]  # fmt: skip


def _compare(manager, shapes, rings):
    """Largest relative deviation of each case, shape and ring degree from the serial run on the same rank."""
    world = manager.world_size
    dims = [ParallelDims(ulysses_degree=world // ring, ring_degree=ring) for ring in rings]
    plans = {ring: native_plan(manager.data.group, d, manager.rank) for ring, d in zip(rings, dims)}
    worst = {}
    for case in CASES:
        for height, width, text, batch in shapes:
            arguments = inputs(height, width, text, batch)
            with torch.inference_mode():
                serial = case(tiny_flux(), arguments, {})
                for ring, plan in plans.items():
                    call = dit.DenoiserCall(plan)
                    with dit.fallback_call(call):
                        parallel = case(tiny_flux(), arguments, call.within({}))
                    deviation = ((parallel - serial).abs().max() / serial.abs().max()).item()
                    worst[case.__name__, height, width, ring] = deviation
    return worst


@pytest.mark.parametrize("world_size,rings", [(2, [1, 2]), (3, [1, 3]), (4, [1, 2]), (5, [1, 5])])
def test_shards_equal_whole(world_size, rings):
    """Every case at every shape, by Ulysses and on a ring, with more ranks than heads too (5 ranks, 4 heads)."""
    shapes = SHAPES if world_size < 5 else SHAPES[:1]
    for worst in run_ranks(world_size, _compare, shapes, rings):
        assert len(worst) == len(CASES) * len({s[:2] for s in shapes}) * len(rings)
        for case, deviation in worst.items():
            assert deviation < 1e-5, f"{case}: {deviation}"


def _without_exchange(manager):
    group = manager.data.group(range(manager.world_size))
    arguments = inputs(9, 13, 11)

    class Broken(HeadMeeting):
        def send(self, q, k, v):
            self._inputs = q, k, v

        def attend(self):
            self._out = self._compute(*self._inputs, None)

        def send_back(self):
            self._returning = Here(self._out)

    class BrokenPlan(UlyssesPlan):
        def meet(self, spec, compute, in_order):
            return Broken(self, spec, compute, in_order)

    options = dit.DenoiserCall(BrokenPlan(CollectiveExchange(group))).within({})
    with torch.inference_mode():
        serial = tiny_flux()(**arguments)
        broken = tiny_flux()(**arguments, transformer_options=options)
    return ((broken - serial).abs().max() / serial.abs().max()).item()


def test_comparison_notices_a_missing_exchange():
    """The tests above can fail: without the exchange of attention the results differ plainly."""
    assert min(run_ranks(2, _without_exchange)) > 1e-2
