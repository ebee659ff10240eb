"""The documentation agrees with the program: links resolve, every setting is described, the shipped YAML is complete."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import sys

import pytest
import yaml

from comfy.cli_args import build_parser
from comfy.taco_dit.core.config_manager import TacoConfig, parse_config

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = sorted(
    os.path.relpath(path, ROOT)
    for pattern in (
        "README*.md",
        "SECURITY.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "docs/*.md",
        "custom_nodes/README.md",
        "models/README.md",
    )
    for path in glob.glob(os.path.join(ROOT, pattern))
)
OURS = [
    action for group in build_parser()._action_groups if group.title == "TACO-DiT" for action in group._group_actions
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^(```|~~~).*?^\1$", re.MULTILINE | re.DOTALL)
PROGRAM = (
    r"\.venv/bin/(?:python|torchrun) (?:-m [\w.]+|main\.py|--nproc-per-node \d+ -m [\w.]+)|\./start_comfyui_gpu345\.sh"
)
COMMAND = re.compile(rf"(?<![\w/])({PROGRAM})(?: (?! )([^`\n]*?))?(?=`| {{2,}}|;|$)", re.MULTILINE)


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def anchors(text):
    """Fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sections():
    """Section name -> its keys and defaults, of the configuration's dataclasses."""
    config = dataclasses.asdict(TacoConfig())
    return {name: keys for name, keys in config.items() if isinstance(keys, dict)}


def test_there_is_documentation():
    assert len(PAGES) >= 11 and len(OURS) >= 4 and len(sections()) == 4


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    broken = []
    for link in LINK.findall(CODE.sub("", read(page))):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, fragment = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
        if not os.path.exists(os.path.join(ROOT, target)) or (fragment and fragment not in anchors(read(target))):
            broken.append(link)
    assert not broken


def test_every_page_is_reached_from_the_readme():
    linked = set(LINK.findall(read("README.md")))
    assert {page for page in PAGES if page.startswith("docs/")} <= linked


def test_every_key_is_described_in_its_section():
    text = read("docs/configuration.md")
    for name, keys in sections().items():
        part = text.split(f"\n### {name}\n", 1)[1].split("\n##", 1)[0]
        described = set(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE))
        assert described == set(keys), name


def test_described_defaults_are_true():
    text = read("docs/configuration.md")
    for name, keys in sections().items():
        part = text.split(f"\n### {name}\n", 1)[1].split("\n##", 1)[0]
        shown = dict(re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|", part, re.MULTILINE))
        assert {key: yaml.safe_load(value) for key, value in shown.items()} == {
            key: "auto" if value is None else value for key, value in keys.items()
        }, name


def test_every_flag_of_ours_is_described():
    text = read("docs/configuration.md")
    missing = [flag for action in OURS for flag in action.option_strings if f"`{flag}" not in text]
    assert not missing


def test_the_shipped_configuration_has_every_key_at_its_default():
    content = yaml.safe_load(read("taco_dit_config.yaml"))
    assert {name: set(keys) for name, keys in content.items()} == {name: set(keys) for name, keys in sections().items()}
    config = parse_config(content, "shipped")
    assert dataclasses.replace(config, source="defaults") == TacoConfig()


def test_the_plan_table_is_what_the_planner_says():
    """Run the lines printed in the page and compare with its table."""
    page = read("docs/parallel_modes.md")
    lines = next(
        code for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if "print" in code
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(lines, "docs/parallel_modes.md", "exec"), {})
    assert printed.getvalue().count("\n") == 9 and printed.getvalue() in page


def test_the_explained_plan_is_what_the_command_says(capsys):
    from comfy.taco_dit import plan

    page = read("docs/parallel_modes.md")
    flags = re.search(r"-m comfy.taco_dit.plan (.*)", page)[1].split()
    assert plan.main(flags) == 0
    assert f"```\n{capsys.readouterr().out}```" in page


def test_the_workflow_to_try_names_nodes_and_files_that_exist():
    import nodes
    from tests.tiny_models import __doc__ as files

    prompt = json.loads(read("docs/tiny_flux_api.json"))["prompt"]
    assert {node["class_type"] for node in prompt.values()} <= set(nodes.NODE_CLASS_MAPPINGS)
    assert prompt["1"]["inputs"]["ckpt_name"] in files


def test_readmes_begin_with_the_two_commands():
    for page in ("README.md", "README.zh-CN.md"):
        commands = re.findall(r"^    (\./\S+)", read(page), re.MULTILINE)[:2]
        assert commands == ["./start_comfyui_gpu345.sh", "./run_tests.sh"]
        assert all(os.access(os.path.join(ROOT, command), os.X_OK) for command in commands)


def test_the_made_up_model_is_the_one_that_is_tested():
    """Code shown in the page stands in the files that the tests run, but for indentation and line breaks."""

    def plain(code):
        return re.sub(r",?\s+(?=[)\]}])|\s+", "", code)

    files = plain(read("tests/made_up/network.py") + read("tests/made_up/family.py"))
    shown = re.findall(r"^```python\n(.*?)^```$", read("docs/adding_a_model.md"), re.MULTILINE | re.DOTALL)
    assert len(shown) >= 10
    for code in shown:
        assert plain(code) in files, code


def test_the_forms_for_issues_can_be_read():
    for path in glob.glob(os.path.join(ROOT, ".github/ISSUE_TEMPLATE/*.yml")):
        form = yaml.safe_load(read(path))
        if os.path.basename(path) != "config.yml":
            assert {"name", "description", "body"} <= set(form)
            assert all(entry["type"] in ("textarea", "checkboxes") and entry["id"] for entry in form["body"])


def test_paths_that_contributors_are_sent_to_exist():
    named = re.findall(r"`((?:comfy|tests|app|comfy_\w+)/[\w/.*]*)`", read("CONTRIBUTING.md"))
    assert len(named) > 8 and all(glob.glob(os.path.join(ROOT, path)) for path in named)


class Parsed(Exception):
    """A parser accepted the arguments."""


def commands():
    """(page, module or start script, arguments) of each command that a page shows."""
    return [
        (page, program.split()[-1], shlex.split(arguments or ""))
        for page in PAGES
        for program, arguments in COMMAND.findall(read(page))
    ]


def accept(program, arguments, monkeypatch):
    """Give the program's parser the arguments: SystemExit where it refuses them. Nothing runs after that."""
    if program in ("main.py", "./start_comfyui_gpu345.sh"):
        build_parser().parse_args(arguments)
        return
    package = importlib.util.find_spec(program)
    assert package is not None, f"there is no module {program}"
    name = f"{program}.__main__" if package.submodule_search_locations else program
    path = importlib.util.find_spec(name).origin
    if not path.startswith(ROOT + os.sep + program.split(".")[0]) or "ArgumentParser" not in read(path):
        return  # pip and pytest, and what takes a list of names
    original = argparse.ArgumentParser.parse_args

    def parse_only(parser, *given):
        original(parser, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    main = importlib.import_module(name).main
    with pytest.raises(Parsed):
        main(*[arguments] if inspect.signature(main).parameters else [])


def test_commands_name_the_python_of_the_program():
    bare = {page: re.findall(r"(?<![\w/])(?:python -m|python main\.py|torchrun --).*", read(page)) for page in PAGES}
    assert not {page: found for page, found in bare.items() if found}


def test_commands_are_accepted(monkeypatch):
    found = commands()
    assert len(found) > 50 and {"main.py", "tools.try_pack", "benchmarks.vae"} <= {program for _, program, _ in found}
    wrong = []
    for page, program, arguments in found:
        with monkeypatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as told:
            try:
                accept(program, arguments, patch)
            except SystemExit:
                wrong.append((page, program, arguments, told.getvalue()))
    assert not wrong
