"""Loader nodes run again when a file they loaded has changed, and only then."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from comfy_execution.caching import fingerprint

LOADERS = {
    "CheckpointLoaderSimple": {"ckpt_name": "checkpoints"},
    "ImageOnlyCheckpointLoader": {"ckpt_name": "checkpoints"},
    "unCLIPCheckpointLoader": {"ckpt_name": "checkpoints"},
    "UNETLoader": {"unet_name": "diffusion_models"},
    "CLIPLoader": {"clip_name": "text_encoders"},
    "DualCLIPLoader": {"clip_name1": "text_encoders", "clip_name2": "text_encoders"},
    "TripleCLIPLoader": {f"clip_name{i}": "text_encoders" for i in (1, 2, 3)},
    "QuadrupleCLIPLoader": {f"clip_name{i}": "text_encoders" for i in (1, 2, 3, 4)},
    "VAELoader": {"vae_name": "vae"},
    "LoraLoader": {"lora_name": "loras"},
    "LoraLoaderModelOnly": {"lora_name": "loras"},
    "CreateHookLora": {"lora_name": "loras"},
    "CreateHookLoraModelOnly": {"lora_name": "loras"},
    "CreateHookModelAsLora": {"ckpt_name": "checkpoints"},
    "TrainLoraNode": {"existing_lora": "loras"},
    "ControlNetLoader": {"control_net_name": "controlnet"},
    "DiffControlNetLoader": {"control_net_name": "controlnet"},
    "CLIPVisionLoader": {"clip_name": "clip_vision"},
    "StyleModelLoader": {"style_model_name": "style_models"},
    "GLIGENLoader": {"gligen_name": "gligen"},
    "HypernetworkLoader": {"hypernetwork_name": "hypernetworks"},
    "ModelPatchLoader": {"name": "model_patches"},
    "PhotoMakerLoader": {"photomaker_model_name": "photomaker"},
    "UpscaleModelLoader": {"model_name": "upscale_models"},
    "ConditioningLoader": {"conditioning_name": "embeddings"},
}


def said(all_nodes, name, /, **inputs):
    """What counts for the cache about a node's files."""
    node = all_nodes[name]
    return fingerprint(getattr(node, "fingerprint_inputs" if hasattr(node, "GET_SCHEMA") else "IS_CHANGED")(**inputs))


@pytest.mark.parametrize(("name", "inputs"), LOADERS.items(), ids=LOADERS)
def test_a_changed_file_counts_as_a_changed_input(all_nodes, tiny, tiny_folder, name, inputs):
    paths = {key: tiny_folder / "models" / kind / f"{key}-watched.safetensors" for key, kind in inputs.items()}
    for path in paths.values():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"one")
    given = {**{key: path.name for key, path in paths.items()}, "strength": 1.0, "model": None}
    before = said(all_nodes, name, **given)
    assert said(all_nodes, name, **given) == before
    for path in paths.values():
        os.utime(path, ns=(1, 1))
        touched = said(all_nodes, name, **given)
        path.write_bytes(b"three")
        grown = said(all_nodes, name, **given)
        assert len({before, touched, grown}) == 3
        before = grown
    for path in paths.values():
        path.unlink()
    assert said(all_nodes, name, **given) != before


def test_tiny_vaes_and_pipelines_watch_all_their_files(all_nodes, tiny, tiny_folder):
    approx = tiny_folder / "models" / "vae_approx"
    pipeline = tiny_folder / "models" / "diffusers" / "watched"
    approx.mkdir(exist_ok=True)
    (pipeline / "transformer").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    watched = [approx / "taesd_encoder.pth", approx / "taesd_decoder.pth", pipeline / "transformer" / "config.json"]
    for path in watched:
        path.write_bytes(b"one")
    calls = (("VAELoader", {"vae_name": "taesd"}), ("DiffusersLoader", {"model_path": "watched"}))
    try:
        before = [said(all_nodes, name, **inputs) for name, inputs in calls]
        for path, changed in zip(watched, ([True, False], [True, False], [False, True])):
            path.write_bytes(b"three")
            now = [said(all_nodes, name, **inputs) for name, inputs in calls]
            assert [one != other for one, other in zip(before, now)] == changed
            before = now
        assert said(all_nodes, "VAELoader", vae_name="pixel_space") == said(
            all_nodes, "VAELoader", vae_name="pixel_space"
        )
    finally:
        shutil.rmtree(pipeline)
        for path in watched[:2]:
            path.unlink()


@pytest.mark.parametrize("name", ["LoraLoaderModelOnly", "CreateHookLoraModelOnly"])
def test_what_a_node_keeps_of_an_adapter_is_dropped_with_its_file(all_nodes, tiny, tiny_folder, name):
    path = tiny_folder / "models" / "loras" / "kept.safetensors"
    node = all_nodes[name]()
    kept = []
    for value in (1.0, 1.0, 2.0):
        if not kept or value != kept[-1]["x"][0].item():
            save_file({"x": torch.tensor([value])}, path)
        if name == "LoraLoaderModelOnly":
            node.load_lora_model_only(tiny[0], path.name, 1.0)
            kept.append(node.loaded_lora[1])
        else:
            kept.append(node.weights(str(path)))
    path.unlink()
    assert kept[0] is kept[1]
    assert kept[2]["x"].item() == 2.0


def test_pixel_space_is_the_picture_itself(all_nodes, tiny):
    vae = all_nodes["VAELoader"]().load_vae("pixel_space")[0]
    picture = torch.rand(2, 33, 47, 3)
    latent = vae.encode(picture)
    assert latent.shape == (2, 3, 33, 47)
    assert torch.equal(latent, picture.movedim(-1, 1) * 2 - 1)
    assert (vae.decode(latent) - picture).abs().max() < 1e-6
    for tiled in (vae.encode_tiled(picture), latent):
        assert (vae.decode_tiled(tiled) - picture).abs().max() < 1e-6
    with pytest.raises(ValueError, match="has 4 channels but this VAE decodes 3"):
        vae.decode(torch.zeros(1, 4, 8, 8))


def test_a_tiny_vae_is_a_vae(all_nodes, tiny, tiny_folder):
    from comfy.taesd.taesd import TAESD

    network = TAESD(latent_channels=16)
    for parameter in network.parameters():
        torch.nn.init.uniform_(parameter, -0.1, 0.1)
    paths = [tiny_folder / "models" / "vae_approx" / f"taesd3_{part}.safetensors" for part in ("encoder", "decoder")]
    paths[0].parent.mkdir(exist_ok=True)
    for path, half in zip(paths, (network.taesd_encoder, network.taesd_decoder)):
        save_file(half.state_dict(), path)
    network.vae_scale.data, network.vae_shift.data = torch.tensor(1.5305), torch.tensor(0.0609)
    try:
        assert all_nodes["VAELoader"].vae_list()[-2:] == ["taesd3", "pixel_space"]
        vae = all_nodes["VAELoader"]().load_vae("taesd3")[0]
        picture = torch.rand(1, 24, 40, 3)
        latent = vae.encode(picture)
        assert latent.shape == (1, 16, 3, 5)
        assert torch.allclose(latent, network.encode(picture.movedim(-1, 1) * 2 - 1), atol=1e-5)
        assert torch.allclose(
            vae.decode(latent), (network.decode(latent).movedim(1, -1) + 1).clamp(0, 2) / 2, atol=1e-5
        )
    finally:
        for path in paths:
            path.unlink()
