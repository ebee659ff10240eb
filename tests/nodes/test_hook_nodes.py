"""Hook nodes: their parts, and pictures made with them."""

from __future__ import annotations

import pytest
import torch

import nodes
from tests.nodes.helpers import encode, run, sample

LORA = {"lora_name": "tiny_flux_kohya.safetensors"}


def test_a_hooked_adapter_is_the_adapter(all_nodes, tiny):
    model, clip, _ = tiny
    hooks = run(all_nodes, "CreateHookLoraModelOnly", **LORA, strength_model=1.0)[0]
    positive, negative = encode(all_nodes, clip, "a tree"), encode(all_nodes, clip, "")
    hooked = run(
        all_nodes,
        "PairConditioningSetProperties",
        positive_NEW=positive,
        negative_NEW=negative,
        strength=1.0,
        set_cond_area="default",
        hooks=hooks,
    )
    by_hook = sample(all_nodes, model, clip, positive=hooked[0], negative=hooked[1])
    patched = nodes.LoraLoaderModelOnly().load_lora_model_only(model, LORA["lora_name"], 1.0)[0]
    by_loader = sample(all_nodes, patched, clip, positive=positive, negative=negative)
    torch.testing.assert_close(by_hook, by_loader, atol=2e-4, rtol=1e-4)
    plain = sample(all_nodes, model, clip)
    assert (by_hook - plain).abs().max() > 1e-3
    off = run(
        all_nodes,
        "SetHookKeyframes",
        hooks=hooks,
        hook_kf=run(all_nodes, "CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)[0],
    )[0]
    silent = run(
        all_nodes,
        "PairConditioningSetProperties",
        positive_NEW=positive,
        negative_NEW=negative,
        strength=1.0,
        set_cond_area="default",
        hooks=off,
    )
    without = sample(all_nodes, model, clip, positive=silent[0], negative=silent[1])
    torch.testing.assert_close(without, plain, atol=2e-4, rtol=1e-4)


def test_a_hooked_model_is_the_model(all_nodes, tiny):
    model, clip, _ = tiny
    hooks = run(
        all_nodes, "CreateHookModelAsLora", ckpt_name="tiny_flux_dev.safetensors", strength_model=1.0, strength_clip=1.0
    )[0]
    also = run(
        all_nodes,
        "CreateHookModelAsLoraModelOnly",
        ckpt_name="tiny_flux_dev.safetensors",
        strength_model=0.5,
        prev_hooks=hooks,
    )[0]
    assert len(hooks) == 1 and len(also) == 2 and hooks.hooks[0].weights and hooks.hooks[0].weights_clip
    positive = run(
        all_nodes,
        "ConditioningSetProperties",
        cond_NEW=encode(all_nodes, clip, "a tree"),
        strength=1.0,
        set_cond_area="default",
        hooks=hooks,
    )[0]
    negative = run(
        all_nodes,
        "ConditioningSetProperties",
        cond_NEW=encode(all_nodes, clip, ""),
        strength=1.0,
        set_cond_area="default",
        hooks=hooks,
    )[0]
    # the model blended with itself
    same = sample(all_nodes, model, clip, positive=positive, negative=negative)
    torch.testing.assert_close(same, sample(all_nodes, model, clip), atol=2e-3, rtol=1e-3)


def test_hooks_of_the_text_encoder(all_nodes, tiny):
    _, clip, _ = tiny
    hooks = run(all_nodes, "CreateHookLora", **LORA, strength_model=0.0, strength_clip=1.0)[0]
    hooked = run(all_nodes, "SetClipHooks", clip=clip, apply_to_conds=True, schedule_clip=False, hooks=hooks)[0]
    assert encode(all_nodes, hooked, "a tree")[0][1]["hooks"] is hooks and clip.apply_hooks_to_conds is None
    keyed = run(
        all_nodes,
        "SetHookKeyframes",
        hooks=hooks,
        hook_kf=run(all_nodes, "CreateHookKeyframe", strength_mult=0.0, start_percent=0.5)[0],
    )[0]
    scheduled = run(all_nodes, "SetClipHooks", clip=clip, apply_to_conds=False, schedule_clip=True, hooks=keyed)[0]
    parts = [
        (fields["clip_start_percent"], fields["clip_end_percent"])
        for _, fields in encode(all_nodes, scheduled, "a tree")
    ]
    assert parts == [(0.0, 0.5), (0.5, 1.0)]
    assert run(all_nodes, "SetClipHooks", clip=clip, apply_to_conds=True, schedule_clip=True)[0] is clip


def test_groups_and_keyframes(all_nodes, tiny):
    one, two = (run(all_nodes, "CreateHookLoraModelOnly", **LORA, strength_model=s)[0] for s in (1.0, 2.0))
    assert len(run(all_nodes, "CreateHookLora", **LORA, strength_model=1.0, strength_clip=1.0, prev_hooks=one)[0]) == 2
    assert run(all_nodes, "CreateHookLora", **LORA, strength_model=0.0, strength_clip=0.0, prev_hooks=one)[0] is one
    assert len(run(all_nodes, "CombineHooks2", hooks_A=one, hooks_B=two)[0]) == 2
    assert run(all_nodes, "CombineHooks4", hooks_C=two)[0] is two
    assert run(all_nodes, "CombineHooks8")[0] is None
    frames = run(
        all_nodes,
        "CreateHookKeyframesInterpolated",
        strength_start=0.0,
        strength_end=1.0,
        interpolation="ease_in",
        start_percent=0.0,
        end_percent=0.8,
        keyframes_count=3,
    )[0].keyframes
    assert [frame.strength for frame in frames] == pytest.approx([0.0, 0.25, 1.0])
    assert [frame.start_percent for frame in frames] == pytest.approx([0.0, 0.4, 0.8])
    assert [frame.guarantee_steps for frame in frames] == [1, 0, 0]
    given = run(
        all_nodes,
        "CreateHookKeyframesFromFloats",
        floats_strength=[0.5, 2.0],
        start_percent=0.2,
        end_percent=0.4,
        print_keyframes=True,
    )[0].keyframes
    assert [(frame.strength, round(frame.start_percent, 3)) for frame in given] == [(0.5, 0.2), (2.0, 0.4)]


def test_conditionings_with_ranges_and_masks(all_nodes, tiny):
    _, clip, _ = tiny
    positive, negative = encode(all_nodes, clip, "a tree"), encode(all_nodes, clip, "")
    during, before, after = run(all_nodes, "ConditioningTimestepsRange", start_percent=0.2, end_percent=0.7)
    assert (during, before, after) == ((0.2, 0.7), (0.0, 0.2), (0.7, 1.0))
    mask = torch.ones(8, 8)
    props = {"strength": 0.5, "set_cond_area": "default", "mask": mask, "timesteps": during}
    pair = run(
        all_nodes,
        "PairConditioningSetPropertiesAndCombine",
        positive=positive,
        negative=negative,
        positive_NEW=positive,
        negative_NEW=negative,
        **props,
    )
    assert [len(cond) for cond in pair] == [2, 2]
    assert pair[0][1][1]["start_percent"] == 0.2 and pair[0][1][1]["mask_strength"] == 0.5
    single = run(all_nodes, "ConditioningSetPropertiesAndCombine", cond=positive, cond_NEW=negative, **props)[0]
    assert len(single) == 2 and "mask" not in single[0][1] and "mask" in single[1][1]
    assert (
        len(
            run(
                all_nodes,
                "PairConditioningCombine",
                positive_A=positive,
                negative_A=negative,
                positive_B=positive,
                negative_B=negative,
            )[0]
        )
        == 2
    )
    default = run(all_nodes, "ConditioningSetDefaultCombine", cond=positive, cond_DEFAULT=negative)[0]
    assert default[1][1]["default"] is True and "default" not in default[0][1]
    both = run(
        all_nodes,
        "PairConditioningSetDefaultCombine",
        positive=positive,
        negative=negative,
        positive_DEFAULT=positive,
        negative_DEFAULT=negative,
    )
    assert [len(cond) for cond in both] == [2, 2]
