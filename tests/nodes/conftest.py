from __future__ import annotations

import asyncio

import pytest

import nodes


@pytest.fixture(scope="session")
def all_nodes():
    """All node classes by type, the extra ones included."""
    failed = asyncio.run(nodes.init_builtin_extra_nodes())
    assert failed == []
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A base folder with the tiny models."""
    from tests import tiny_models

    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.write_flux(str(folder / "models"))
    tiny_models.write_family("adapters", str(folder / "models"))
    for name in ("input", "output", "temp"):
        (folder / name).mkdir()
    return folder


@pytest.fixture
def tiny(tiny_folder, all_nodes):
    """(model, clip, vae) of the tiny checkpoint, its folder being the program's."""
    import folder_paths

    folder_paths.set_base_directory(str(tiny_folder))
    yield nodes.CheckpointLoaderSimple().load_checkpoint("tiny_flux_dev.safetensors")
    folder_paths.set_base_directory(None)
