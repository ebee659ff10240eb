"""The CLIP object of workflows: loading, storage formats, options, patches, embeddings."""

import pytest
import torch
from safetensors.torch import save_file

import comfy.hooks
import comfy.utils
from comfy.text_encoders.loader import CLIPType, detect_te_model, load_clip, load_text_encoder_state_dicts
from tests.text import tiny

PROMPT = "a (red:1.3) fox"


def flux(clip_l=None, t5=None, **kwargs):
    """Flux' encoders."""
    parts = [tiny.clip_l() if clip_l is None else clip_l, tiny.t5() if t5 is None else t5]
    return load_text_encoder_state_dicts(parts, clip_type=CLIPType.FLUX, **kwargs)


def encode(clip, text=PROMPT):
    """(features, pooled)."""
    return clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)


def test_sizes_come_from_the_file():
    """Nothing about the encoders is assumed."""
    cond, pooled = encode(flux())
    assert cond.shape == (1, 256, tiny.WIDTH_T5) and pooled.shape == (1, tiny.WIDTH_L)
    conditioning = flux().encode_from_tokens_scheduled(flux().tokenize(PROMPT))
    assert torch.equal(conditioning[0][0], cond) and torch.equal(conditioning[0][1]["pooled_output"], pooled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_stored_dtypes(dtype):
    """Weights stay as they are stored; the result is that of the same numbers in float32."""
    stored = tiny.t5(dtype=dtype)
    clip = flux(t5=stored)
    weight = clip.cond_stage_model.t5xxl.transformer.encoder.block[0].layer[0].SelfAttention.q.weight
    assert weight.dtype == dtype
    want, _ = encode(flux(t5={key: value.float() for key, value in stored.items()}))
    got, _ = encode(clip)
    assert torch.allclose(got, want, atol=1e-5)


def test_scaled_fp8():
    """Linears with a scale beside them."""
    plain, scaled = tiny.t5(), {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for key, value in tiny.t5().items():
        if value.ndim == 2 and "relative" not in key and "shared" not in key:
            scale = value.abs().max() / 448
            scaled[key] = (value / scale).to(torch.float8_e4m3fn)
            scaled[key.replace(".weight", ".scale_weight")] = scale.float()
            plain[key] = scaled[key].float() * scale
        else:
            scaled[key] = value
    assert torch.allclose(encode(flux(t5=scaled))[0], encode(flux(t5=plain))[0], atol=1e-5)


def test_files_stay_mapped(tmp_path):
    """Loading a file copies no weights: networks hold the tensors of the file's mapping."""
    paths = [str(tmp_path / "clip_l.safetensors"), str(tmp_path / "t5xxl.safetensors")]
    save_file(tiny.clip_l(dtype=torch.float16), paths[0])
    save_file(tiny.t5(dtype=torch.bfloat16), paths[1])
    clip = load_clip(paths, clip_type=CLIPType.FLUX)
    assert encode(clip)[0].dtype == torch.float32
    sizes = {torch.float16, torch.bfloat16}
    stored = [p for p in clip.cond_stage_model.parameters() if p.ndim > 0]
    assert {p.dtype for p in stored} == sizes
    # safetensors' mapping: all tensors of a file share one storage region, next to each other.
    pointers = [p.data_ptr() for p in clip.cond_stage_model.t5xxl.transformer.parameters()]
    spread = max(pointers) - min(pointers)
    assert spread < 2 * sum(p.nbytes for p in clip.cond_stage_model.t5xxl.transformer.parameters())


def test_missing_projection_is_the_identity():
    """Many CLIP-L files have none."""
    clip = load_text_encoder_state_dicts([tiny.clip_l(projection=False)])
    projection = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    assert torch.equal(projection, torch.eye(tiny.WIDTH_L))
    fp8 = load_text_encoder_state_dicts([tiny.clip_l(projection=False, dtype=torch.float8_e4m3fn)])
    assert torch.isfinite(encode(fp8)[0]).all()


def test_projected_and_unprojected_pooled():
    """`return_pooled="unprojected"` gives the vector before the projection, for one call."""
    clip = load_text_encoder_state_dicts([tiny.clip_l()])
    tokens = clip.tokenize(PROMPT)
    _, projected = clip.encode_from_tokens(tokens, return_pooled=True)
    _, plain = clip.encode_from_tokens(tokens, return_pooled="unprojected")
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    assert torch.allclose(plain @ weight.T, projected, atol=1e-5)
    assert torch.equal(clip.encode_from_tokens(tokens, return_pooled=True)[1], projected)


def test_clip_skip_belongs_to_the_clone():
    """`clip_layer` changes one clone's features only."""
    clip = load_text_encoder_state_dicts([tiny.clip_l()])
    skipping = clip.clone()
    skipping.clip_layer(-2)
    before, after = encode(clip)[0], encode(skipping)[0]
    assert not torch.allclose(before, after)
    assert torch.equal(encode(clip)[0], before)


def test_patches_belong_to_the_clone():
    """A patched clone and the original alternate correctly."""
    clip = flux()
    key = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    patched = clip.clone()
    assert patched.add_patches({key: ("diff", (torch.ones(96, tiny.WIDTH_L) * 0.1,))}) == [key]
    before = encode(clip)[1]
    assert not torch.allclose(encode(patched)[1], before)
    assert torch.equal(encode(clip)[1], before)


def test_full_model_state_dict_round_trip():
    """`get_sd` has full keys, which `load_sd(full_model=True)` takes."""
    clip = flux()
    saved = {key: value.clone() for key, value in clip.get_sd().items()}
    other = flux(tiny.clip_l(seed=5), tiny.t5(seed=6))
    missing, unexpected = other.load_sd(saved, full_model=True)
    assert (missing, unexpected) == ([], [])
    assert torch.equal(encode(other)[0], encode(clip)[0])


def test_embeddings(tmp_path):
    """`embedding:name` puts learned vectors into the prompt; without a file the word is dropped."""
    vectors = torch.randn(2, tiny.WIDTH_L, generator=torch.Generator().manual_seed(9))
    save_file({"clip_l": vectors}, str(tmp_path / "style.safetensors"))
    clip = load_text_encoder_state_dicts([tiny.clip_l()], embedding_directory=str(tmp_path))
    clip.tokenizer.clip_l.embedding_size = tiny.WIDTH_L
    rows = clip.tokenize("a embedding:style, fox")["l"]
    kinds = [isinstance(pair[0], torch.Tensor) for pair in rows[0][:6]]
    assert kinds == [False, False, True, True, False, False]
    assert torch.equal(torch.stack([pair[0] for pair in rows[0][2:4]]), vectors)
    with_style = clip.encode("a embedding:style fox")
    without = clip.encode("a embedding:nothing fox")
    assert with_style.shape == without.shape and not torch.allclose(with_style, without)
    assert torch.equal(without, clip.encode("a fox"))


def test_embedding_paths_stay_inside(tmp_path):
    """A prompt cannot read files elsewhere."""
    inner = tmp_path / "embeddings"
    inner.mkdir()
    save_file({"clip_l": torch.ones(tiny.WIDTH_L)}, str(tmp_path / "outside.safetensors"))
    clip = load_text_encoder_state_dicts([tiny.clip_l()], embedding_directory=str(inner))
    rows = clip.tokenize("embedding:../outside fox")["l"]
    assert not any(isinstance(pair[0], torch.Tensor) for pair in rows[0])


def test_a_vector_of_the_wrong_width_is_left_out(caplog):
    """With one warning instead of a failure."""
    clip = load_text_encoder_state_dicts([tiny.clip_l()])
    rows = clip.tokenize("fox")
    rows["l"][0].insert(1, (torch.ones(5), 1.0))
    cond = clip.encode_from_tokens(rows)
    assert cond.shape[1] == 77 and "does not fit" in caplog.text


def test_scheduled_hooks():
    """With a schedule of weight hooks there is one entry per part, with its range."""
    clip = load_text_encoder_state_dicts([tiny.clip_l()])
    group = comfy.hooks.create_hook_model_as_lora(
        None, {"clip_l.transformer.text_model.final_layer_norm.bias": ("diff", (torch.ones(tiny.WIDTH_L),))}, 1.0, 1.0
    )
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=0.0))
    frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.6))
    group.set_keyframes_on_hooks(frames)
    hooked = clip.clone()
    hooked.patcher.register_all_hook_patches(group, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip))
    hooked.patcher.forced_hooks = group
    hooked.use_clip_schedule = True
    hooked.apply_hooks_to_conds = group
    parts = hooked.encode_from_tokens_scheduled(hooked.tokenize("fox"), show_pbar=False)
    ranges = [(fields["clip_start_percent"], fields["clip_end_percent"]) for _, fields in parts]
    assert ranges == [(0.0, 0.6), (0.6, 1.0)]
    assert all(fields["hooks"] is group for _, fields in parts)
    assert torch.allclose(parts[1][0] - parts[0][0], torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("parts,clip_type,message", [
    ([{"x": torch.ones(1)}], CLIPType.FLUX, "holds no encoder"),
    ([], CLIPType.FLUX, "no text encoder files"),
    ([tiny.t5()], CLIPType.FLUX, "no CLIP-L"),
    ([tiny.t5(), tiny.t5()], CLIPType.FLUX, "two of the text encoder files"),
])  # fmt: skip
def test_errors_say_what_is_wrong(parts, clip_type, message):
    """One line, with the remedy."""
    with pytest.raises(ValueError, match=message):
        load_text_encoder_state_dicts(parts, clip_type=clip_type)


def test_an_incomplete_file_is_an_error():
    """A missing weight is named, instead of random numbers."""
    part = tiny.clip_l()
    del part["text_model.encoder.layers.1.mlp.fc1.weight"]
    with pytest.raises(ValueError, match=r"lacks 1 weights.*layers.1.mlp.fc1.weight"):
        load_text_encoder_state_dicts([part])


def test_detection():
    """Kinds by their weights."""
    assert detect_te_model(tiny.clip_l()).name == "CLIP_L"
    assert detect_te_model(tiny.t5()).name == "T5_XXL"
    assert detect_te_model({"model.layers.0.self_attn.k_proj.bias": torch.empty(512)}).name == "QWEN25_7B"
    assert detect_te_model({}) is None
