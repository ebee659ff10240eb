"""Every node says of itself exactly what ComfyUI's says (names, order, types, defaults, bounds, outputs)."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

FACTS = Path(__file__).resolve().parents[3] / "shared" / "facts" / "node_definitions.json"
TEMPLATE_NODES = FACTS.with_name("template_nodes.json")
# newer than the recorded definitions and not in the official templates, but of the same kind as one that is
NEWER = {
    "ComfyNotNode",
    "ComfyAndNode",
    "ComfyOrNode",
    "ComfyPassOrNoneNode",
    "BatchMasksNode",
    "BatchLatentsNode",
    "BatchImagesMasksLatentsNode",
}
# choices that are newer than the recorded definitions and that official templates have
NEWER_CHOICES = {"index_timestep_zero"}
# nodes that got an output since, which official templates use
NEWER_OUTPUTS = {"PreviewAny"}
# ours, unknown to ComfyUI
OWN = ("TACODiT", "XDiT", "MultiGPU")


@pytest.fixture(scope="module")
def described(all_nodes, tmp_path_factory):
    """All node descriptions, in empty folders: the models a user has are not part of a definition."""
    import folder_paths
    from app.node_info import all_node_info

    folder_paths.set_base_directory(str(tmp_path_factory.mktemp("empty")))
    try:
        return json.loads(json.dumps(all_node_info()))
    finally:
        folder_paths.set_base_directory(None)


@pytest.fixture(scope="module")
def recorded():
    if not FACTS.is_file():
        pytest.skip("the recorded node definitions are not beside this checkout")
    return json.loads(FACTS.read_text())


def normal(info):
    """Without help texts, and with options always there."""
    info = copy.deepcopy(info)
    for key in ("description", "output_tooltips"):
        info.pop(key, None)
    for group in info["input"].values():
        for name, entry in group.items():
            if isinstance(entry, list) and not (info.get("api_node") is not None and entry[0] in ("PROMPT",)):
                options = dict(entry[1]) if len(entry) > 1 and isinstance(entry[1], dict) else {}
                options.pop("tooltip", None)
                kind = entry[0]
                # lists of files depend on what is installed
                if isinstance(kind, list) and name in ("image", "vae_name", "latent", "folder", "config_name"):
                    kind = "files"
                if "options" in options:
                    options["options"] = [choice for choice in options["options"] if choice not in NEWER_CHOICES]
                if name == "file":
                    options.pop("options", None)
                group[name] = [kind, options]
    return info


def test_all_described_nodes_are_as_recorded(described, recorded):
    wrong = {}
    for name, info in described.items():
        if name.startswith(OWN) or name not in recorded:
            continue
        if name in NEWER_OUTPUTS:
            outputs = [key for key in info if key.startswith("output") and key != "output_node"]
            info, recorded[name] = ({k: v for k, v in d.items() if k not in outputs} for d in (info, recorded[name]))
        if normal(info) != normal(recorded[name]):
            wrong[name] = (normal(info), normal(recorded[name]))
    assert wrong == {}


def test_there_are_no_unknown_nodes(described, recorded):
    in_templates = json.loads(TEMPLATE_NODES.read_text())["nodes"]
    known = {*recorded, *in_templates, *NEWER}
    assert [name for name in described if name not in known and not name.startswith(OWN)] == []


def test_most_of_comfyui_is_there(described, recorded):
    assert len(described.keys() & recorded.keys()) >= 343


def test_every_node_can_be_described(described, all_nodes):
    assert set(described) == set(all_nodes)


def test_functions_take_what_inputs_declare(all_nodes):
    import inspect

    for name, cls in all_nodes.items():
        inputs = cls.INPUT_TYPES()
        # dynamic inputs arrive as one dict: values.a, values.b -> values
        declared = [
            key.split(".")[0] if hasattr(cls, "GET_SCHEMA") else key
            for group in ("required", "optional")
            for key in inputs.get(group, {})
        ]
        function = cls.execute if hasattr(cls, "GET_SCHEMA") else getattr(cls, cls.FUNCTION)
        spec = inspect.getfullargspec(function)
        if spec.varkw is None:
            missing = [key for key in declared if key not in spec.args + spec.kwonlyargs]
            assert missing == [], f"{name} has inputs its function does not take: {missing}"
