"""Text encoders with small random weights against the recorded features (topic 05)."""

import pytest
import torch

from comfy import sd1_clip, sdxl_clip
from comfy.clip_model import CLIPTextModel
from comfy.text_encoders import flux, hydit, llama, sd2_clip, sd3_clip, t5_family
from comfy.text_encoders.bert import BertModel
from comfy.text_encoders.t5 import T5
from tests.goldens import golden

TOPIC = "05 text encoders"
TOLERANCE = 1e-4
DATA = golden.load_json("05_text_encoders/index.json")
MODELS = DATA.get("models", {})
COMBINED = {
    "combined_flux": (flux.FluxTokenizer, flux.FluxClipModel),
    "combined_sdxl": (sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
    "combined_sd3_no_t5": (sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(t5=False)),
}
TOKENIZERS = {
    "clip_l": sd1_clip.SDTokenizer,
    "clip_g_hidden": sdxl_clip.SDXLClipGTokenizer,
    "clip_g_masked": sdxl_clip.StableCascadeClipGTokenizer,
    "clip_h": sd2_clip.SD2ClipHTokenizer,
    "t5_flux": t5_family.t5_tokenizer_with(min_length=256),
    "t5_sd3": t5_family.T5XXLTokenizer,
    "t5_masked": t5_family.T5XXLTokenizer,
    "t5_nopad": t5_family.t5_tokenizer_with(min_length=1),
    "bert": hydit.HyditBertTokenizer,
}


def _weights(recipe):
    return golden.make_weights(recipe, DATA["set_seed"])


def _encoder(name):
    spec = MODELS[name]
    settings, config = spec["settings"], spec["config"]
    if name == "pixart_te":
        return t5_family._PixArtT5(device="meta", model_options={"t5xxl_model_config": config})
    networks = {"t5.T5": T5, "bert.BertModel": BertModel}
    named = str(settings.get("model_class", ""))
    network = next((value for key, value in networks.items() if key in named), CLIPTextModel)
    if "transformer_type" in config:
        network = llama.LanguageModel
    arguments = {key: value for key, value in settings.items() if key != "model_class"}
    return sd1_clip.SDClipModel(
        device="meta", textmodel_json_config=config, model_class=network, dtype=torch.float32, **arguments
    )


def _rows(name, prompt):
    """Rows of (token, weight) of a recorded prompt."""
    rows = MODELS[name].get("token_rows", {})
    base = prompt.removesuffix("_weighted")
    if base in rows:
        weighted = prompt.endswith("_weighted")
        return [[(token, 1.3 if weighted and i % 4 == 0 else 1.0) for i, token in enumerate(rows[base])]]
    if name == "pixart_te":
        tokenizer = t5_family.t5_tokenizer_with(min_length=1)
    else:
        tokenizer = next(value for key, value in TOKENIZERS.items() if name.startswith(key))
    return tokenizer().tokenize_with_weights(DATA["prompts"][prompt])


def _cases(combined):
    return {
        f"{name}/{prompt}": None
        for name, spec in MODELS.items()
        if name.startswith("combined_") == combined
        for prompt in spec["outputs"]
    }


def _compare(case, got, wanted, tensors, width=None):
    cond, pooled, *more = got
    fields = {"cond": cond if width is None else cond[..., :width], "pooled": pooled}
    fields.update(more[0] if more else {})
    for field, tensor_name in wanted.items():
        golden.check(TOPIC, case, fields[field].float(), tensors[tensor_name].float(), TOLERANCE)


@pytest.mark.parametrize("case", golden.cases(_cases(False)))
def test_encoder(case):
    """Features, pooled vector and mask of one encoder."""
    name, prompt = case.split("/")
    tensors = golden.load_tensors("05_text_encoders/tensors.safetensors")
    encoder = _encoder(name)
    encoder.load_sd(_weights(MODELS[name]["recipe"]))
    options = MODELS[name].get("clip_options")
    if options:
        encoder.set_clip_options(options)
    rows = _rows(name, prompt)
    if name == "clip_l_all":
        got = encoder.encode([[token for token, _ in rows[0]]])
    else:
        got = encoder.encode_token_weights(rows)
    _compare(case, got, MODELS[name]["outputs"][prompt], tensors)


@pytest.mark.parametrize("case", golden.cases(_cases(True)))
def test_family(case):
    """Whole families: tokenizer, encoders and how their features are put together."""
    name, prompt = case.split("/")
    spec = MODELS[name]
    tensors = golden.load_tensors("05_text_encoders/tensors.safetensors")
    make_tokenizer, make_model = COMBINED[name]
    options = {f"{encoder}_model_config": config for encoder, config in spec["configs"].items()}
    model = make_model(device="meta", dtype=torch.float32, model_options=options)
    for encoder, recipe in spec["recipe"].items():
        getattr(model, encoder).load_sd(_weights(recipe))
    got = model.encode_token_weights(make_tokenizer().tokenize_with_weights(DATA["prompts"][prompt]))
    want = spec["outputs"][prompt]
    width = 80 if "stored_slice" in spec else None
    if width is not None:
        assert got[0].shape[-1] == 4096 and not got[0][..., width:].any()
    _compare(case, got, want, tensors, width)
