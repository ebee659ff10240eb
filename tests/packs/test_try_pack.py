"""`tools.try_pack` finds what is wrong with a pack, and nothing else."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from tools.try_pack import __main__ as try_pack
from tools.try_pack import graphs, importing
from tools.try_pack.trial import difference

TRIED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tried")


@pytest.mark.timeout(120)
def test_a_pack_of_which_every_outcome_is_known(capsys):
    assert try_pack.main([TRIED, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["loaded"] and not report["good"] and report["problems"] == []
    assert report["empty"] == {"TriedChoice": ["file"]}
    found = {verdict["node"]: (verdict["outcome"], verdict["detail"]) for verdict in report["nodes"]}
    assert {node: outcome for node, (outcome, _) in found.items()} == {
        "TriedInvert": try_pack.SAME,
        "TriedRope": try_pack.SAME,
        "TriedLength": try_pack.SAME,
        "TriedSigmas": try_pack.SAME,
        "TriedByRank": try_pack.DIFFERS,
        "TriedByRanks": try_pack.DIFFERS,
        "TriedRandom": try_pack.VARIES,
        "TriedElsewhere": try_pack.BREAKS,
        "TriedService": try_pack.FAILS,
        "TriedChoice": try_pack.UNTRIED,
        "TriedLonely": try_pack.UNTRIED,
    }
    assert found["TriedByRank"][1] == "rank 0 and rank 1: output 0: numbers differ by 1"
    assert found["TriedByRanks"][1].startswith("one rank and several:")
    assert "not on this rank" in found["TriedElsewhere"][1] and "no service" in found["TriedService"][1]
    assert "NOBODY_GIVES_THIS" in found["TriedLonely"][1]


def test_what_is_no_pack_is_refused(tmp_path, capsys):
    assert try_pack.main([str(tmp_path)]) == 2
    assert "give a folder with an __init__.py" in capsys.readouterr().err


def test_a_pack_that_cannot_be_imported_is_named_with_the_cure():
    log = [
        "Traceback (most recent call last):",
        '  File "/x/custom_nodes/mine/__init__.py", line 3, in <module>',
        "ModuleNotFoundError: No module named 'cv2'",
        "",
        "Cannot import /x/custom_nodes/mine module for custom nodes",
        "[ERROR] An error occurred while retrieving information for the 'Bad' node.",
        "Traceback (most recent call last):",
        "FileNotFoundError: no list",
    ]
    assert importing.problems(log, "mine") == [
        "it could not be imported: ModuleNotFoundError: No module named 'cv2'; pip install opencv-python-headless"
    ]
    assert importing.problems(log, "other") == []
    log[2:4] = ["RuntimeError: Failed to import x because of:", "no y"]
    assert importing.problems(log, "mine") == [
        "it could not be imported: RuntimeError: Failed to import x because of: no y"
    ]
    assert importing.undescribed(log) == {"Bad": "FileNotFoundError: no list"}


def test_values_for_inputs():
    assert graphs.constant("width", "INT", {"default": 1024, "min": 16}) == 64
    assert graphs.constant("width", "INT", {"default": 1024, "min": 256}) == 256
    assert graphs.constant("strength", "FLOAT", {"min": 2}) == 2.0
    assert graphs.constant("how", ["a", "b"], {"default": "b"}) == "b"
    assert graphs.constant("how", "COMBO", {"options": ["a", "b"], "default": "c"}) == "a"
    with pytest.raises(graphs.NoGraph, match="'how' are empty"):
        graphs.constant("how", [], {})


def test_inputs_of_v3_nodes_that_stand_for_others():
    text = {"required": {"t": ["STRING", {"default": "x"}]}}
    grown = {"template": {"input": text, "min": 2, "prefix": "t", "max": 9}}
    assert [part[:2] for part in graphs.flat("v", "COMFY_AUTOGROW_V3", grown)] == [
        ("v.t0", "STRING"),
        ("v.t1", "STRING"),
    ]
    named = {"template": {"input": text, "min": 0, "names": ["a", "b"]}}
    assert [part[0] for part in graphs.flat("v", "COMFY_AUTOGROW_V3", named)] == ["v.a"]
    chosen = {"options": [{"key": "one", "inputs": text}, {"key": "two", "inputs": {}}]}
    parts = list(graphs.flat("how", "COMFY_DYNAMICCOMBO_V3", chosen))
    assert parts == [("how", ["one"], {}), ("how.t", "STRING", {"default": "x"})]
    match = {"template": {"template_id": "t", "allowed_types": "IMAGE,MASK"}}
    assert [part[:2] for part in graphs.flat("any", "COMFY_MATCHTYPE_V3", match)] == [("any", "IMAGE,MASK")]


def test_what_counts_as_a_difference():
    array = np.arange(4, dtype=np.float32)
    same = {"0": [("[0]", "tensor [4]", array), ("[1]", "plain", 0.5), ("[2]", "plain", "text")]}
    near = {"0": [("[0]", "tensor [4]", array + 1e-4), ("[1]", "plain", 0.50001), ("[2]", "plain", "text")]}
    assert difference(same, near, 1e-3) == ""
    assert "numbers differ by" in difference(same, near, 1e-6)
    assert difference(same, {}, 1) == "outputs ['0'] are missing on one side"
    assert difference(same, {"0": same["0"][:2]}, 1) == "output 0 has 3 parts, or 2"
    assert "tensor [4], or tensor [1]" in difference(same, {"0": [("[0]", "tensor [1]", array[:1]), *same["0"][1:]]}, 1)
