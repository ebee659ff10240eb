"""What a fresh checkout holds for a newcomer: an example picture, a note in every model folder, an example of folders."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import pytest
from PIL import Image

import folder_paths
from tools import example_picture
from utils.extra_config import load_extra_path_config, read_sections

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXAMPLE = os.path.join(ROOT, "extra_model_paths.yaml.example")


@pytest.fixture
def folders(tmp_path):
    folder_paths.set_base_directory(str(tmp_path))
    yield
    folder_paths.set_base_directory(None)


def test_the_example_picture_is_the_one_that_our_program_draws():
    with Image.open(example_picture.FILE) as picture:
        assert picture.mode == "RGB"
        shipped = np.asarray(picture).astype(int)
    assert np.abs(shipped - example_picture.draw()).max() <= 1  # a mathematics library may round a half differently


def test_every_model_folder_has_a_note_that_no_loader_lists():
    for kind in folder_paths._MODEL_FOLDERS:
        if kind != "custom_nodes":
            with open(os.path.join(ROOT, "models", kind, "README.md"), encoding="utf-8") as note:
                assert note.readline() == f"# {kind}\n"
            assert not [name for name in folder_paths.get_filename_list(kind) if name.endswith(".md")]


def test_notes_are_kept_and_models_are_not():
    def ignored(path):
        return subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=ROOT).returncode == 0

    if not os.path.exists(os.path.join(ROOT, ".git")):
        pytest.skip("not a checkout")
    assert (
        not ignored("models/loras/README.md") and not ignored("models/README.md") and not ignored("input/example.png")
    )
    assert (
        ignored("models/loras/mine.safetensors")
        and ignored("models/loras/sub/README.md")
        and ignored("models/mine.bin")
    )
    assert ignored("input/mine.png") and ignored("extra_model_paths.yaml")


def test_the_example_of_folders_names_kinds_that_exist(tmp_path, folders):
    """With the second section's comments taken away, too."""
    with open(EXAMPLE, encoding="utf-8") as file:
        lines = file.read().split("\n")
    start = next(number for number, line in enumerate(lines) if line.startswith("# webui:"))
    text = "\n".join([*lines[:start], *(line.removeprefix("# ") for line in lines[start:])])
    place = tmp_path / "extra_model_paths.yaml"
    place.write_text(text.replace("# custom_nodes: custom_nodes ", "custom_nodes: custom_nodes "))
    sections = read_sections(str(place))
    assert set(sections) == {"comfyui", "webui"} and set(read_sections(EXAMPLE)) == {"comfyui"}
    known = set(folder_paths.folder_names_and_paths)
    assert all(set(section) - {"base_path", "is_default"} <= known for section in sections.values())
    load_extra_path_config(str(place))
    paths = folder_paths.get_folder_paths("loras")
    assert paths[-3:] == [
        "/path/to/ComfyUI/models/loras",
        "/path/to/stable-diffusion-webui/models/Lora",
        "/path/to/stable-diffusion-webui/models/LyCORIS",
    ]
    assert folder_paths.get_folder_paths("custom_nodes")[-1] == "/path/to/ComfyUI/custom_nodes"
