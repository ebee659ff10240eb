"""What the contract promises on shards, as functions of a denoiser call; each gives the whole result on every rank.

`case(call)` is run with a serial call and with one that has a token plan. `test_contract.py` compares.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

import comfy.ldm.flux.layers as layers
from comfy.ldm import dit
from comfy.ldm.modules import kernels
from comfy.ldm.modules.attention import AttentionSpec, attention, meet

from .tiny import inputs, tiny_flux

HEADS = 4


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def split_heads(tokens, heads=HEADS):
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def two_streams(call, text=7, picture=20, batch=2):
    """A state with streams `txt` and `img` of 96 channels and a per-token modulation of `img`."""
    modulation = dit.TokenAxis(draw(batch, picture, 96, seed=3), ("img",), 1)
    streams = {"txt": draw(batch, text, 96, seed=1), "img": draw(batch, picture, 96, seed=2)}
    return dit.DiTState(streams, {"modulation": modulation}).shard(call.plan)


def answer(state, name, out):
    """The whole of one stream's attention output [B, L, C]."""
    return state.with_stream(name, out).whole(name)


def mask_within_one_stream(call):
    state = two_streams(call)
    x = split_heads(state.streams["img"])
    spec = AttentionSpec(HEADS, state.tokens("img"), mask=draw(20, 20))
    return answer(state, "img", attention(x, x, x, spec, call))


def joint_mask_per_head(call):
    state = two_streams(call)
    x = split_heads(state.joint())
    spec = AttentionSpec(HEADS, state.tokens(), mask=draw(2, HEADS, 27, 27) > -0.5)
    return state.with_joint(attention(x, x, x, spec, call)).whole("txt", "img")


def cross_attention_to_another_stream(call):
    state = two_streams(call)
    q, kv = split_heads(state.streams["img"]), split_heads(state.streams["txt"])
    spec = AttentionSpec(HEADS, state.tokens("img"), state.tokens("txt"))
    return answer(state, "img", attention(q, kv, kv, spec, call))


def cross_attention_with_mask_of_keys(call):
    state = two_streams(call)
    q, kv = split_heads(state.streams["img"]), split_heads(state.streams["txt"])
    mask = (torch.arange(7) % 3 != 1).expand(2, 1, 7)
    spec = AttentionSpec(HEADS, state.tokens("img"), state.tokens("txt"), mask=mask)
    return answer(state, "img", attention(q, kv, kv, spec, call))


def cross_attention_to_a_whole_prompt(call):
    """Keys every rank has: nothing travels, and masks are cut by query."""
    state = two_streams(call)
    q, kv = split_heads(state.joint()), split_heads(draw(2, 9, 96, seed=4))
    spec = AttentionSpec(HEADS, state.tokens(), dit.Tokens((9,)), mask=draw(27, 9))
    return state.with_joint(attention(q, kv, kv, spec, call)).whole("txt", "img")


def whole_queries_to_shards(call):
    state = two_streams(call)
    q, kv = split_heads(draw(2, 5, 96, seed=4)), split_heads(state.joint())
    return attention(q, kv, kv, AttentionSpec(HEADS, dit.Tokens((5,)), state.tokens()), call)


def _grouped(call, heads, shared, **more):
    state = two_streams(call)
    x = split_heads(state.streams["img"], heads)
    kv = x[:, :shared] * 0.5
    spec = AttentionSpec(heads, state.tokens("img"), kv_heads=shared, **more)
    return answer(state, "img", attention(x, kv, kv, spec, call))


def fewer_key_heads(call):
    return _grouped(call, 4, 2)


def fewer_key_heads_unevenly_dealt(call):
    return _grouped(call, 12, 4)


def one_key_head(call):
    return _grouped(call, 4, 1)


def one_head(call):
    return _grouped(call, 1, 1)


def one_head_causal(call):
    return _grouped(call, 1, 1, causal=True)


def causal(call):
    return _grouped(call, 4, 4, causal=True)


def causal_with_mask(call):
    return _grouped(call, 4, 2, causal=True, mask=draw(20, 20))


def causal_over_two_streams(call):
    state = two_streams(call)
    x = split_heads(state.joint())
    spec = AttentionSpec(HEADS, state.tokens(), causal=True)
    return state.with_joint(attention(x, x, x, spec, call)).whole("txt", "img")


def causal_keys_of_another_stream(call):
    state = two_streams(call)
    q, kv = split_heads(state.streams["img"]), split_heads(state.streams["txt"])
    spec = AttentionSpec(HEADS, state.tokens("img"), state.tokens("txt"), causal=True)
    return answer(state, "img", attention(q, kv, kv, spec, call))


def _hiding_mask(call, hidden, dtype):
    state = two_streams(call)
    x = split_heads(state.streams["img"])
    mask = draw(2, 1, 20, 20) > -0.5
    mask[0, :, 3] = False
    mask[..., hidden] = False
    added = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    spec = AttentionSpec(HEADS, state.tokens("img"), mask=mask if dtype == torch.bool else added)
    return answer(state, "img", attention(x, x, x, spec, call))


def keys_of_a_rank_are_hidden(call):
    """A query that sees no key of some ranks, and one that sees none at all."""
    return _hiding_mask(call, slice(0, 11), torch.bool)


def keys_of_a_rank_are_hidden_by_addition(call):
    return _hiding_mask(call, slice(9, 20), torch.float32)


def modulation_by_token(call):
    """A tensor with a declared token axis follows its stream's shards, and is whole for foreign code."""
    state = two_streams(call)
    state = state.with_stream("img", state.streams["img"] * (1 + state.local("modulation")))
    return state.whole("img") + state.value("modulation")


def skip_stack(call):
    state = two_streams(call)
    state = state.with_skip("img").with_stream("img", state.streams["img"] * 2).with_skip("img")
    top, state = state.without_skip()
    below, state = state.without_skip()
    return state.with_stream("img", top - below + state.streams["img"]).whole("img")


def work_between_moments(call):
    """A block may compute between sending and attending, and between sending back and the result."""
    state = two_streams(call)
    x = split_heads(state.streams["img"])
    meeting = meet(AttentionSpec(HEADS, state.tokens("img")), call)
    meeting.send(x, x, x)
    aside = state.streams["img"].square()
    meeting.attend()
    meeting.send_back()
    aside = aside + 1
    return answer(state, "img", meeting.result().transpose(1, 2).flatten(2) + aside)


def keys_in_parts(call):
    """Log-sum-exp of attentions over parts of the keys merges them exactly, without overflow for large scores."""
    q, k, v = (split_heads(draw(2, 20, 96, seed=s)) for s in (1, 2, 3))
    for scale, tolerance in ((1000.0, 1e-2), (1.0, 1e-5)):
        keys = torch.cat((k[:, :, :7], k[:, :, 7:] * scale), dim=2)
        parts = [kernels.run(q, keys[:, :, a:b], v[:, :, a:b], None, True) for a, b in ((0, 7), (7, 9), (9, 20))]
        merged, sums = functools.reduce(lambda before, part: kernels.merge(*before, *part), parts)
        torch.testing.assert_close(sums, kernels.run(q, keys, v, None, True)[1], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(merged, kernels.run(q, keys, v)[0], rtol=tolerance, atol=tolerance)
    masked, lse = kernels.run(q, k, v, draw(20, 20), True)
    torch.testing.assert_close(masked, kernels.run(q, k, v, draw(20, 20))[0], rtol=1e-5, atol=1e-5)
    return merged


def replaced_block_adds_a_text_token(call):
    def more(args, extra):
        out = extra["original_block"](args)
        return {"img": out["img"], "txt": torch.cat((out["txt"], out["txt"][:, :1]), 1)}

    def no_block(args, extra):
        return {"img": args["img"] * 1.5}

    replace = {("double_block", 1): more, **{("single_block", i): no_block for i in range(3)}}
    options = call.within({"patches_replace": {"dit": replace}})
    return tiny_flux()(**inputs(9, 13, 11), transformer_options=options)


def replaced_attention_gets_options(call):
    """A replaced attention sees the options dict of the call, on one rank and on many, and may write to it."""
    before, seen = layers.attention, []

    def mine(q, k, v, pe, mask=None, transformer_options=None):
        assert transformer_options["mark"] == 1
        transformer_options["count"] = transformer_options.get("count", 0) + 1
        seen.append(transformer_options)
        return before(q, k, v, pe=pe, mask=mask) * 1.1

    options = call.within({"mark": 1})
    layers.attention = mine
    try:
        out = tiny_flux()(**inputs(9, 13, 11), transformer_options=options)
    finally:
        layers.attention = before
    assert all(o is options for o in seen)
    if call.plan is None or call.plan.index < HEADS:
        assert options["count"] == 5
    return out


def changed_vector_in_a_replaced_block(call):
    """Modulations computed beforehand are not used where a patch gives the block another vector."""

    def other(args, extra):
        return extra["original_block"]({**args, "vec": args["vec"] * 0.5})

    options = call.within({"patches_replace": {"dit": {("single_block", 1): other, ("double_block", 0): other}}})
    return tiny_flux()(**inputs(9, 13, 11), transformer_options=options)


def modulation_ranges(call):
    """`modulation_dims` name ranges of whole streams."""
    network = tiny_flux()
    img, txt, vec = draw(1, 20, 96), draw(1, 7, 96, seed=1), draw(1, 2, 96, seed=2)
    pe = network.pe_embedder(torch.arange(81.0).view(1, 27, 3) % 9)
    dims = [(0, 6, 0), (6, None, 1)]
    img, txt = network.double_blocks[0](
        img, txt, vec, pe, modulation_dims_img=dims, modulation_dims_txt=dims, transformer_options=call.within({})
    )
    return network.single_blocks[0](torch.cat((txt, img), 1), vec, pe, modulation_dims=dims)


def picture_before_text(call):
    """A double block whose joint attention has the picture first (HunyuanVideo)."""
    network = tiny_flux()
    img, txt, vec = draw(2, 20, 96), draw(2, 7, 96, seed=1), draw(2, 96, seed=2)
    pe = network.pe_embedder(torch.arange(81.0).view(1, 27, 3) % 9)
    block = network.double_blocks[0]
    block.flipped_img_txt = True
    mask = draw(2, 27, 27, seed=5)
    return torch.cat(block(img, txt, vec, pe, attn_mask=mask, transformer_options=call.within({})), dim=1)


def layers_are_named(call):
    """Strategies that keep keys and values between calls know the layer."""
    names = []

    class Watching:
        """A plan that notes the layer of each attention."""

        def __init__(self, plan):
            self._plan = plan

        def __getattr__(self, name):
            return getattr(self._plan, name)

        def meet(self, spec, compute, in_order):
            names.append(spec.layer)
            return self._plan.meet(spec, compute, in_order)

    if call.plan is None:
        return tiny_flux()(**inputs(9, 13, 11))
    watched = dataclasses.replace(call, plan=Watching(call.plan))
    out = tiny_flux()(**inputs(9, 13, 11), transformer_options=watched.within({}))
    assert names == [f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(3)]
    return out


def blocks_in_slices(call):
    """A pipeline stage is a slice of the blocks: two slices in turn are the whole."""
    network, values = tiny_flux(), inputs(9, 13, 11)
    blocks = network.block_list()

    def forward_orig(img, img_ids, txt, txt_ids, timesteps, y, guidance=None, control=None, transformer_options=None,
                     attn_mask=None):  # fmt: skip
        call = dit.call_of(transformer_options)
        state = network.embed(img, img_ids, txt, txt_ids, timesteps, y, guidance, call)
        for part in (blocks[:1], blocks[1:3], blocks[3:]):
            state = dit.run_blocks(network, state, call, part)
        return network.head(state)

    network.forward_orig = forward_orig
    out = network(**values, transformer_options=call.within({}))
    torch.testing.assert_close(out, tiny_flux()(**values), rtol=1e-4, atol=1e-5)
    return out


def hooked_block(call):
    network = tiny_flux()

    def centred(module, args, out):
        return out - out.mean(dim=1, keepdim=True)

    network.single_blocks[1].register_forward_hook(centred)
    return network(**inputs(9, 13, 11), transformer_options=call.within({}))


def around_blocks(call):
    """What surrounds blocks on shards: a step cache that skips one."""
    names = []

    def cache(block, state, run):
        names.append(block.name)
        return state if block.name == "double_blocks.1" else run(state)

    call = dataclasses.replace(call, around=(cache,))
    out = tiny_flux()(**inputs(9, 13, 11), transformer_options=call.within({}))
    assert names == [f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(3)]
    return out


CASES = [
    mask_within_one_stream, joint_mask_per_head, cross_attention_to_another_stream, cross_attention_with_mask_of_keys,
    cross_attention_to_a_whole_prompt, whole_queries_to_shards, fewer_key_heads, fewer_key_heads_unevenly_dealt,
    one_key_head, one_head, one_head_causal, causal, causal_with_mask, causal_over_two_streams,
    causal_keys_of_another_stream, keys_of_a_rank_are_hidden, keys_of_a_rank_are_hidden_by_addition,
    modulation_by_token, skip_stack, work_between_moments, keys_in_parts, replaced_block_adds_a_text_token,
    replaced_attention_gets_options, changed_vector_in_a_replaced_block, modulation_ranges, picture_before_text,
    layers_are_named, blocks_in_slices, hooked_block, around_blocks,
]  # fmt: skip
