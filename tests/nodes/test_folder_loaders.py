"""Checkpoints with a configuration file, and models in diffusers' folders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import comfy.diffusers_load as diffusers_load
import comfy.model_sampling
from tests import tiny_models
from tests.nodes.helpers import run, sample


def write_part(folder, name, weights, shards=1):
    """One part of a pipeline, in `shards` files with an index when there are several."""
    folder.mkdir(parents=True)
    if shards == 1:
        save_file(weights, folder / f"{name}.safetensors")
        return
    places = {}
    for shard in range(shards):
        file = f"{name}-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {key: value for i, (key, value) in enumerate(weights.items()) if i % shards == shard}
        save_file(part, folder / file)
        places.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def pipeline(tiny, tiny_folder):
    """The tiny checkpoint as a pipeline's folder."""
    root = tiny_folder / "models" / "diffusers" / "tiny-flux"
    if not root.exists():
        transformer = tiny_models.random_weights(tiny_models.flux_shapes(), 1)
        write_part(root / "transformer", "diffusion_pytorch_model", tiny_models.to_diffusers(transformer), 3)
        write_part(root / "text_encoder", "model", tiny_models.random_weights(tiny_models.clip_l_shapes(), 2))
        write_part(root / "text_encoder_2", "model", tiny_models.random_weights(tiny_models.t5_shapes(), 3), 2)
        write_part(root / "vae", "diffusion_pytorch_model", tiny_models.random_weights(tiny_models.vae_shapes(), 4))
        (root / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return root


def test_a_pipeline_gives_the_checkpoints_picture(all_nodes, tiny, pipeline):
    assert all_nodes["DiffusersLoader"].INPUT_TYPES()["required"]["model_path"][0] == ["tiny-flux"]
    model, clip, vae = run(all_nodes, "DiffusersLoader", model_path="tiny-flux")
    torch.testing.assert_close(sample(all_nodes, model, clip), sample(all_nodes, tiny[0], tiny[1]))
    latent = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.decode(latent), tiny[2].decode(latent))
    assert diffusers_load.load_diffusers(str(pipeline), output_vae=False, output_clip=False)[1:] == (None, None)


def test_what_is_wrong_with_a_pipeline_is_named(all_nodes, pipeline, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder other with a model_index.json"):
        run(all_nodes, "DiffusersLoader", model_path="other")
    with pytest.raises(ValueError, match="transformer holds no weights"):
        diffusers_load.load_diffusers(str(tmp_path))
    folder = tmp_path / "transformer"
    folder.mkdir()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(ValueError, match="is not an index of weight files"):
        diffusers_load.load_diffusers(str(tmp_path))
    index.write_text('{"weight_map": {"x": "../../secret.safetensors"}}')
    with pytest.raises(ValueError, match="names a file in another folder"):
        diffusers_load.load_diffusers(str(tmp_path))
    index.write_text('{"weight_map": {"x": "lost.safetensors"}}')
    with pytest.raises(ValueError, match="lost.safetensors does not exist"):
        diffusers_load.load_diffusers(str(tmp_path))
    save_file({"x": torch.zeros(1)}, folder / "lost.safetensors")
    with pytest.raises(RuntimeError, match="no diffusion model this version knows"):
        diffusers_load.load_diffusers(str(tmp_path))


def test_a_configuration_chooses_layer_and_prediction(all_nodes, tiny, tiny_folder):
    configs = tiny_folder / "models" / "configs"
    configs.mkdir(exist_ok=True)
    (configs / "plain.yaml").write_text("model: {params: {}}\n")
    (configs / "told.yaml").write_text(
        "model: {params: {parameterization: v, cond_stage_config: {params: {layer_idx: -2}}}}\n"
    )
    (configs / "broken.yaml").write_text("model: [\n")
    (configs / "list.yaml").write_text("- model\n")
    load = {"ckpt_name": "tiny_flux_dev.safetensors"}
    model, clip, _ = run(all_nodes, "CheckpointLoader", config_name="plain.yaml", **load)
    torch.testing.assert_close(sample(all_nodes, model, clip), sample(all_nodes, tiny[0], tiny[1]))
    model, clip, _ = run(all_nodes, "CheckpointLoader", config_name="told.yaml", **load)
    assert isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION)
    assert clip.layer_idx == -2
    for name, problem in (("broken", "is not YAML"), ("list", "has no section `model`")):
        with pytest.raises(ValueError, match=problem):
            run(all_nodes, "CheckpointLoader", config_name=f"{name}.yaml", **load)
