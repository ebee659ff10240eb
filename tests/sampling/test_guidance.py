"""Hooks of custom nodes into sampling: wrappers, guidance functions, conditionings with hooks of their own."""

import pytest
import torch

import comfy.hooks
import comfy.patcher_extension as extension
import comfy.samplers
from tests.goldens.standins import ClosedFormModel, text

STEPS = 3


def sample(patcher, positive, negative=None, cfg=2.0, **kwargs):
    """A short flow run."""
    noise = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    sampler = comfy.samplers.KSampler(patcher, STEPS, "cpu", "euler", "simple")
    negative = [[text(-0.3), {}]] if negative is None else negative
    return sampler.sample(noise, positive, negative, cfg, torch.zeros_like(noise), disable_pbar=True, seed=1, **kwargs)


@pytest.mark.parametrize("kind,calls", [
    ("OUTER_SAMPLE", 1), ("PREPARE_SAMPLING", 1), ("SAMPLER_SAMPLE", 1), ("PREDICT_NOISE", STEPS),
    ("CALC_COND_BATCH", STEPS),
])  # fmt: skip
def test_wrappers(kind, calls):
    """Each wrapper is called in its place, and the result is unchanged."""
    seen = []

    def wrapper(executor, *args, **kwargs):
        seen.append(executor.class_obj)
        return executor(*args, **kwargs)

    plain = sample(ClosedFormModel("flow").patcher(), [[text(0.2), {}]])
    patcher = ClosedFormModel("flow").patcher()
    patcher.add_wrapper_with_key(getattr(extension.WrappersMP, kind), "mine", wrapper)
    assert torch.equal(sample(patcher, [[text(0.2), {}]]), plain)
    assert len(seen) == calls


def test_guidance_functions():
    """Pre, replacement and post functions get ComfyUI's arguments and compose."""
    patcher = ClosedFormModel("flow").patcher()
    seen = {}

    def pre(args):
        seen["pre"] = set(args)
        return args["conds_out"]

    def cfg(args):
        seen["cfg"] = set(args)
        return args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]

    def post(args):
        seen["post"] = set(args)
        return args["denoised"]

    plain = sample(ClosedFormModel("flow").patcher(), [[text(0.2), {}]])
    patcher.set_model_sampler_pre_cfg_function(pre)
    patcher.set_model_sampler_cfg_function(cfg)
    patcher.set_model_sampler_post_cfg_function(post)
    assert torch.allclose(sample(patcher, [[text(0.2), {}]]), plain, atol=1e-6)
    assert {"conds_out", "cond_scale", "timestep", "input", "sigma", "model", "model_options", "conds"} <= seen["pre"]
    assert {"cond", "uncond", "cond_scale", "timestep", "input", "sigma", "cond_denoised", "uncond_denoised", "model",
            "model_options"} <= seen["cfg"]  # fmt: skip
    assert {"denoised", "cond_denoised", "uncond_denoised", "cond", "uncond", "sigma", "input", "cond_scale", "model",
            "model_options"} <= seen["post"]  # fmt: skip


def test_cfg_one_skips_the_negative_pass_unless_it_is_needed():
    """Scale 1 runs only the positive side; a post-cfg function can ask for both."""
    model = ClosedFormModel("flow")
    sample(model.patcher(), [[text(0.2), {}]], cfg=1.0)
    assert model.batches == [[0]] * STEPS
    model = ClosedFormModel("flow")
    patcher = model.patcher()
    patcher.set_model_sampler_post_cfg_function(lambda args: args["denoised"], disable_cfg1_optimization=True)
    sample(patcher, [[text(0.2), {}]], cfg=1.0)
    assert model.batches == [[1, 0]] * STEPS


def test_replaced_module_functions_are_used(monkeypatch):
    """Custom nodes replace functions of comfy.samplers."""
    called = []
    original = comfy.samplers.sampling_function

    def replacement(*args, **kwargs):
        called.append("sampling_function")
        return original(*args, **kwargs)

    monkeypatch.setattr(comfy.samplers, "sampling_function", replacement)
    monkeypatch.setattr(comfy.samplers, "pre_run_control", lambda *args: called.append("pre_run_control"))
    sample(ClosedFormModel("flow").patcher(), [[text(0.2), {}]])
    assert called.count("sampling_function") == STEPS and called.count("pre_run_control") == 2


class HookedModel(ClosedFormModel):
    """The closed form plus a weight that hooks can patch."""

    def __init__(self):
        super().__init__("flow")
        self.shift = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.shift.weight)

    def apply_model(self, x, t, **kwargs):
        return super().apply_model(x, t, **kwargs) + self.shift.weight.view(())


def _weight_hook(value, **settings):
    group = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(**settings)
    hook.need_weight_init = False
    hook.weights = {"shift.weight": ("diff", (torch.tensor([[value]]),))}
    group.add(hook)
    return group


def test_weight_hooks_hold_for_their_conditionings_only():
    """Two prompts with different weights run apart and mix as if two models had been used."""
    hooked = [[text(0.2), {"hooks": _weight_hook(0.5)}]]
    model = HookedModel()
    out = sample(model.patcher(), hooked, cfg=1.0)
    shifted = HookedModel()
    shifted.shift.weight.data.fill_(0.5)
    want = sample(shifted.patcher(), [[text(0.2), {}]], cfg=1.0)
    assert torch.allclose(out, want, atol=1e-6)
    assert float(model.shift.weight.detach()) == 0.0, "the hook's weight stayed in the model"
    both = sample(HookedModel().patcher(), [[text(0.2), {}], *hooked], cfg=1.0)
    assert not torch.allclose(both, want, atol=1e-3)


def test_keyframes_change_the_strength():
    """Strength 0 at first, 1 in the second half."""
    group = _weight_hook(0.5)
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.0))
    frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.5))
    group.set_keyframes_on_hooks(frames)
    seen = []

    class Watched(HookedModel):
        def apply_model(self, x, t, **kwargs):
            seen.append(float(self.shift.weight.detach()))
            return super().apply_model(x, t, **kwargs)

    sample(Watched().patcher(), [[text(0.2), {"hooks": group}]], cfg=1.0)
    assert seen[0] == 0.0 and seen[-1] == pytest.approx(0.5)


def test_a_keyframe_that_begins_exactly_at_a_step_holds_from_that_step_on():
    """Its sigma is known in double precision, a step's in single: 0.1 is less than the float32 next to it."""
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.0))
    frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.9))
    frames.keyframes[1].start_t = 0.1
    sigmas = torch.tensor([0.2, 0.1, 0.05])
    assert float(sigmas[1]) > 0.1
    strengths = []
    for sigma in sigmas:
        frames.prepare_current_keyframe(sigma, {"sample_sigmas": sigmas})
        strengths.append(frames.strength)
    assert strengths == [0.0, 1.0, 1.0]


def test_transformer_options_hook():
    """A HookedOnly hook reaches the calls of its conditioning alone."""
    seen = {}

    class Watched(ClosedFormModel):
        def apply_model(self, x, t, transformer_options=None, **kwargs):
            seen.setdefault(tuple(transformer_options["cond_or_uncond"]), []).append(transformer_options.get("mine"))
            return super().apply_model(x, t, transformer_options=transformer_options, **kwargs)

    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.TransformerOptionsHook({"mine": 7}, hook_scope=comfy.hooks.EnumHookScope.HookedOnly))
    sample(Watched("flow").patcher(), [[text(0.2), {"hooks": group}]])
    assert seen == {(0,): [7] * STEPS, (1,): [None] * STEPS}


def test_empty_schedule_returns_the_latent():
    """denoise 0."""
    patcher = ClosedFormModel("flow").patcher()
    sampler = comfy.samplers.KSampler(patcher, 4, "cpu", "euler", "simple", denoise=0.0)
    latent = torch.randn(1, 4, 6, 6)
    out = sampler.sample(torch.randn_like(latent), [[text(0.2), {}]], [[text(0.1), {}]], 2.0, latent)
    assert torch.equal(out, latent)
