"""Nodes around image encoders: style models and USO, on the tiny Flux."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from comfy import photomaker
from comfy.clip_vision import clip_preprocess
from comfy.style_models import load_style_model
from comfy.text_encoders.loader import load_text_encoder_state_dicts
from comfy_extras.nodes_photomaker import without_word
from tests import tiny_adapters, tiny_models
from tests.nodes.helpers import encode, run, sample
from tests.tiny_models import random_weights


def seen(all_nodes, name="tiny_sigclip.safetensors", pictures=1):
    vision = run(all_nodes, "CLIPVisionLoader", clip_name=name)[0]
    image = torch.rand(pictures, 40, 40, 3, generator=torch.Generator().manual_seed(4))
    return run(all_nodes, "CLIPVisionEncode", clip_vision=vision, image=image, crop="center")[0]


def test_redux(all_nodes, tiny):
    """Its tokens are behind the prompt's; strengths scale them, or how much they are looked at."""
    model, clip, _ = tiny
    output = seen(all_nodes)
    style = run(all_nodes, "StyleModelLoader", style_model_name="tiny_redux.safetensors")[0]
    sd = tiny_adapters.redux()
    hidden = F.silu(F.linear(output.last_hidden_state, sd["redux_up.weight"], sd["redux_up.bias"]))
    tokens = F.linear(hidden, sd["redux_down.weight"], sd["redux_down.bias"])
    torch.testing.assert_close(style.get_cond(output), tokens, rtol=1e-4, atol=1e-5)

    text = encode(all_nodes, clip, "a tree")
    apply = {"conditioning": text, "style_model": style, "clip_vision_output": output}
    plain = run(all_nodes, "StyleModelApply", **apply, strength=0.5, strength_type="multiply")[0]
    torch.testing.assert_close(plain[0][0][:, -tokens.shape[1] :], tokens * 0.5, rtol=1e-4, atol=1e-5)
    ignored = run(all_nodes, "StyleModelApply", **apply, strength=0.0, strength_type="attn_bias")[0]
    without = sample(all_nodes, model, clip, positive=text, cfg=1.0)
    torch.testing.assert_close(sample(all_nodes, model, clip, positive=ignored, cfg=1.0), without, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(sample(all_nodes, model, clip, positive=plain, cfg=1.0), without, atol=1e-2)


def test_the_style_adapter(tmp_path):
    """Against torch's layers; its attention has the names of torch's."""
    sd = tiny_adapters.t2i_style()
    save_file(sd, tmp_path / "style.safetensors")
    style = load_style_model(str(tmp_path / "style.safetensors"))
    features = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(1))

    class Seen:
        last_hidden_state = features

    x = torch.cat([features, sd["style_embedding"].expand(2, -1, -1)], dim=1)
    x = F.layer_norm(x, (32,), sd["ln_pre.weight"], sd["ln_pre.bias"])
    for i in range(3):
        layer = torch.nn.TransformerEncoderLayer(
            32, 8, 128, 0.0, lambda t: t * torch.sigmoid(1.702 * t), batch_first=True, norm_first=True
        )
        names = {"self_attn": "attn", "norm1": "ln_1", "norm2": "ln_2", "linear1": "mlp.c_fc", "linear2": "mlp.c_proj"}
        weights = {}
        for key in layer.state_dict():
            stem, _, rest = key.partition(".")
            weights[key] = sd[f"transformer_layes.{i}.{names[stem]}.{rest}"]
        layer.load_state_dict(weights)
        x = layer(x).detach()
    want = F.layer_norm(x[:, -8:], (32,), sd["ln_post.weight"], sd["ln_post.bias"]) @ sd["proj"]
    torch.testing.assert_close(style.get_cond(Seen), want, rtol=1e-4, atol=1e-4)


def test_files_that_are_no_style_models(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no style model"):
        load_style_model(str(tmp_path / "a.safetensors"))
    torn = tiny_adapters.redux()
    del torn["redux_up.bias"]
    save_file(torn, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="lacks 1 weights, first redux_up.bias"):
        load_style_model(str(tmp_path / "b.safetensors"))


def test_uso(all_nodes, tiny):
    """The style's tokens come before the prompt's, for every row of a call, and change the picture."""
    model, clip, _ = tiny
    output = seen(all_nodes)
    patch = all_nodes["ModelPatchLoader"]().load_model_patch("tiny_uso.safetensors")[0]
    styled = run(all_nodes, "USOStyleReference", model=model, model_patch=patch, clip_vision_output=output)[0]
    function = styled.model_options["transformer_options"]["patches"]["post_input"][0]
    assert function.rows_independent and function.models() == [patch]
    txt, ids = torch.randn(2, 3, 96), torch.ones(2, 3, 3)
    out = function({"txt": txt, "txt_ids": ids, "img": "kept"})
    assert out["txt"].shape == (2, 18, 96) and out["img"] == "kept"
    torch.testing.assert_close(out["txt"][:, 15:], txt)
    assert out["txt_ids"][:, :15].abs().max() == 0 and out["txt_ids"][:, 15:].min() == 1

    sd = {key.removeprefix("feature_embedder."): value for key, value in tiny_adapters.uso().items()}
    part = output.penultimate_hidden_states.transpose(1, 2)
    part = F.silu(F.linear(part, sd["high_embedding_linear.0.weight"], sd["high_embedding_linear.0.bias"]))
    part = F.layer_norm(part.transpose(1, 2), (32,), sd["high_layer_norm.weight"], sd["high_layer_norm.bias"])
    first = F.linear(part, sd["high_projection.weight"], sd["high_projection.bias"])
    torch.testing.assert_close(out["txt"][:1, :5], first, rtol=1e-4, atol=1e-4)
    low = output.all_hidden_states[:, -20].transpose(1, 2)
    low = F.silu(F.linear(low, sd["low_embedding_linear.0.weight"], sd["low_embedding_linear.0.bias"]))
    low = F.layer_norm(low.transpose(1, 2), (32,), sd["low_layer_norm.weight"], sd["low_layer_norm.bias"])
    last = F.linear(low, sd["low_projection.weight"], sd["low_projection.bias"])
    torch.testing.assert_close(out["txt"][:1, 10:15], last, rtol=1e-4, atol=1e-4)

    picture, plain = sample(all_nodes, styled, clip, batch=2), sample(all_nodes, model, clip, batch=2)
    assert picture.isfinite().all() and not torch.allclose(picture, plain, atol=1e-2)


def test_uso_needs_its_encoder(all_nodes, tiny, tiny_folder):
    patch = all_nodes["ModelPatchLoader"]().load_model_patch("tiny_uso.safetensors")[0]
    output = seen(all_nodes, "tiny_clip_vision_l.safetensors")
    with pytest.raises(ValueError, match="encode the picture with a SigLIP file"):
        run(all_nodes, "USOStyleReference", model=tiny[0], model_patch=patch, clip_vision_output=output)
    save_file({"a": torch.zeros(1)}, tiny_folder / "models" / "model_patches" / "none.safetensors")
    with pytest.raises(ValueError, match="no known patch network"):
        all_nodes["ModelPatchLoader"]().load_model_patch("none.safetensors")


def test_the_h_encoder_has_its_file(all_nodes, tiny):
    assert seen(all_nodes, "tiny_clip_vision_h.safetensors", 2).image_embeds.shape[0] == 2


@pytest.fixture(scope="module")
def sdxl():
    """SDXL's text encoders, tiny."""
    parts = [random_weights(shapes(), 3) for shapes in (tiny_models.clip_l_shapes, tiny_models.clip_g_shapes)]
    return load_text_encoder_state_dicts(parts)


def test_photomaker(all_nodes, tiny, sdxl, tmp_path):
    """The face goes into the token before the word, and nowhere else; the file may be that of its authors."""
    maker = run(all_nodes, "PhotoMakerLoader", photomaker_model_name="tiny_photomaker.safetensors")[0]
    image = torch.rand(2, 40, 60, 3, generator=torch.Generator().manual_seed(4))
    give = {"photomaker": maker, "clip": sdxl}
    text = "a photograph of a man photomaker"
    [[cond, fields]] = run(all_nodes, "PhotoMakerEncode", **give, image=image, text=text)[0]
    plain, pooled = sdxl.encode_from_tokens(sdxl.tokenize(text), return_pooled=True)
    assert torch.equal(fields["pooled_output"], pooled)
    others = [i for i in range(77) if i != 5]
    torch.testing.assert_close(cond[:, others], plain[:, others])

    sd = tiny_adapters.photomaker()
    pixels = clip_preprocess(image[:1], 28)
    face = maker.model.vision_model(pixels)[2]
    face = torch.cat([face @ sd["visual_projection.weight"].T, face @ sd["visual_projection_2.weight"].T], dim=-1)
    word = plain[:, 5]

    def mlp(x, name):
        x = F.layer_norm(x, x.shape[-1:], sd[f"{name}.layernorm.weight"], sd[f"{name}.layernorm.bias"])
        x = F.gelu(F.linear(x, sd[f"{name}.fc1.weight"], sd[f"{name}.fc1.bias"]))
        return F.linear(x, sd[f"{name}.fc2.weight"], sd[f"{name}.fc2.bias"])

    fused = word + mlp(torch.cat([word, face], dim=-1), "fuse_module.mlp1")
    fused = fused + mlp(fused, "fuse_module.mlp2")
    name = "fuse_module.layer_norm"
    fused = F.layer_norm(fused, (128,), sd[f"{name}.weight"], sd[f"{name}.bias"])
    torch.testing.assert_close(cond[:, 5], fused, rtol=1e-4, atol=1e-4)

    [[without, _]] = run(all_nodes, "PhotoMakerEncode", **give, image=image, text="a photograph of a man")[0]
    assert torch.equal(without, sdxl.encode_from_tokens(sdxl.tokenize("a photograph of a man")))
    torch.save({"id_encoder": sd, "lora_weights": {"a": torch.zeros(1)}}, tmp_path / "photomaker-v1.bin")
    again = photomaker.load(str(tmp_path / "photomaker-v1.bin"))
    torch.testing.assert_close(again.merged(image, plain, 5), cond)


def test_a_run_of_the_words_number_is_left_out():
    """Runs of one weight have a number; the last token fills the row."""
    row = [("start", 1.0, 0), ("a", 1.0, 1), ("b", 1.1, 2), ("end", 1.0, 0)]
    assert without_word([row], 2) == [[row[0], row[1], row[3], row[3]]]
    assert without_word([row], 7) == [row]


def test_photomaker_says_what_does_not_fit(all_nodes, tiny, sdxl, tmp_path):
    _, clip, _ = tiny
    maker = run(all_nodes, "PhotoMakerLoader", photomaker_model_name="tiny_photomaker.safetensors")[0]
    give = {"photomaker": maker, "image": torch.zeros(1, 28, 28, 3)}
    with pytest.raises(ValueError, match="connect the CLIP of an SDXL checkpoint"):
        run(all_nodes, "PhotoMakerEncode", **give, clip=clip, text="photograph of photomaker")
    with pytest.raises(ValueError, match="number 81 of a prompt of 77 tokens; move it to the front"):
        run(all_nodes, "PhotoMakerEncode", **give, clip=sdxl, text=" " * 80 + "photomaker")
    torn = {**tiny_adapters.photomaker(), "qformer_perceiver.a": torch.zeros(1)}
    save_file(torn, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="PhotoMaker 2"):
        photomaker.load(str(tmp_path / "a.safetensors"))
    del torn["qformer_perceiver.a"], torn["fuse_module.mlp1.fc1.bias"]
    save_file(torn, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 weights, first fuse_module.mlp1.fc1.bias"):
        photomaker.load(str(tmp_path / "b.safetensors"))
    save_file({"a": torch.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="holds no identity encoder"):
        photomaker.load(str(tmp_path / "c.safetensors"))
