"""The demo model among a person's own models, and its workflows: found last, offered only while it is there."""

from __future__ import annotations

import glob
import itertools
import json
import os
import shutil

import pytest

import folder_paths
import nodes
from app import demo, first_workflow
from app.run import apply_directories
from comfy.cli_args import build_parser
from comfy_extras.nodes_taco_dit import NODE_DISPLAY_NAME_MAPPINGS as TACO_NODES
from tests.tiny_models import write_flux

NIGHT = "taco_dit_demo_night.safetensors"
WORKFLOWS = sorted(glob.glob(os.path.join(demo.WORKFLOWS, "*.json")))
TITLE = 30  # pixels of a node's title, above its position


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder like demo/models, with empty files."""
    models = tmp_path / "shipped"
    for path in (f"checkpoints/{demo.CHECKPOINT}", f"loras/{NIGHT}"):
        (models / path).parent.mkdir(parents=True)
        (models / path).touch()
    monkeypatch.setattr(demo, "MODELS", str(models))
    yield models
    nodes.LOADED_MODULE_DIRS.pop(demo.GROUP, None)
    folder_paths.set_base_directory(None)


@pytest.fixture
def base(tmp_path):
    """A person's folder, without models."""
    (tmp_path / "base/models/checkpoints").mkdir(parents=True)
    return tmp_path / "base"


def read(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def start(base, *flags):
    apply_directories(build_parser().parse_args(["--base-directory", str(base), *flags]), str(base))


def add(base, kind, name):
    path = base / "models" / kind / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return str(path)


def test_it_is_listed_after_all_others(shipped, base, tmp_path):
    start(base)
    assert folder_paths.get_filename_list("checkpoints") == [demo.CHECKPOINT]
    assert folder_paths.get_filename_list("loras") == [NIGHT]
    own = add(base, "checkpoints", "zebra.safetensors")
    assert folder_paths.get_filename_list("checkpoints") == ["zebra.safetensors", demo.CHECKPOINT]
    assert folder_paths.get_full_path("checkpoints", "zebra.safetensors") == own
    # also after what a node pack adds later
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "zoo.safetensors").touch()
    folder_paths.add_model_folder_path("checkpoints", str(pack))
    assert folder_paths.get_filename_list("checkpoints") == [
        "zebra.safetensors", "zoo.safetensors", demo.CHECKPOINT,
    ]  # fmt: skip
    assert folder_paths.get_folder_paths("checkpoints")[-1] == str(shipped / "checkpoints")


def test_a_file_of_the_same_name_wins(shipped, base, tmp_path):
    start(base)
    shipped_file = str(shipped / "checkpoints" / demo.CHECKPOINT)
    assert folder_paths.get_full_path("checkpoints", demo.CHECKPOINT) == shipped_file
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / demo.CHECKPOINT).touch()
    folder_paths.add_model_folder_path("checkpoints", str(pack))
    assert folder_paths.get_full_path("checkpoints", demo.CHECKPOINT) == str(pack / demo.CHECKPOINT)
    own = add(base, "checkpoints", demo.CHECKPOINT)
    add(base, "checkpoints", "zebra.safetensors")
    assert folder_paths.get_full_path("checkpoints", demo.CHECKPOINT) == own
    assert folder_paths.get_filename_list("checkpoints") == [demo.CHECKPOINT, "zebra.safetensors"]


def test_extra_paths_and_save_folders_stay_a_persons_own(shipped, base, tmp_path):
    other = tmp_path / "other"
    (other / "loras").mkdir(parents=True)
    (other / "loras" / "theirs.safetensors").touch()
    (tmp_path / "paths.yaml").write_text(f"theirs:\n  base_path: {other}\n  loras: loras\n")
    start(base, "--extra-model-paths-config", str(tmp_path / "paths.yaml"), "--output-directory", str(tmp_path / "out"))
    assert folder_paths.get_filename_list("loras") == ["theirs.safetensors", NIGHT]
    for kind in ("checkpoints", "loras"):
        assert folder_paths.get_folder_paths(kind)[0] == str(base / "models" / kind)
        assert folder_paths.folder_names_and_paths[kind][0][0] == str(base / "models" / kind)
    assert folder_paths.get_folder_paths("vae") == [str(base / "models/vae"), str(tmp_path / "out/vae")]
    assert folder_paths.get_output_directory() == str(tmp_path / "out")
    with pytest.raises(FileNotFoundError) as missing:
        folder_paths.get_full_path_or_raise("loras", "absent.safetensors")
    assert str(base) in str(missing.value) and str(shipped) not in str(missing.value)


def test_without_its_files_or_with_the_flag_nothing_is_added(shipped, base, monkeypatch):
    start(base, "--no-demo")
    assert folder_paths.get_filename_list("checkpoints") == [] and demo.first_graph() is None
    demo.add_workflows()
    assert demo.GROUP not in nodes.LOADED_MODULE_DIRS
    monkeypatch.setattr(demo, "MODELS", str(shipped / "absent"))
    start(base)
    assert folder_paths.get_folder_paths("loras") == [str(base / "models/loras")]
    assert not demo.present() and demo.first_graph() is None


def test_files_that_cannot_run_alone_do_not_change_the_first_graph(shipped, base):
    start(base)
    graph = demo.first_graph()
    assert graph is not None and demo.CHECKPOINT in json.dumps(graph)
    add(base, "checkpoints", "own.safetensors")  # not a safetensors file
    write_flux(str(base / "models"))
    shutil.rmtree(base / "models" / "text_encoders")
    shutil.rmtree(base / "models" / "checkpoints")
    assert folder_paths.own_files("diffusion_models") and first_workflow.first_graph() == graph


def test_the_first_graph_is_of_a_file_that_can_run(shipped, base):
    start(base)
    write_flux(str(base / "models"))
    first = first_workflow.first_graph()
    types = {node["type"]: node["widgets_values"] for node in first["nodes"]}
    assert types["CheckpointLoaderSimple"] == ["tiny_flux_dev.safetensors"]
    assert types["KSampler"][2:4] == [20, 1.0]
    shutil.rmtree(base / "models" / "checkpoints")
    parts = first_workflow.first_graph()
    types = {node["type"]: node["widgets_values"] for node in parts["nodes"]}
    assert types["DualCLIPLoader"][:3] == ["tiny_clip_l.safetensors", "tiny_t5xxl.safetensors", "flux"]
    assert types["UNETLoader"][0] == "tiny_flux_dev_bfl.safetensors" and types["VAELoader"] == ["tiny_ae.safetensors"]
    by_id = {node["id"]: node for node in parts["nodes"]}
    for link, source, output, target, place, kind in parts["links"]:
        taken = by_id[target]["inputs"][place]
        assert link in by_id[source]["outputs"][output]["links"] and (taken["link"], taken["type"]) == (link, kind)


def test_the_page_gets_graph_and_workflows(shipped, folders, serve):
    async def body(api):
        assert await api.json("GET", "/api/taco_dit/first_screen") == {"graph": read(WORKFLOWS[0])}
        names = (await api.json("GET", "/api/workflow_templates"))[demo.GROUP]
        assert names == [os.path.basename(path)[:-5] for path in WORKFLOWS]
        for name in names:
            for kind in ("json", "jpg"):
                assert await api.status("GET", f"/api/workflow_templates/{demo.GROUP}/{name}.{kind}") == 200
        write_flux(str(folders / "models"))
        own = (await api.json("GET", "/taco_dit/first_screen"))["graph"]
        assert "tiny_flux_dev.safetensors" in json.dumps(own)

    start(folders)
    serve(body, before=lambda server: demo.add_workflows())


def test_there_is_a_workflow_for_each_node_of_ours():
    for name, title in TACO_NODES.items():
        (path,) = [path for path in WORKFLOWS if path.endswith(f" {title}.json")]
        assert name in {node["type"] for node in read(path)["nodes"]}


@pytest.mark.parametrize("path", WORKFLOWS, ids=[os.path.basename(path)[:-5] for path in WORKFLOWS])
def test_a_workflow_is_neat_and_says_what_it_is(path):
    graph = read(path)
    boxes = {}
    for node in graph["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes[node["id"]] = (x, y - TITLE, x + width, y + height)
    for a, b in itertools.combinations(boxes, 2):
        (left, top, right, bottom), other = boxes[a], boxes[b]
        assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top, (a, b)
    notes = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1 and any("\u4e00" <= letter <= "\u9fff" for letter in notes[0])
    assert any(node["type"] == "SaveImage" for node in graph["nodes"])
    assert all(node["mode"] == 0 for node in graph["nodes"])
