"""Patch networks are not there yet: their nodes say so, with the name of what is missing."""

import pytest

import folder_paths
from comfy.missing import FeatureMissingError
from comfy_extras.nodes_model_patch import ModelPatchLoader, USOStyleReference


def test_the_nodes_say_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "uso.safetensors").write_bytes(b"")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "model_patches", ([str(tmp_path)], {".safetensors"}))
    folder_paths.filename_list_cache.clear()
    with pytest.raises(FeatureMissingError, match="USO.*remove its nodes"):
        ModelPatchLoader().load_model_patch("uso.safetensors")
    with pytest.raises(FileNotFoundError):
        ModelPatchLoader().load_model_patch("other.safetensors")
    with pytest.raises(FeatureMissingError, match="USO"):
        USOStyleReference().apply_patch(None, None, None)
