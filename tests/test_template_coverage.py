"""`python -m tools.template_coverage` counts what it says."""

from __future__ import annotations

import json

import pytest

from tools import template_coverage as coverage


def test_types_of_a_workflow():
    graph = {
        "nodes": [
            {"type": "KSampler"},
            {"type": "Note"},
            {"type": "abc-1", "mode": 0},
            {"type": "Switched", "mode": 4},
            {"type": "Never", "mode": 2},
        ],
        "definitions": {
            "subgraphs": [
                {"id": "abc-1", "nodes": [{"type": "VAEDecode"}, {"type": "abc-2"}]},
                {"id": "abc-2", "nodes": [{"type": "Far"}]},
            ]
        },
    }
    assert coverage.node_types(graph) == {"KSampler", "Note", "VAEDecode", "Far"}


def test_report():
    templates = [
        coverage.Template("a", "A", ["Flux"], {"KSampler", "Note"}),
        coverage.Template("b", "B", ["Flux", "Wan"], {"KSampler", "Wan"}),
        coverage.Template("c", "C", ["Wan"], {"Wan", "Other"}),
    ]
    result = coverage.report(templates, {"KSampler"})
    assert (result["covered"], result["templates"]) == (1, 3)
    assert result["families"] == {"Flux": {"covered": 1, "templates": 2}, "Wan": {"covered": 0, "templates": 2}}
    assert result["wanted"][0] == {"type": "Wan", "templates": 2, "last_missing_of": 1}
    assert result["missing"] == {"b": ["Wan"], "c": ["Other", "Wan"]}


def test_official_templates(capsys):
    if coverage.main(["--json"]) != 0:
        pytest.skip("the templates are not installed")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["templates"] >= 250 and result["covered"] >= 80
    # every template of the family that is supported, but for two that need others beside it
    flux = result["families"]["FLUX.1"]
    assert flux["covered"] >= flux["templates"] - 2
    assert coverage.main(["--list"]) == 0
    assert f"{result['covered']} of {result['templates']} templates" in capsys.readouterr().out


def test_without_templates(monkeypatch, capsys):
    import app.frontend_management

    monkeypatch.setattr(app.frontend_management, "template_file", lambda name: None)
    assert coverage.main([]) == 1
    assert "pip install comfyui-workflow-templates-json" in capsys.readouterr().err


def test_the_templates_version_is_that_of_the_packages_in_use(monkeypatch):
    from app import frontend_management as management

    versions = management.versions()
    assert versions["installed_templates_version"] == versions["required_templates_version"]
    monkeypatch.setattr(management, "installed_version", lambda name: "9.9")
    assert management.versions()["required_templates_version"] == management.TESTED_TEMPLATES
    monkeypatch.setattr(management, "installed_version", lambda name: None)
    assert management.versions()["installed_templates_version"] is None
