"""UNets: patch points, control, what is refused, file layouts, guidance nodes, and rows on several ranks."""

from __future__ import annotations

import types

import pytest
import torch

import comfy.model_base
import comfy.model_detection
import comfy.supported_models
import comfy.utils
from comfy.ldm.modules import attention
from comfy.ldm.modules.diffusionmodules import openaimodel
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.missing import FeatureMissingError
from comfy.text_encoders.openclip import from_openclip, to_openclip
from tests.parallel.tiny import UNET, tiny_unet


def call(network, height=9, width=13, batch=2, options=None, control=None):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    x, context, y = draw(batch, 4, height, width), draw(batch, 5, 24), draw(batch, 48)
    times = torch.linspace(10, 900, batch)
    return network(x, times, context=context, y=y, control=control, transformer_options=options or {})


@pytest.fixture(scope="module")
def network():
    return tiny_unet()


@pytest.mark.parametrize("height,width", [(8, 8), (9, 13), (1, 5)])
def test_odd_sizes_keep_their_size(network, height, width):
    assert call(network, height, width).shape == (2, 4, height, width)


def test_rows_do_not_see_one_another(network):
    both, alone = call(network), call(network, batch=2)[:1]
    torch.testing.assert_close(both[:1], alone)


def test_every_patch_is_called_with_what_packs_expect(network):
    seen = []

    def around(name):
        def patch(*args):
            extra = args[-1]
            seen.append((name, extra["block"], extra.get("block_index"), extra["transformer_index"]))
            assert extra["original_shape"] == [2, 4, 9, 13]
            values = args[:-1]
            return values[0] if len(values) == 1 else values

        return patch

    kinds = [
        "attn1_patch", "attn1_output_patch", "attn2_patch", "attn2_output_patch", "middle_patch", "input_block_patch",
        "input_block_patch_after_skip", "output_block_patch",
    ]  # fmt: skip
    patches = {kind: [around(kind)] for kind in kinds}
    patches["emb_patch"] = [lambda emb, channels, options: seen.append(("emb_patch", channels)) or emb]
    plain, patched = call(network), call(network, options={"patches": patches})
    torch.testing.assert_close(patched, plain)
    assert seen[0] == ("emb_patch", 32)
    of = {kind: [entry[1:] for entry in seen if entry[0] == kind] for kind in kinds}
    assert [block for block, _, _ in of["input_block_patch"]] == [("input", i) for i in range(4)]
    assert [block for block, _, _ in of["output_block_patch"]] == [("output", i) for i in range(4)]
    order = [(("input", 3), 0, 0), (("input", 3), 1, 0), (("middle", 0), 0, 1), (("output", 0), 0, 2)]
    assert all(of[kind] == order for kind in kinds[:5])


def test_attention_patches_change_inputs_and_outputs(network):
    def halved(n, context, value, extra):
        assert extra["n_heads"] == 2 and extra["dim_head"] == 32
        return n, context, value * 0.5

    options = {"patches": {"attn1_patch": [halved]}}
    doubled = {"patches": {"attn1_patch": [halved], "attn1_output_patch": [lambda n, extra: n * 2]}}
    assert not torch.allclose(call(network, options=options), call(network))
    assert not torch.allclose(call(network, options=doubled), call(network, options=options))


@pytest.mark.parametrize("place,times", [(("input", 3), 2), (("input", 3, 1), 1), (("middle", 0), 1)])
@pytest.mark.parametrize("kind", ["attn1", "attn2"])
def test_attentions_are_replaced(network, kind, place, times):
    calls = []

    def replacement(q, k, v, extra):
        calls.append(extra["block_index"])
        return attention.attention_basic(q, k, v, extra["n_heads"])

    options = {"patches_replace": {kind: {place: replacement}}}
    torch.testing.assert_close(call(network, options=options), call(network), rtol=1e-4, atol=1e-5)
    assert len(calls) == times


def test_an_attention_override_sees_every_attention(network):
    count = []

    def override(function, *args, **kwargs):
        count.append(kwargs["transformer_options"]["block"])
        return function(*args, **kwargs)

    options = {"optimized_attention_override": override}
    torch.testing.assert_close(call(network, options=options), call(network))
    assert len(count) == 2 * 4


def test_control_is_taken_from_the_end_of_each_list(network):
    middle = torch.full((2, 64, 5, 7), 0.3)
    outputs = [torch.zeros(2, 32, 9, 13), None, torch.full((2, 64, 5, 7), 0.2)]
    control = {"middle": [middle], "output": outputs, "input": []}
    changed = call(network, control=control)
    assert not torch.allclose(changed, call(network))
    torch.testing.assert_close(call(network, control=control), changed)  # the caller's lists are as before
    none = {"middle": [torch.zeros_like(middle)], "output": [], "input": [torch.zeros(2, 32, 9, 13)]}
    torch.testing.assert_close(call(network, control=none), call(network))


def test_control_of_another_size_is_left_out(network, caplog):
    torch.testing.assert_close(call(network, control={"middle": [torch.ones(2, 64, 9, 9)]}), call(network))
    assert "does not fit" in caplog.text


def test_a_replaced_forward_timestep_embed_is_used_and_keeps_rows_together(network, monkeypatch):
    original, calls = openaimodel.forward_timestep_embed, []

    def mine(ts, x, *args, **kwargs):
        calls.append(len(ts))
        return original(ts, x, *args, **kwargs)

    assert network.replaced_attention() is None
    monkeypatch.setattr(openaimodel, "forward_timestep_embed", mine)
    call(network)
    assert len(calls) == 4 + 1 + 4 and network.replaced_attention() is mine


def test_handlers_of_foreign_layers(network):
    class Layer(torch.nn.Module):
        def forward(self, x):
            raise AssertionError("the handler comes first")

    def handler(layer, x, emb, context, options, output_shape, time_context, frames, only):
        return x + 1

    options = {"patches": {"forward_timestep_embed_patch": [(Layer, handler)]}}
    emb, x = torch.zeros(1, 128), torch.zeros(1, 4, 2, 2)
    out = openaimodel.forward_timestep_embed([torch.nn.Identity(), Layer()], x, emb, None, options)
    torch.testing.assert_close(out, x + 1)


def test_what_is_refused():
    with pytest.raises(ValueError, match="takes a vector of 48 numbers"):
        tiny_unet()(torch.zeros(1, 4, 8, 8), torch.zeros(1), context=torch.zeros(1, 5, 24))
    with pytest.raises(ValueError, match="num_heads or num_head_channels"):
        UNetModel(**{**UNET, "num_head_channels": -1})
    with pytest.raises(FeatureMissingError, match="Stable Video Diffusion"):
        UNetModel(**UNET, use_temporal_attention=True)


@pytest.mark.parametrize("name,changes,keys", [
    ("Stable Zero123", {"in_channels": 8, "context_dim": 768, "num_heads": 8},
     ("cc_projection.weight", "cc_projection.bias")),
    ("Lotus", {"num_classes": "sequential", "adm_in_channels": 4, "use_linear_in_transformer": True}, ()),
    ("the x4 upscaler", {"in_channels": 7, "model_channels": 256, "context_dim": 1024,
                         "use_linear_in_transformer": True}, ()),
])  # fmt: skip
def test_families_that_are_only_recognised(name, changes, keys):
    config = {**UNET, "num_classes": None, "adm_in_channels": None, "model_channels": 320, **changes}
    with torch.device("meta"):
        state_dict = UNetModel(**config).state_dict()
    state_dict |= {key: torch.empty(1, device="meta") for key in keys}
    found = comfy.model_detection.model_config_from_unet(state_dict, "")
    with pytest.raises(FeatureMissingError, match=f"{name} .*not in this version"):
        found.get_model(state_dict)


def test_a_video_unet_is_named():
    shapes = {"input_blocks.0.0.weight": (320, 8, 3, 3), "label_emb.0.0.weight": (1280, 768)}
    for i, block in enumerate((1, 2, 4, 5, 7, 8, 10, 11)):
        shapes[f"input_blocks.{block}.0.in_layers.0.weight"] = (320,)
        shapes[f"input_blocks.{block}.0.out_layers.3.weight"] = (320, 320, 3, 3)
        if i < 6:
            inner = f"input_blocks.{block}.1."
            shapes[f"{inner}transformer_blocks.0.attn2.to_k.weight"] = (320, 1024)
            shapes[f"{inner}proj_in.weight"] = (320, 320)
            shapes[f"{inner}time_stack.0.attn1.to_q.weight"] = (320, 320)
    shapes |= {f"input_blocks.{i}.0.op.weight": (320, 320, 3, 3) for i in (3, 6, 9)}
    state_dict = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    found = comfy.model_detection.model_config_from_unet(state_dict, "")
    assert type(found).__name__ == "SVD_img2vid"
    with pytest.raises(FeatureMissingError, match="Stable Video Diffusion is not in this version"):
        found.get_model(state_dict)


# --- models ------------------------------------------------------------------------------------------------------------


def model(name, **changes):
    config = getattr(comfy.supported_models, name)({**UNET, **changes})
    config.unet_config |= {"num_heads": -1, "num_head_channels": 32}
    return config.get_model({}, device=torch.device("meta"))


def test_inpainting_channels():
    sd = model("SD15", in_channels=9, num_classes=None, adm_in_channels=None)
    noise, image = torch.zeros(2, 4, 8, 12), torch.rand(1, 4, 8, 12)
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 32:] = 1
    given = {"noise": noise, "device": torch.device("cpu")}
    with_mask = sd.concat_cond(**given, denoise_mask=mask, latent_image=image)
    assert with_mask.shape == (2, 5, 8, 12)
    torch.testing.assert_close(with_mask[:, 1:], image.expand(2, -1, -1, -1))
    assert with_mask[0, 0, 0].tolist() == [0.0] * 4 + [1.0] * 8
    other = sd.concat_cond(**given, concat_mask=mask, concat_latent_image=image)
    torch.testing.assert_close(other[:, 1:], image.expand(2, -1, -1, -1) * 0.18215)
    blank = sd.concat_cond(**given)
    assert blank[1, :, 3, 5].tolist() == pytest.approx([1.0, 0.8223, -0.6876, 0.6364, 0.1380])
    with pytest.raises(ValueError, match="a mask without a picture"):
        sd.concat_cond(**given, denoise_mask=mask)
    plain = model("SD15", num_classes=None, adm_in_channels=None)
    assert plain.concat_cond(**given, denoise_mask=mask, latent_image=image) is None


def test_pictures_to_edit():
    noise, image = torch.zeros(2, 4, 8, 12), torch.rand(1, 4, 16, 24)
    given = {"noise": noise, "device": torch.device("cpu")}
    edit = model("SD15_instructpix2pix", in_channels=8, num_classes=None, adm_in_channels=None)
    assert edit.concat_cond(**given, concat_latent_image=image).shape == (2, 4, 8, 12)
    assert not edit.concat_cond(**given).any()
    config = comfy.supported_models.SDXL_instructpix2pix({**UNET, "in_channels": 8})
    markers = {"edm_vpred.sigma_max": torch.tensor(120.0)}
    cosxl = config.get_model(markers, device=torch.device("meta"))
    assert cosxl.model_type is comfy.model_base.ModelType.V_PREDICTION_EDM
    assert float(cosxl.model_sampling.sigma_max) == pytest.approx(120.0)
    same = torch.rand(2, 4, 8, 12)
    torch.testing.assert_close(cosxl.concat_cond(**given, concat_latent_image=same), same * 0.13025)


def test_prediction_types():
    kinds = comfy.model_base.ModelType
    sdxl = comfy.supported_models.SDXL
    assert sdxl(dict(UNET)).model_type({}) is kinds.EPS
    v = sdxl(dict(UNET))
    assert v.model_type({"v_pred": 1, "ztsnr": 1}) is kinds.V_PREDICTION and v.sampling_settings["zsnr"]
    assert "zsnr" not in sdxl.sampling_settings
    playground = sdxl(dict(UNET))
    assert playground.model_type({"edm_mean": 1, "edm_std": 1}) is kinds.EDM
    assert type(playground.latent_format).__name__ == "SDXL_Playground_2_5"
    key = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    spread = torch.tensor([0.3, -0.3])
    assert comfy.supported_models.SD20(dict(UNET)).model_type({f"a.{key}": spread}, "a.") is kinds.V_PREDICTION
    assert comfy.supported_models.SD20(dict(UNET)).model_type({key: spread * 0.1}) is kinds.EPS
    inpaint = comfy.supported_models.SD20({**UNET, "in_channels": 9})
    assert inpaint.model_type({key: spread}) is kinds.EPS


def test_vectors_of_the_refiner_and_of_pictures():
    pooled = torch.rand(1, 1280)
    refiner = model("SDXLRefiner")
    positive = refiner.encode_adm(pooled_output=pooled, width=64, height=32, prompt_type="positive")
    negative = refiner.encode_adm(pooled_output=pooled, width=64, height=32, prompt_type="negative")
    assert positive.shape == (1, 2560)
    feature = openaimodel.timestep_embedding
    torch.testing.assert_close(positive[:, 1280:1536], feature(torch.tensor([32.0]), 256))
    torch.testing.assert_close(positive[:, -256:], feature(torch.tensor([6.0]), 256))
    torch.testing.assert_close(negative[:, -256:], feature(torch.tensor([2.5]), 256))
    unclip = model("SD21UnclipL")
    assert not unclip.encode_adm().any() and unclip.encode_adm().shape == (1, UNET["adm_in_channels"])
    embedding = torch.rand(1, 768)
    vision = types.SimpleNamespace(image_embeds=embedding)
    given = {"clip_vision_output": vision, "strength": 0.5, "noise_augmentation": 0.0}
    common = {"device": torch.device("cpu"), "seed": 7}
    one = unclip.encode_adm(unclip_conditioning=[given], **common)
    assert one.shape == (1, 1536) and (one[:, :768] - embedding * 0.5).abs().max() < 0.05
    torch.testing.assert_close(one, unclip.encode_adm(unclip_conditioning=[given], **common))
    noisy = unclip.encode_adm(unclip_conditioning=[{**given, "noise_augmentation": 0.9}], **common)
    assert (noisy[:, :768] - embedding * 0.5).abs().mean() > 0.2
    assert unclip.encode_adm(unclip_conditioning=[given, given], **common).shape == (1, 1536)


# --- files -------------------------------------------------------------------------------------------------------------


def encoder(layers, width):
    from tests.tiny_models import clip_l_shapes, random_weights

    shapes = {**clip_l_shapes(width, layers), "text_projection.weight": (width, width)}
    shapes["text_model.embeddings.token_embedding.weight"] = (50, width)
    return random_weights(shapes, 4)


def assert_same(got, want):
    assert sorted(got) == sorted(want)
    for key, value in want.items():
        assert got[key].equal(value), key


def test_openclip_keys_there_and_back():
    ours = encoder(2, 16)
    theirs = to_openclip(ours)
    assert theirs["transformer.resblocks.1.attn.in_proj_weight"].shape == (48, 16)
    assert theirs["text_projection"].equal(ours["text_projection.weight"].t())
    assert_same(from_openclip(theirs), ours)


def test_text_encoder_files_with_openclip_keys_and_without_the_last_layer():
    from comfy.text_encoders.loader import load_text_encoder_state_dicts

    def encode(weights):
        clip = load_text_encoder_state_dicts([weights])
        rows = [[(token, 1.0) for token in [1, 7, 9, 2, *[0] * 73]]]
        return clip.cond_stage_model.encode_token_weights({"h": rows})[0]

    whole = encoder(24, 64)
    last = "text_model.encoder.layers.23."
    shorter = {key: value for key, value in whole.items() if not key.startswith(last)}
    torch.testing.assert_close(encode(shorter), encode(whole))
    torch.testing.assert_close(encode(to_openclip(whole)), encode(whole))


@pytest.mark.parametrize("name,parts", [
    ("SD15", {"clip_l.": "cond_stage_model."}),
    ("SD20", {"clip_h.": "cond_stage_model.model."}),
    ("SDXL", {"clip_l.": "conditioner.embedders.0.", "clip_g.": "conditioner.embedders.1.model."}),
    ("SDXLRefiner", {"clip_g.": "conditioner.embedders.0.model."}),
])  # fmt: skip
def test_text_encoders_are_saved_as_they_are_loaded(name, parts):
    config = getattr(comfy.supported_models, name)(dict(UNET))
    weights = {f"{part}transformer.{key}": value for part in parts for key, value in encoder(2, 16).items()}
    saved = config.process_clip_state_dict_for_saving(dict(weights))
    assert all(key.startswith(tuple(parts.values())) for key in saved)
    # CLIP-L's projection is not in files of SD 1 and SDXL.
    weights.pop("clip_l.transformer.text_projection.weight", None)
    assert_same(config.process_clip_state_dict(dict(saved)), weights)


def test_old_files_of_stable_diffusion_1_lack_a_prefix():
    config = comfy.supported_models.SD15(dict(UNET))
    old = {"cond_stage_model.transformer.encoder.layers.0.layer_norm1.weight": torch.ones(2)}
    assert list(config.process_clip_state_dict(old)) == ["clip_l.transformer.text_model.encoder.layers.0.layer_norm1.weight"]


def test_packs_find_the_names_they_import():
    assert attention.SpatialTransformer is openaimodel.SpatialTransformer
    assert isinstance(model("SSD1B"), comfy.model_base.SDXL)
    assert comfy.model_base.Timestep(8)(torch.tensor([3.0])).shape == (1, 8)
    assert ("input_blocks.0.0.weight", "conv_in.weight") in comfy.utils.UNET_MAP_BASIC
    assert comfy.utils.unet_to_diffusers({}) == {}
