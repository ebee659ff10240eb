"""Nodes on models: merging, saving, extracting, guidance, caches, windows, compiling."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

import comfy.context_windows as windows
import comfy.model_management
import comfy.utils
import nodes
from tests.nodes.helpers import encode, run, sample

IMG_IN = "diffusion_model.img_in.weight"
BLOCK = "diffusion_model.double_blocks.1.img_attn.qkv.weight"


def weight(patcher, key):
    """A weight as the network gets it."""
    comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
    return patcher.model_state_dict()[key].clone()


@pytest.fixture
def other(tiny):
    return nodes.CheckpointLoaderSimple().load_checkpoint("tiny_flux_schnell.safetensors")


def test_models_merge(all_nodes, tiny, other):
    first, second = tiny[0], other[0]
    a, b = weight(first, IMG_IN), weight(second, IMG_IN)
    mixed = run(all_nodes, "ModelMergeSimple", model1=first, model2=second, ratio=0.25)[0]
    torch.testing.assert_close(weight(mixed, IMG_IN), 0.25 * a + 0.75 * b)
    less = run(all_nodes, "ModelMergeSubtract", model1=first, model2=second, multiplier=0.5)[0]
    torch.testing.assert_close(weight(less, IMG_IN), 0.5 * (a - b))
    more = run(all_nodes, "ModelMergeAdd", model1=less, model2=second)[0]
    torch.testing.assert_close(weight(more, IMG_IN), 0.5 * (a - b) + b)


def test_blocks_merge_by_the_longest_name(all_nodes, tiny, other):
    first, second = tiny[0], other[0]
    a, b = weight(first, BLOCK), weight(second, BLOCK)
    shares = {"img_in.": 0.5, "double_blocks.": 0.0, "double_blocks.1.": 0.75}
    model = all_nodes["ModelMergeFlux1"]().merge(model1=first, model2=second, **shares)[0]
    torch.testing.assert_close(weight(model, BLOCK), 0.75 * a + 0.25 * b)
    key = "diffusion_model.txt_in.weight"  # no name fits: the first share
    torch.testing.assert_close(weight(model, key), 0.5 * weight(first, key) + 0.5 * weight(second, key))
    unet = run(all_nodes, "ModelMergeBlocks", model1=first, model2=second, input=1.0, middle=0.5, out=0.0)[0]
    torch.testing.assert_close(weight(unet, BLOCK), a)


def test_text_encoders_merge(all_nodes, tiny, other):
    key = next(key for key in tiny[1].patcher.model_state_dict() if key.endswith("q_proj.weight"))
    a, b = weight(tiny[1].patcher, key), weight(other[1].patcher, key)
    mixed = run(all_nodes, "CLIPMergeSimple", clip1=tiny[1], clip2=other[1], ratio=0.25)[0]
    torch.testing.assert_close(weight(mixed.patcher, key), 0.25 * a + 0.75 * b)
    less = run(all_nodes, "CLIPMergeSubtract", clip1=tiny[1], clip2=other[1], multiplier=1.0)[0]
    more = run(all_nodes, "CLIPMergeAdd", clip1=less, clip2=other[1])[0]
    torch.testing.assert_close(weight(more.patcher, key), a)
    doubled = run(all_nodes, "CLIPAttentionMultiply", clip=tiny[1], q=2.0, k=1.0, v=1.0, out=1.0)[0]
    torch.testing.assert_close(weight(doubled.patcher, key), 2 * a)


def test_what_is_saved_is_loaded_again(all_nodes, tiny, other, tiny_folder):
    mixed = run(all_nodes, "ModelMergeSimple", model1=tiny[0], model2=other[0], ratio=0.5)[0]
    run(
        all_nodes,
        "CheckpointSave",
        model=mixed,
        clip=tiny[1],
        vae=tiny[2],
        filename_prefix="whole",
        prompt={"1": {}},
        extra_pnginfo={"workflow": {}},
    )
    path = tiny_folder / "output/whole_00001_.safetensors"
    (tiny_folder / "models/checkpoints/again.safetensors").write_bytes(path.read_bytes())
    model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint("again.safetensors")
    torch.testing.assert_close(sample(all_nodes, model, clip), sample(all_nodes, mixed, tiny[1]))
    assert vae is not None
    run(all_nodes, "ModelSave", model=mixed, filename_prefix="alone")
    saved = load_file(tiny_folder / "output/alone_00001_.safetensors")
    torch.testing.assert_close(saved["model.diffusion_model.img_in.weight"], weight(mixed, IMG_IN))
    run(all_nodes, "VAESave", vae=tiny[2], filename_prefix="vae")
    assert load_file(tiny_folder / "output/vae_00001_.safetensors").keys() == tiny[2].get_sd().keys()
    run(all_nodes, "CLIPSave", clip=tiny[1], filename_prefix="te")
    assert "text_model.embeddings.token_embedding.weight" in load_file(
        tiny_folder / "output/te_clip_l_00001_.safetensors"
    )
    assert "shared.weight" in load_file(tiny_folder / "output/te_t5xxl_00001_.safetensors")


def test_checkpoints_with_an_image_encoder(all_nodes, tiny, tiny_folder, monkeypatch):
    """It is saved under the family's prefix and found there again; without one there is none."""
    import comfy.supported_models

    monkeypatch.setattr(comfy.supported_models.Flux, "clip_vision_prefix", "embedder.model.visual.")
    vision = run(all_nodes, "CLIPVisionLoader", clip_name="tiny_clip_vision_l.safetensors")[0]
    parts = {"model": tiny[0], "clip_vision": vision, "vae": tiny[2]}
    run(all_nodes, "ImageOnlyCheckpointSave", **parts, filename_prefix="seeing")
    path = tiny_folder / "output/seeing_00001_.safetensors"
    (tiny_folder / "models/checkpoints/seeing.safetensors").write_bytes(path.read_bytes())
    model, again, vae = run(all_nodes, "ImageOnlyCheckpointLoader", ckpt_name="seeing.safetensors")
    torch.testing.assert_close(weight(model, IMG_IN), weight(tiny[0], IMG_IN))
    image = torch.rand(1, 30, 30, 3, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(again.encode_image(image).image_embeds, vision.encode_image(image).image_embeds)
    assert vae.get_sd().keys() == tiny[2].get_sd().keys()
    assert run(all_nodes, "ImageOnlyCheckpointLoader", ckpt_name="tiny_flux_dev.safetensors")[1] is None


def test_a_difference_becomes_a_lora(all_nodes, tiny, other, tiny_folder):
    difference = run(all_nodes, "ModelMergeSubtract", model1=other[0], model2=tiny[0], multiplier=1.0)[0]
    run(
        all_nodes,
        "LoraSave",
        filename_prefix="full",
        rank=4,
        lora_type="full_diff",
        bias_diff=True,
        model_diff=difference,
        text_encoder_diff=None,
    )
    lora = load_file(tiny_folder / "output/full_00001_.safetensors")
    changed = run(all_nodes, "LoraModelLoader", model=tiny[0], lora=lora, strength_model=1.0)[0]
    torch.testing.assert_close(weight(changed, BLOCK), weight(other[0], BLOCK), atol=2e-3, rtol=0)
    run(
        all_nodes,
        "LoraSave",
        filename_prefix="low",
        rank=4,
        lora_type="standard",
        bias_diff=False,
        model_diff=difference,
    )
    low = load_file(tiny_folder / "output/low_00001_.safetensors")
    stem = BLOCK.removesuffix(".weight")
    assert low[f"{stem}.lora_down.weight"].shape[0] == 4 and not any(key.endswith("diff_b") for key in low)
    from comfy_extras.nodes_lora_extract import extract_lora

    exact = torch.outer(torch.linspace(-1, 1, 400), torch.linspace(1, 2, 300))
    up, down = extract_lora(exact, 1)
    torch.testing.assert_close(up @ down, exact, atol=0.3, rtol=0.1)
    run(all_nodes, "SaveLoRANode", lora=low, prefix="trained", steps=7)
    assert (tiny_folder / "output/trained_7_steps_00001_.safetensors").is_file()


GUIDANCE = {
    "APG": {"eta": 1.0, "norm_threshold": 0.0, "momentum": 0.0},
    "FreSca": {"scale_low": 1.0, "scale_high": 1.0, "freq_cutoff": 4},
    "Epsilon Scaling": {"scaling_factor": 1.0},
    "RenormCFG": {"cfg_trunc": 100.0, "renorm_cfg": 0.0},
    "CFGOverride": {"cfg": 2.0, "start_percent": 0.0, "end_percent": 1.0},
    "EasyCache": {"reuse_threshold": 0.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False},
    "LazyCache": {"reuse_threshold": 0.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": True},
    "VideoLinearCFGGuidance": {"min_cfg": 2.0},
    "VideoTriangleCFGGuidance": {"min_cfg": 2.0},
    "ModelAttentionBackend": {"attention": "basic attention"},
    "ContextWindowsManual": {
        "context_length": 1,
        "context_overlap": 0,
        "context_schedule": "standard_static",
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "flat",
        "dim": 0,
    },
}


@pytest.mark.parametrize("name", GUIDANCE)
def test_neutral_settings_change_nothing(all_nodes, tiny, name):
    model = run(all_nodes, name, model=tiny[0], **GUIDANCE[name])[0]
    # APG guides from the positive prediction on: plain guidance of a scale higher by one
    plain = sample(all_nodes, tiny[0], tiny[1], cfg=3.0 if name == "APG" else 2.0, batch=2)
    torch.testing.assert_close(sample(all_nodes, model, tiny[1], batch=2), plain, atol=2e-4, rtol=1e-4)


CHANGES = {
    "APG": {"eta": 0.0, "norm_threshold": 1.0, "momentum": -0.5},
    "FreSca": {"scale_low": 0.5, "scale_high": 2.0, "freq_cutoff": 2},
    "Epsilon Scaling": {"scaling_factor": 1.2},
    "RenormCFG": {"cfg_trunc": 100.0, "renorm_cfg": 0.5},
    "CFGOverride": {"cfg": 5.0, "start_percent": 0.5, "end_percent": 1.0},
    "TCFG": {},
    "Mahiro": {},
    "VideoLinearCFGGuidance": {"min_cfg": 1.0},
    "VideoTriangleCFGGuidance": {"min_cfg": 1.0},
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_change_the_picture(all_nodes, tiny, name):
    model = run(all_nodes, name, model=tiny[0], **CHANGES[name])[0]
    changed, plain = (sample(all_nodes, m, tiny[1], batch=2, cfg=4.0) for m in (model, tiny[0]))
    assert torch.isfinite(changed).all() and (changed - plain).abs().max() > 1e-3


def test_projections():
    from comfy_extras.nodes_apg import project
    from comfy_extras.nodes_fresca import scale_frequencies
    from comfy_extras.nodes_perpneg import perp_neg
    from comfy_extras.nodes_tcfg import score_tangential_damping

    x, y = torch.randn(2, 2, 4, 3, 3)
    along, across = project(x, y)
    assert (across * y).sum(dim=(1, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(along + across, x)
    rows = torch.stack([y.flatten(1), x.flatten(1)], 1)
    main = torch.linalg.svd(rows, full_matrices=False)[2][:, :1]
    along_main = ((y.flatten(1)[:, None] * main).sum(-1, keepdim=True) * main)[:, 0]
    torch.testing.assert_close(score_tangential_damping(x, y).flatten(1), along_main)
    picture = torch.randn(1, 1, 9, 8)
    torch.testing.assert_close(scale_frequencies(picture, 1.0, 1.0, 2), picture)
    mean = scale_frequencies(torch.ones(1, 1, 8, 8), 0.5, 2.0, 1)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.5))
    # a negative prompt in line with the positive one does nothing
    torch.testing.assert_close(perp_neg(x, x, 2 * x, 0 * x, 1.0, 3.0), 3 * x, atol=1e-5, rtol=1e-4)


def test_perp_neg_node_and_guider_agree(all_nodes, tiny):
    model, clip, _ = tiny
    conds = {
        name: encode(all_nodes, clip, text)
        for name, text in {"positive": "a tree", "negative": "a house", "empty_conditioning": ""}.items()
    }
    guider = run(all_nodes, "PerpNegGuider", model=model, **conds, cfg=3.0, neg_scale=0.7)[0]
    latent = torch.zeros(1, 16, 8, 8)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    sigmas = run(all_nodes, "BasicScheduler", model=model, scheduler="simple", steps=3, denoise=1.0)[0]
    import comfy.samplers

    by_guider = guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=3)
    patched = run(all_nodes, "PerpNeg", model=model, empty_conditioning=conds["empty_conditioning"], neg_scale=0.7)[0]
    by_node = sample(all_nodes, patched, clip, 3, 3.0, 3, conds["positive"], conds["negative"])
    torch.testing.assert_close(by_guider, by_node, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_caches_skip_steps(all_nodes, tiny, name, caplog):
    caplog.set_level("INFO")
    model = run(all_nodes, name, model=tiny[0], reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=True)[
        0
    ]
    calls = []
    counted = model.clone()
    counted.set_model_unet_function_wrapper(
        lambda apply, a: calls.append(1) or apply(a["input"], a["timestep"], **a["c"])
    )
    near = sample(all_nodes, counted, tiny[1], steps=12)
    assert 0 < len(calls) < 12
    plain = sample(all_nodes, tiny[0], tiny[1], steps=12)
    assert torch.nn.functional.cosine_similarity(near.flatten(), plain.flatten(), dim=0) > 0.7
    assert f"{name} - skipped {12 - len(calls)}/12 steps" in caplog.text
    torch.testing.assert_close(sample(all_nodes, counted, tiny[1], steps=12), near)  # a run remembers nothing


def handler(length=4, overlap=1, schedule=windows.STATIC, fuse=windows.FLAT, stride=1, loop=False):
    return windows.IndexListContextHandler(
        windows.get_matching_context_schedule(schedule),
        windows.get_matching_fuse_method(fuse),
        length,
        overlap,
        stride,
        loop,
        0,
    )


def test_windows():
    of = {name: windows.SCHEDULES[name] for name in windows.SCHEDULES}
    assert of[windows.STATIC](10, handler()) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert of[windows.STATIC](9, handler())[-1] == [5, 6, 7, 8]
    assert of[windows.BATCHED](10, handler()) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    looped = handler(loop=True)
    looped.step = 1
    assert of[windows.LOOPED](10, looped)[0] == [5, 6, 7, 8] and any(
        9 in w and 0 in w for w in of[windows.LOOPED](10, looped)
    )
    for step in range(6):
        uniform = handler(stride=2, schedule=windows.UNIFORM)
        uniform.step = step
        chosen = of[windows.UNIFORM](13, uniform)
        assert {frame for window in chosen for frame in window} == set(range(13))
        assert all(window == sorted(window) and len(window) == 4 for window in chosen)
    assert [windows.ordered_halving(step) for step in range(5)] == [0, 0.5, 0.25, 0.75, 0.125]
    weights = {name: windows.FUSE_METHODS[name]([3, 4, 5, 6], 10, handler(overlap=2)) for name in windows.FUSE_METHODS}
    assert weights[windows.PYRAMID].tolist() == [1, 2, 2, 1] and weights[windows.FLAT].tolist() == [1] * 4
    assert weights[windows.OVERLAP_LINEAR][1] == 1 and weights[windows.RELATIVE][1] == weights[windows.RELATIVE][2]
    with pytest.raises(ValueError, match="context_overlap is 4"):
        handler(4, 4)
    with pytest.raises(ValueError, match="choose one of pyramid"):
        windows.get_matching_fuse_method("square")


@pytest.mark.parametrize("schedule", list(windows.SCHEDULES))
@pytest.mark.parametrize("fuse", list(windows.FUSE_METHODS))
def test_windows_of_a_pointwise_prediction_are_seamless(schedule, fuse):
    x, cond = torch.randn(2, 11, 2, 1, 1), [[{"model_conds": {}, "mask": torch.arange(11.0)}]]
    context = handler(4, 1, schedule, fuse)

    def predict(model, conds, part, timestep, options):
        assert len(part) == len(timestep) == len(conds[0][0]["mask"])
        return [part * conds[0][0]["mask"].view(-1, 1, 1, 1)]

    options = {"transformer_options": {"sample_sigmas": torch.tensor([1.0, 0.0])}}
    out = context.execute(predict, None, cond, x[0], torch.ones(11), options)
    torch.testing.assert_close(out[0], x[0] * torch.arange(11.0).view(-1, 1, 1, 1))


def test_compiled_models_give_the_same(all_nodes, tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network, backend: compiled.append(backend) or network)
    model = run(all_nodes, "TorchCompileModel", model=tiny[0], backend="inductor")[0]
    torch.testing.assert_close(sample(all_nodes, model, tiny[1]), sample(all_nodes, tiny[0], tiny[1]))
    assert compiled == ["inductor"] and tiny[0].model.network_runner is None


def test_unet_attention_is_scaled(all_nodes):
    class Patcher:
        def __init__(self):
            self.patches = {}

        def clone(self):
            return Patcher()

        def model_state_dict(self):
            return dict.fromkeys(
                [
                    "a.attn1.to_q.weight",
                    "a.attn1.to_out.0.bias",
                    "a.time_stack.attn1.to_out.0.weight",
                    "a.attn2.to_q.weight",
                    "a.attn2.to_out.0.weight",
                ]
            )

        def add_patches(self, patches, strength_patch, strength_model):
            assert strength_patch == 0.0
            self.patches.update(dict.fromkeys(patches, strength_model))

    factors = {"q": 2.0, "k": 1.0, "v": 1.0, "out": 3.0}
    own = run(all_nodes, "UNetSelfAttentionMultiply", model=Patcher(), **factors)[0].patches
    assert (
        own["a.attn1.to_q.weight"] == 2.0 and own["a.attn1.to_out.0.bias"] == 3.0 and "a.attn2.to_q.weight" not in own
    )
    assert (
        run(all_nodes, "UNetCrossAttentionMultiply", model=Patcher(), **factors)[0].patches["a.attn2.to_q.weight"]
        == 2.0
    )
    over_time = run(
        all_nodes,
        "UNetTemporalAttentionMultiply",
        model=Patcher(),
        self_structural=2.0,
        self_temporal=3.0,
        cross_structural=4.0,
        cross_temporal=5.0,
    )[0].patches
    assert list(over_time.values()) == [2.0, 3.0, 4.0]


def test_hypernetworks(all_nodes, tiny, tiny_folder):
    folder = tiny_folder / "models/hypernetworks"
    folder.mkdir(exist_ok=True)
    half = {
        "linear.0.weight": torch.eye(4) * 0.5,
        "linear.0.bias": torch.zeros(4),
        "linear.1.weight": torch.eye(4),
        "linear.1.bias": torch.ones(4),
    }
    torch.save({4: [half, half], "activation_func": "relu"}, folder / "h.pt")
    from comfy_extras.nodes_hypernetwork import load_hypernetwork_patch

    model = run(all_nodes, "HypernetworkLoader", model=tiny[0], hypernetwork_name="h.pt", strength=2.0)[0]
    assert len(model.model_options["transformer_options"]["patches"]["attn1_patch"]) == 1
    k = torch.tensor([[[-2.0, 2.0, 4.0, 0.0]]])
    patch = load_hypernetwork_patch(str(folder / "h.pt"), 2.0)
    _, changed, _ = patch(k, k, k, {})
    assert patch(k, k[..., :3], k[..., :3], {})[1].shape[-1] == 3  # no network of that width
    torch.testing.assert_close(changed, k + 2 * (torch.relu(k * 0.5) + 1))


def test_samplers_beyond_the_list(all_nodes, tiny):
    model, clip, _ = tiny
    guider = run(
        all_nodes,
        "CFGGuider",
        model=model,
        positive=encode(all_nodes, clip, "a tree"),
        negative=encode(all_nodes, clip, ""),
        cfg=1.5,
    )[0]
    sigmas = run(all_nodes, "ManualSigmas", sigmas="1.0; .5, 2.5e-1 and 0")[0]
    assert sigmas.tolist() == [1.0, 0.5, 0.25, 0.0]
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    noise = run(all_nodes, "RandomNoise", noise_seed=1)[0]
    results = []
    for name, settings in (
        ("SamplerEulerCFGpp", {"version": "regular"}),
        ("SamplerEulerCFGpp", {"version": "alternative"}),
        ("SamplerLCMUpscale", {"scale_ratio": 1.5, "scale_steps": -1, "upscale_method": "bilinear"}),
    ):
        sampler = run(all_nodes, name, **settings)[0]
        twice = [
            run(
                all_nodes,
                "SamplerCustomAdvanced",
                noise=noise,
                guider=guider,
                sampler=sampler,
                sigmas=sigmas,
                latent_image=latent,
            )[0]["samples"]
            for _ in range(2)
        ]
        torch.testing.assert_close(*twice, rtol=0, atol=0)
        results.append(twice[0])
    assert results[2].shape == (1, 16, 12, 12)
    assert (results[0] - results[1]).abs().max() > 1e-4
    with pytest.raises(ValueError, match="no number in the sigmas"):
        run(all_nodes, "ManualSigmas", sigmas="none")


def test_conditioning_for_edits_and_videos(all_nodes, tiny):
    model, clip, vae = tiny
    cond = encode(all_nodes, clip, "a tree")
    positive, negative, latent = run(
        all_nodes,
        "InstructPixToPixConditioning",
        positive=cond,
        negative=cond,
        vae=vae,
        pixels=torch.rand(1, 37, 42, 3),
    )
    assert positive[0][1]["concat_latent_image"].shape == latent["samples"].shape == (1, 16, 4, 5)
    area = run(
        all_nodes,
        "ConditioningSetAreaPercentageVideo",
        conditioning=cond,
        width=0.5,
        height=0.4,
        temporal=0.3,
        x=0.1,
        y=0.2,
        z=0.6,
        strength=1.5,
    )[0][0][1]["area"]
    assert area == ("percentage", 0.3, 0.4, 0.5, 0.6, 0.2, 0.1)
    video = {"samples": torch.arange(5.0).view(1, 1, 5, 1, 1)}
    assert run(all_nodes, "TrimVideoLatent", samples=video, trim_amount=2)[0]["samples"].flatten().tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="is no video"):
        run(all_nodes, "TrimVideoLatent", samples={"samples": torch.zeros(1, 4, 8, 8)}, trim_amount=1)
    cut = run(
        all_nodes, "LatentCutToBatch", samples={"samples": torch.arange(10.0).view(1, 1, 2, 5)}, dim="x", slice_size=2
    )
    assert cut[0]["samples"].tolist() == [[[[0, 1], [5, 6]]], [[[2, 3], [7, 8]]]]


def test_schedule_of_flux_2(all_nodes):
    empty = run(all_nodes, "EmptyFlux2LatentImage", width=1024, height=512, batch_size=2)[0]["samples"]
    assert empty.shape == (2, 128, 32, 64)
    sigmas = run(all_nodes, "Flux2Scheduler", steps=20, width=1024, height=1024)[0]
    assert sigmas[0] == 1 and sigmas[-1] == 0 and len(sigmas) == 21
    slopes = [(8.73809524e-05 * 4096 + 1.89833333, 10), (0.00016927 * 4096 + 0.45666666, 200)]
    (few, at_few), (many, at_many) = slopes
    mu = few + (many - few) * (20 - at_few) / (at_many - at_few)
    assert float(sigmas[10]) == pytest.approx(math.exp(mu) / (math.exp(mu) + 1), rel=1e-5)


def test_conditioning_from_a_file(all_nodes, tiny, tiny_folder):
    folder = tiny_folder / "models/embeddings"
    folder.mkdir(exist_ok=True)
    comfy.utils.save_torch_file(
        {"conditioning": torch.ones(1, 3, 4), "pooled_output": torch.zeros(1, 4)}, str(folder / "depth.safetensors")
    )
    cond = run(all_nodes, "ConditioningLoader", conditioning_name="depth.safetensors")[0]
    assert cond[0][0].shape == (1, 3, 4) and cond[0][1]["pooled_output"].shape == (1, 4)
