"""Sample packs on real servers: what packs may do works, and is the same on one rank and on three."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from tests import tiny_models
from tests.e2e.server import Server
from tests.e2e.workflows import flux, node

SAMPLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "samples")
NODES = {"SampleTell", "SamplePick", "SampleRepeat", "SampleWait", "SampleDice", "SampleSaveText", "SampleStarted",
         "SampleCombine", "SampleReport", "SampleCounts", "SampleFolders", "SampleLoadPacked", "SampleLoadPackedText",
         "SampleMarks", "SamplePatch", "SampleSettings", "SampleDraw", "SampleDrawOnly",
         "SampleLook", "SampleThrough", "SampleSaveWith", "SampleFew", "SampleRead"}  # fmt: skip


pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base directory with the packs and tiny models, and no folder that the program makes."""
    folder = tmp_path_factory.mktemp("packs")
    tiny_models.write_flux(str(folder / "models"))
    shutil.copytree(SAMPLES, folder / "custom_nodes", ignore=shutil.ignore_patterns("__pycache__"))
    return str(folder)


@pytest.fixture(scope="module")
def servers(home):
    """The server with one rank, and with three."""
    running = [Server(home, 1), Server(home, 3)]
    try:
        for server in running:
            server.wait_ready()
        yield running
    finally:
        for server in running:
            server.stop()


@pytest.fixture(params=[0, 1], ids=["1-ranks", "3-ranks"])
def server(servers, request):
    return servers[request.param]


def everything():
    """A prompt in which each pack takes part and nothing is left to chance."""
    return {
        "tell": node("SampleTell", text="quiet"),
        "zero": node("SampleRepeat", value=5, times=0),
        "grow": node("SampleRepeat", value=["zero", 0], times=3),
        "pick": node("SamplePick", index=1, value0=["fail", 0], value1=["grow", 0], value2=["fail", 0]),
        "fail": node("SampleRepeat", value=0, times=-1),
        "wait": node("SampleWait", seconds=0.05),
        "save": node("SampleSaveText", text=["tell", 0], prefix="same/file"),
        "combine": node("SampleCombine", a=["save", 0], how="swap", weight=1.5, b=["started", 0]),
        "started": node("SampleStarted"),
        "image": node("EmptyImage", width=8, height=8, batch_size=1, color=0),
        "scaled": node("ImageScale", image=["image", 0], upscale_method="nearest-exact", width=16, height=16,
                       crop="disabled"),
        "counts": node("SampleCounts", after=["scaled", 0]),
        "picture": node("PreviewImage", images=["scaled", 0]),
        "report pick": node("SampleReport", value=["pick", 0]),
        "report wait": node("SampleReport", value=["wait", 0]),
        "report combine": node("SampleReport", value=["combine", 0]),
        "report counts": node("SampleReport", value=["counts", 0]),
    }  # fmt: skip


def told(outcome):
    """Messages of a prompt, without times, names of temporary files and what is throttled: in order, and the outputs.

    A node's output is told when its files are complete, while other nodes go on: where it comes is a matter of time.
    """
    messages, outputs = [], []
    for message in outcome.messages:
        if message["type"] not in ("status", "progress_state", "binary"):
            data = {key: value for key, value in message["data"].items() if key not in ("prompt_id", "timestamp")}
            if data.get("node") == "picture" and "output" in data:
                data["output"] = len(data["output"]["images"])
            ordered = outputs if message["type"] == "executed" else messages
            ordered.append((message["type"], json.dumps(data, sort_keys=True)))
    return messages, sorted(outputs)


def without(prompt, *names):
    return {name: value for name, value in prompt.items() if name not in names}


def test_everything_together_is_the_same_on_one_rank_and_three(servers):
    outcomes = [server.run(everything()) for server in servers]
    for server, outcome in zip(servers, outcomes, strict=True):
        out = outcome.outputs
        assert out["tell"]["text"] == ["LOUD"], "the prompt handler"
        assert out["report pick"]["text"] == ["8 True"] and out["report wait"]["text"] == ["0.05 True"]
        assert out["report combine"]["text"] == ["ranLOUD True"]
        assert out["report counts"]["text"] == ["1 0 True"]
        assert "fail" not in [data["node"] for data in outcome.of("executing")], "a lazy input nobody asked for"
        corner = np.asarray(Image.open(io.BytesIO(server.file(out["picture"]["images"][0]))).convert("RGB"))
        assert corner[0, 0].tolist() == [0, 0, 0] and corner[5, 5].tolist() == [255, 255, 255]
        assert server.file(out["save"]["texts"][0]) == b"LOUD"
        folder = os.path.join(server.record_folder, "output", "same")
        assert sorted(os.listdir(folder)) == [out["save"]["texts"][0]["filename"]], "written once, on rank 0"
    assert told(outcomes[0]) == told(outcomes[1])


def test_numbers_without_a_seed_are_the_same_on_all_ranks(servers):
    """They decide how many steps are made: ranks that draw other numbers would not even do the same calls."""
    for server in servers:
        for _ in range(2):
            prompt = flux(width=72, height=104)
            prompt["dice"] = node("SampleDice")
            prompt["sample"]["inputs"] |= {"steps": ["dice", 0], "seed": ["dice", 1], "denoise": ["dice", 2]}
            prompt["look"] = node("PreviewImage", images=["dice", 3])
            before = len(server.log)
            outcome = server.run(prompt)
            assert len(outcome.files()) == 2
            assert not [line for line in server.log[before:] if "disagreed" in line]


def test_packs_are_imported_by_rank_0_first_and_then_by_one_rank_after_the_other(servers):
    """They write files then, which would be corrupted otherwise."""
    for server in servers:
        prompt = {"s": node("SampleSettings"), "report": node("SampleReport", value=["s", 0])}
        assert server.run(prompt).outputs["report"]["text"] == [f"{list(range(server.ranks))} True"]


def test_what_is_hard_on_several_ranks(server):
    """Values that cannot be sent, types that cannot be hashed, files that are saved and read, outputs that are missing."""
    prompt = {
        "dice": node("SampleDice"),  # random states differ before and after a node on rank 0 alone
        "load": node("CheckpointLoaderSimple", ckpt_name="tiny_flux_dev.safetensors"),
        "draw": node("SampleDraw", model=["load", 0]),
        "only": node("SampleDrawOnly", model=["draw", 0]),
        "look": node("SampleLook", model=["draw", 0], drawn=["draw", 1]),
        "again": node("SampleLook", model=["draw", 0], drawn=["only", 0]),
        "through": node("SampleThrough", value=["look", 0]),
        "save": node("SampleSaveWith", model=["draw", 0], text=["through", 0]),
        "few": node("SampleFew"),
        "read": node("SampleRead", path=["save", 0], few=["few", 1]),
        "report": node("SampleReport", value=["read", 0]),
        "other": node("SampleReport", value=["again", 0]),
    }
    shown = server.run(prompt).outputs
    folder = os.path.join(server.record_folder, "output", "hard")
    assert os.listdir(folder) == ["file_00001_.txt"], "saved once"
    assert shown["report"]["text"] == [f"{folder}/file_00001_.txt True"]
    ranks = list(range(server.ranks))
    drawn, read = server.records("drawn"), server.records("read")
    assert list(drawn) == list(read) == ranks
    assert all(sorted(drawn[rank]) == sorted(drawn[0]) and len(drawn[rank]) == 2 for rank in ranks)
    assert all(read[rank] == ["file_00001_.txt True None"] for rank in ranks)


def test_routes_and_messages_of_packs(server):
    assert server.json("/samples/say/hi", {"times": 2})["folder"] == "web_and_routes"
    assert server.json("/api/samples/said")[-1] == "hihi"
    with server.page() as page:
        page.post({"tell": node("SampleTell", text="to the page")})
        assert page.wait("samples.tell")["data"] == {"node": "tell", "text": "to the page"}
        page.finish()


def test_web_files_of_packs(server):
    listed = server.json("/extensions")
    for path in ("/extensions/web_and_routes/sample.js", "/extensions/web_and_routes/deep/deep.js",
                 "/extensions/v3_extension/v3.js"):  # fmt: skip
        assert path in listed
        status, content = server.request(path)
        assert status == 200 and content.startswith(b"export const")
    assert server.request("/extensions/web_and_routes/style.css")[0] == 200
    assert server.request("/extensions/web_and_routes/../__init__.py")[0] in (403, 404)


def test_texts_examples_and_sub_graphs_of_packs(server):
    texts = server.json("/i18n")
    assert texts["de"] == {"samples": {"hello": "Hallo"}, "nodeDefs": {"SampleTell": {"display_name": "Sagen"}}}
    assert texts["en"]["samples"]["hello"] == "Hello"
    assert server.json("/workflow_templates")["texts"] == ["hello"]
    assert server.json("/api/workflow_templates/texts/hello.json") == {"nodes": [], "links": []}
    parts = [entry for entry in server.json("/global_subgraphs").values() if entry["name"] == "part"]
    assert [part["info"]["node_pack"] for part in parts] == ["custom_nodes.texts"]


def test_nodes_of_packs_are_described(server):
    info = server.json("/object_info")
    assert set(info) >= NODES and "SampleBroken" not in info
    assert info["SampleTell"]["display_name"] == "Tell (sample)"
    assert info["SampleTell"]["python_module"] == "custom_nodes.web_and_routes"
    assert info["SampleCombine"]["python_module"] == "custom_nodes.v3_extension"
    assert info["SampleCombine"]["input"]["required"]["how"][1]["options"] == ["join", "swap"]
    assert list(info["SampleCombine"]["input"]["optional"]) == ["b"]
    refused = {
        "that word is forbidden": node("SampleCombine", a="forbidden", how="join", weight=1.0),
        "nobody waits that long": node("SampleWait", seconds=2.0),
    }
    for reason, bad in refused.items():
        status, content = server.request("/prompt", {"prompt": {"b": bad, "r": node("SampleReport", value=["b", 0])}})
        assert status == 400 and reason in content.decode()


def test_a_pack_that_cannot_be_imported_is_named_and_stops_nobody(server):
    log = "\n".join(server.log)
    assert "ModuleNotFoundError: No module named 'a_package_that_nobody_has'" in log
    failed = [line for line in server.log if "IMPORT FAILED" in line]
    assert len(failed) == 1 and failed[0].endswith("broken")
    (told,) = [line for line in server.log if line.startswith("Cannot import")]  # once, by rank 0
    command = f"{sys.executable} -m pip install a_package_that_nobody_has"
    assert "needs the package a_package_that_nobody_has, which is not installed" in told and command in told
    assert any(
        line.strip().endswith("/prestartup")
        for line in server.log[server.log.index("Prestartup times for custom nodes:") :]
    )


def test_the_panel_names_the_package_and_the_command(server):
    """The page does so, too: see tests/web/test_panel.py."""
    status = server.json("/taco_dit/status")
    (failed,) = status["failed_packs"]
    assert failed["name"] == "broken" and failed["package"] == "a_package_that_nobody_has"
    (event,) = [event for event in status["events"] if "a_package_that_nobody_has" in event["text"]]
    assert event["text"].startswith("Cannot import")
    assert f"{sys.executable} -m pip install a_package_that_nobody_has" in event["cure"]


def test_a_patched_function_is_what_the_program_uses(servers):
    """`replacing.py` halves the sigmas: the sampler must see that on every rank."""
    pictures = []
    for server in servers:
        prompt = flux(seed=5, steps=2)
        counts = {
            "counts": node("SampleCounts", after=["decode", 0]),
            "report": node("SampleReport", value=["counts", 0]),
        }
        outcome = server.run(prompt | counts)
        assert int(outcome.outputs["report"]["text"][0].split()[1]) >= 1
        pictures.append(outcome.pictures())
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_plain_patched_plain_gives_the_plain_picture(servers):
    """A model that a pack changed, and the same model without the change, in turn and from one cached loader."""
    by_server = []
    for server in servers:
        pictures = {}
        for name in ("plain", "object", "methods", "plain again"):
            prompt = flux(seed=7, steps=2)
            prompt["marks"] = node("SampleMarks", model=["load", 0], after=["sample", 0])
            prompt["report"] = node("SampleReport", value=["marks", 0])
            if not name.startswith("plain"):
                prompt["patch"] = node("SamplePatch", model=["load", 0], how=name)
                prompt["sample"]["inputs"]["model"] = ["patch", 0]
            prompt["save"]["inputs"]["filename_prefix"] = name
            outcome = server.run(prompt)
            assert outcome.outputs["report"]["text"][0].split()[0] == str(name == "methods"), name
            pictures[name] = outcome.pictures()
        assert np.array_equal(pictures["plain"], pictures["plain again"])
        assert np.array_equal(pictures["plain"], pictures["methods"])
        assert np.abs(pictures["plain"] - pictures["object"]).max() > 3
        by_server.append(pictures)
    for name, picture in by_server[0].items():
        assert np.abs(picture - by_server[1][name]).max() <= 1, name


def test_weights_in_a_format_of_a_pack(servers):
    """Its model and text encoders make about the picture of the files that they are packed from, on all ranks."""
    by_server = []
    for server in servers:
        plain = flux(seed=3, steps=2)
        packed = flux(seed=3, steps=2) | {
            "packed": node("SampleLoadPacked", name="tiny_flux_dev_bfl.safetensors"),
            "text": node("SampleLoadPackedText", clip_name1="tiny_clip_l.safetensors",
                         clip_name2="tiny_t5xxl.safetensors"),
            "lora": node("LoraLoaderModelOnly", model=["packed", 0], lora_name="tiny_flux_kohya.safetensors",
                         strength_model=1.0),
        }  # fmt: skip
        for name in ("positive", "negative"):
            packed[name]["inputs"]["clip"] = ["text", 0]
        pictures = [server.pictures(plain)]
        for model in ("packed", "lora", "packed"):
            packed["sample"]["inputs"]["model"] = [model, 0]
            packed["save"]["inputs"]["filename_prefix"] = f"{model}{len(pictures)}"
            pictures.append(server.pictures(packed))
        whole, made, with_lora, again = pictures
        assert np.abs(whole - made).mean() < 3
        assert np.abs(with_lora - made).max() > np.abs(whole - made).max() and np.array_equal(made, again)
        by_server.append(pictures)
        if server.ranks > 1:
            plan = server.json("/taco_dit/status")["active_plan"]
            assert plan, "the engine spreads the calls of a pack's patcher"
    for one, three in zip(*by_server):
        assert np.abs(one - three).max() <= 1


def test_folders_are_there_before_packs_are(server, home):
    outcome = server.run({"f": node("SampleFolders", where="input"), "r": node("SampleReport", value=["f", 0])})
    assert outcome.outputs["r"]["text"][0].startswith("True True 1-1")
    for folder in ("input", "user", "models/loras", "models/vae_approx", "models/upscale_models", "models/unet"):
        assert os.path.isdir(os.path.join(home, folder)), folder


@pytest.mark.parametrize("ranks", [1, 3])
def test_packs_can_be_left_out(home, ranks):
    with Server(home, ranks, ["--disable-all-custom-nodes"]) as server:
        assert not NODES & set(server.json("/object_info"))
        assert not any("Cannot import" in line or "Prestartup" in line for line in server.log)
    flags = ["--disable-all-custom-nodes", "--whitelist-custom-nodes", "web_and_routes", "waiting.py", "prestartup"]
    with Server(home, ranks, flags) as server:
        assert NODES & set(server.json("/object_info")) == {"SampleTell", "SampleWait", "SampleStarted"}
        assert server.run({"tell": node("SampleTell", text="still here")}).outputs["tell"]["text"] == ["still here"]


@pytest.mark.parametrize("ranks", [1, 3])
def test_folders_elsewhere(home, tmp_path, ranks):
    """extra_model_paths: models and packs from another installation, used like one's own."""
    other, base = tmp_path / "other", tmp_path / "base"
    (other / "ckpts").mkdir(parents=True)
    base.mkdir()
    shutil.move(shutil.copy(os.path.join(home, "models/checkpoints/tiny_flux_dev.safetensors"), tmp_path),
                other / "ckpts" / "elsewhere.safetensors")  # fmt: skip
    shutil.copytree(os.path.join(SAMPLES, "prestartup"), other / "packs" / "prestartup")
    (tmp_path / "paths.yaml").write_text(
        f"a1111:\n  base_path: {other}\n  is_default: true\n  checkpoints: |\n    ckpts\n    nothing_here\n"
        "  custom_nodes: packs\n"
    )
    with Server(str(base), ranks, ["--extra-model-paths-config", str(tmp_path / "paths.yaml")]) as server:
        assert server.json("/models/checkpoints")[0] == "elsewhere.safetensors"
        folders = [str(other / "nothing_here"), str(other / "ckpts"), str(base / "models" / "checkpoints")]
        listed = server.json("/internal/folder_paths")["checkpoints"]
        assert listed[:2] == folders[:2] and folders[2] in listed
        assert server.json("/internal/folder_paths")["loras"][0] == str(base / "models" / "loras")
        assert "SampleStarted" in server.json("/object_info")
        assert len(server.run(flux("elsewhere.safetensors", steps=1)).files()) == 1
