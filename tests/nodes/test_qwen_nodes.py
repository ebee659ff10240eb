"""Qwen-Image-Edit as a workflow has it: files, pictures in the prompt and as references, control, a picture out."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from comfy.ldm.wan.vae import WanVAE
from comfy.text_encoders import raw_tokenizers
from tests import tiny_adapters
from tests.nodes.helpers import run
from tests.text.tiny import Words, qwen_vl
from tests.tiny_families import TINY
from tests.tiny_models import random_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base folder with the files of the tiny Qwen-Image-Edit, and a vocabulary of letters."""
    base = tmp_path_factory.mktemp("qwen")
    vae = WanVAE(dim=8)
    files = {
        "diffusion_models/tiny.safetensors": random_weights(TINY["qwen_image_edit"].shapes(), 1),
        "text_encoders/tiny.safetensors": qwen_vl(width=40),
        "vae/tiny.safetensors": random_weights({k: tuple(v.shape) for k, v in vae.state_dict().items()}, 2),
        "model_patches/tiny.safetensors": tiny_adapters.diffsynth(17),
        "controlnet/tiny.safetensors": tiny_adapters.control_qwen(),
    }
    for path, weights in files.items():
        (base / "models" / path).parent.mkdir(parents=True, exist_ok=True)
        metadata = TINY["qwen_image_edit"].metadata if path.startswith("diffusion") else None
        save_file(weights, base / "models" / path, metadata=metadata)
    letters = {chr(code): code for code in range(32, 127)} | {"\n": 198} | Words.special
    vocabulary = Tokenizer(models.WordLevel(letters, unk_token="?"))
    vocabulary.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    vocabulary.add_special_tokens([token for token in Words.special if token.startswith("<")])
    (base / "qwen25").mkdir()
    vocabulary.save(str(base / "qwen25" / "tokenizer.json"))
    return base


@pytest.fixture
def parts(all_nodes, folder, monkeypatch):
    """(model, clip, vae) by the loader nodes."""
    import folder_paths
    from comfy.text_encoders import qwen_image

    monkeypatch.setattr(qwen_image, "DATA", str(folder))
    raw_tokenizers._load.cache_clear()
    folder_paths.set_base_directory(str(folder))
    model = run(all_nodes, "UNETLoader", unet_name="tiny.safetensors", weight_dtype="default")[0]
    clip = run(all_nodes, "CLIPLoader", clip_name="tiny.safetensors", type="qwen_image")[0]
    yield model, clip, run(all_nodes, "VAELoader", vae_name="tiny.safetensors")[0]
    folder_paths.set_base_directory(None)
    raw_tokenizers._load.cache_clear()


def drawn(all_nodes, model, vae, positive, negative):
    latent = run(all_nodes, "EmptySD3LatentImage", width=80, height=64, batch_size=1)[0]
    sampled = run(
        all_nodes, "KSampler", model=model, seed=3, steps=2, cfg=2.5, sampler_name="euler", scheduler="simple",
        positive=positive, negative=negative, latent_image=latent, denoise=1.0,
    )[0]  # fmt: skip
    return run(all_nodes, "VAEDecode", samples=sampled, vae=vae)[0]


def test_an_edit(all_nodes, parts, monkeypatch):
    """The pictures count twice: in the prompt and as references; control networks add to it."""
    module = sys.modules[all_nodes["TextEncodeQwenImageEditPlus"].__module__]
    monkeypatch.setattr(module, "MEGAPIXEL", 64 * 64)
    monkeypatch.setattr(module, "SEEN_PIXELS", 60 * 60)
    model, clip, vae = parts
    one, other = torch.rand(2, 1, 40, 60, 3, generator=torch.Generator().manual_seed(6))

    def prompts(**given):
        return [
            run(all_nodes, "TextEncodeQwenImageEditPlus", clip=clip, prompt=text, **given)[0] for text in ("a fox", "")
        ]

    plain, seen = prompts(), prompts(image1=one)
    both, swapped = prompts(vae=vae, image1=one, image2=other), prompts(vae=vae, image1=other, image2=one)
    assert [latent.shape for latent in both[0][0][1]["reference_latents"]] == [(1, 16, 1, 7, 10)] * 2
    model_and_control = {
        "plain": (model, plain), "seen": (model, seen), "references": (model, both), "swapped": (model, swapped),
    }  # fmt: skip
    patch = run(all_nodes, "ModelPatchLoader", name="tiny.safetensors")[0]
    mask = torch.zeros(1, 40, 60)
    mask[:, :20] = 1
    inputs = {"model": model, "model_patch": patch, "vae": vae, "image": one, "strength": 1.0, "mask": mask}
    model_and_control["patch"] = (run(all_nodes, "QwenImageDiffsynthControlnet", **inputs)[0], both)
    control = run(all_nodes, "ControlNetLoader", control_net_name="tiny.safetensors")[0]
    applied = run(
        all_nodes, "ControlNetApplyAdvanced", positive=both[0], negative=both[1], control_net=control, image=one,
        strength=1.0, start_percent=0.0, end_percent=1.0, vae=vae,
    )  # fmt: skip
    model_and_control["control"] = (model, applied)
    pictures = {name: drawn(all_nodes, patched, vae, *conds) for name, (patched, conds) in model_and_control.items()}
    for name, image in pictures.items():
        assert image.shape == (1, 64, 80, 3) and image.isfinite().all(), name
    names = list(pictures)
    for i, name in enumerate(names):
        for before in names[:i]:
            assert not torch.allclose(pictures[name], pictures[before], atol=1e-3), (name, before)
