"""Running templates on stand-in files, as a person would: the real page turns each into a prompt, servers run it.

A headless browser opens the official page, loads one template after the other and exports its prompt
(`app.graphToPrompt()`), so that widgets, sub-graphs, switched-off nodes and reroutes are what the page makes of them. Model
files, pictures and videos that a template names are stand-ins (`tools.template_files`). Sizes, steps and lengths are cut
down (`reduced`). Each prompt runs on one rank and on two; the results must be equal up to rounding.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.e2e.server import Server
from tests.web.browser import Browser, executable
from tools import template_files

Prompt = dict[str, dict[str, Any]]

# The largest values of inputs in a run, by the inputs' names.
LIMITS: dict[str, float] = {
    "width": 96, "height": 64, "largest_size": 96, "longer_edge": 96, "megapixels": 0.01, "length": template_files.FRAMES,
    "amount": template_files.FRAMES, "steps": 2, "batch_size": 2,
}  # fmt: skip
SECONDS = 180.0  # for one prompt
# Mean difference of two results' pixels, of 255, that is more than rounding: videos are compressed with losses.
DIFFERENT = 1.0
_VALUES = frozenset({"PrimitiveInt", "PrimitiveFloat", "INTConstant"})


@dataclass
class Run:
    """How a template went on a number of ranks."""

    seconds: float = 0.0
    error: str = ""
    outputs: list[tuple[str, Any]] = field(default_factory=list)
    """(kind, frames [n, H, W, C] or content) of everything that was saved or shown."""


@dataclass
class Report:
    """How a template went. state: `runs`, `fails`, `differs` between ranks, `no stand-in`, or `not exported`."""

    name: str
    state: str
    why: str = ""
    cut: dict[str, int] = field(default_factory=dict)
    difference: float = 0.0
    seconds: float = 0.0


# --- cutting prompts down ---------------------------------------------------------------------------------------------


def _sources(prompt: Prompt, value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """(inputs, name) of the numbers that a link leads to, through nodes that choose between values."""
    node = prompt.get(value[0]) if isinstance(value, list) and len(value) == 2 else None
    if node is None:
        return
    if node["class_type"] in _VALUES:
        yield node["inputs"], "value"
    elif node["class_type"] == "ComfySwitchNode":
        for branch in ("on_true", "on_false"):
            inner = node["inputs"].get(branch)
            if isinstance(inner, list):
                yield from _sources(prompt, inner)
            else:
                yield node["inputs"], branch


def _is_computed(prompt: Prompt, value: Any) -> bool:
    """Whether a value is a link to a calculation, whose result is not known before it runs."""
    node = prompt.get(value[0]) if isinstance(value, list) and len(value) == 2 else None
    return node is not None and node["class_type"] == "ComfyMathExpression"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _halves(prompt: Prompt) -> None:
    """Samplers that share the steps of a schedule: the first takes one, the second the other."""
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] != "KSamplerAdvanced":
            continue
        second = any(
            _is_number(part[name]) and part[name] > 0 for part, name in _numbers(prompt, inputs, "start_at_step")
        )
        for part, name in _numbers(prompt, inputs, "start_at_step"):
            part[name] = min(part[name], 1)
        for part, name in _numbers(prompt, inputs, "end_at_step"):
            if not second and inputs.get("return_with_leftover_noise") == "enable":
                part[name] = min(part[name], 1)


def _numbers(prompt: Prompt, inputs: dict[str, Any], name: str) -> list[tuple[dict[str, Any], str]]:
    value = inputs.get(name)
    return list(_sources(prompt, value)) if isinstance(value, list) else [(inputs, name)] if _is_number(value) else []


def reduced(prompt: Prompt) -> dict[str, int]:
    """Cut sizes, lengths and steps of a prompt down to `LIMITS`, in place; returns how often by input."""
    _halves(prompt)
    cut: dict[str, int] = {}
    for node in prompt.values():
        for name, limit in LIMITS.items():
            smaller = int(limit) if float(limit).is_integer() else limit
            if _is_computed(prompt, node["inputs"].get(name)):
                node["inputs"][name] = smaller
                cut[name] = cut.get(name, 0) + 1
            for inputs, key in _numbers(prompt, node["inputs"], name):
                if inputs[key] > limit:
                    inputs[key] = smaller
                    cut[name] = cut.get(name, 0) + 1
    return cut


# --- the page ----------------------------------------------------------------------------------------------------------

_EXPORT = """(async () => {
  const graph = await (await fetch('/templates/' + encodeURIComponent(NAME) + '.json')).json();
  await app.loadGraphData(graph, true, true, null, {showMissingModelsDialog: false, showMissingNodesDialog: false});
  return JSON.stringify((await app.graphToPrompt()).output);
})()"""


def exported(browser: Browser, name: str) -> Prompt:
    """The prompt that the page makes of a template. Raises RuntimeError when it cannot."""
    return json.loads(browser.run(_EXPORT.replace("NAME", json.dumps(name))))


@contextlib.contextmanager
def _page(server: Server, base: str) -> Iterator[Browser]:
    server.request("/settings", {"Comfy.TutorialCompleted": True})
    with Browser(os.path.join(base, "profile")) as browser:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait("window.app && app.graph && Object.keys(LiteGraph.registered_node_types).length > 300", 60)
        yield browser


# --- servers -----------------------------------------------------------------------------------------------------------


def _frames(content: bytes, name: str) -> np.ndarray | None:
    """Pictures [n, H, W, C], 0..255, of a picture or video; None for other files."""
    if name.lower().endswith((".mp4", ".webm", ".mkv")):
        import av

        with av.open(io.BytesIO(content)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    if name.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
        from PIL import Image, ImageSequence

        with Image.open(io.BytesIO(content)) as picture:
            mode = "RGBA" if "A" in picture.getbands() else "RGB"
            return np.stack([np.asarray(frame.convert(mode)) for frame in ImageSequence.Iterator(picture)])
    return None


def _results(server: Server, ui: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(kind, content) of what a node's ui output names."""
    for kind, entries in sorted(ui.items()):
        for entry in entries if isinstance(entries, list) else [entries]:
            if isinstance(entry, dict) and "filename" in entry:
                content = server.file({key: entry[key] for key in ("filename", "subfolder", "type") if key in entry})
                frames = _frames(content, entry["filename"])
                yield kind, content if frames is None else frames
            else:
                yield kind, entry


def run_prompt(server: Server, prompt: Prompt) -> Run:
    """A prompt to its end."""
    started = time.monotonic()
    status, content = server.request("/prompt", {"prompt": prompt})
    answer = json.loads(content or b"{}")
    if status != 200 or answer.get("node_errors"):
        return Run(error=_refusal(prompt, answer))
    done: dict[str, Any] | None = None
    while done is None and time.monotonic() < started + SECONDS:
        time.sleep(0.05)
        done = server.json(f"/history/{answer['prompt_id']}").get(answer["prompt_id"])
    seconds = time.monotonic() - started
    if done is None:
        server.request("/interrupt", {})
        return Run(seconds, f"did not end within {SECONDS:.0f} s")
    if done["status"]["status_str"] != "success":
        return Run(seconds, _failure(done["status"]["messages"]))
    outputs = sorted(done["outputs"].items())
    return Run(seconds, "", [result for _, ui in outputs for result in _results(server, ui)])


def _refusal(prompt: Prompt, answer: Mapping[str, Any]) -> str:
    errors = [
        f"{prompt[node]['class_type']}: {error.get('message')}: {error.get('details')}"
        for node, found in (answer.get("node_errors") or {}).items()
        for error in found["errors"]
    ]
    return "; ".join(errors) or str(answer.get("error"))


def _failure(messages: Sequence[Any]) -> str:
    data = next((data for kind, data in messages if kind == "execution_error"), {})
    return f"{data.get('node_type')}: {data.get('exception_type')}: {str(data.get('exception_message')).strip()}"


def difference(first: Run, second: Run) -> float:
    """The mean difference of two runs' pixels, of 255; infinite when they have other results."""
    if [kind for kind, _ in first.outputs] != [kind for kind, _ in second.outputs]:
        return float("inf")
    worst = 0.0
    for (_, one), (_, other) in zip(first.outputs, second.outputs):
        if isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and one.shape == other.shape:
            worst = max(worst, float(np.abs(one.astype(float) - other.astype(float)).mean()))
        elif isinstance(one, np.ndarray) or one != other:
            return float("inf")
    return worst


# --- all of it ---------------------------------------------------------------------------------------------------------


def _inputs_of(prompts_or_graphs: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of pictures, videos and sounds that workflows load."""
    from app.template_requirements import active_nodes

    loaders = ("LoadImage", "LoadImageMask", "LoadImageOutput", "LoadVideo", "LoadAudio")
    found = set()
    for graph in prompts_or_graphs:
        for node in active_nodes(graph):
            values = node.get("widgets_values")
            if node["type"] in loaders and isinstance(values, list) and values and isinstance(values[0], str):
                found.add(values[0].removesuffix(" [output]").removesuffix(" [input]"))
    return found


class Machinery:
    """A scratch folder with stand-ins for templates, and the servers that run them."""

    def __init__(self, base: str, graphs: Mapping[str, Mapping[str, Any]], tell: Callable[[str], None]) -> None:
        """graphs: {name: workflow}, all runnable. Raises RuntimeError without a browser."""
        from app.template_requirements import files_of

        if executable() is None:
            raise RuntimeError("--run needs Chromium, which makes prompts of templates; install it (Debian: chromium)")
        self.base, self.tell = base, tell
        self.reports: dict[str, Report] = {}
        wanted: dict[str, set[str]] = {}
        for name, graph in graphs.items():
            files = files_of(graph)
            absent = template_files.lacking(files)
            if absent:
                self.reports[name] = Report(name, "no stand-in", ", ".join(absent))
                continue
            for folder, names in files.items():
                wanted.setdefault(folder, set()).update(names)
        self.names = [name for name in graphs if name not in self.reports]
        template_files.write_models(wanted, os.path.join(base, "models"))
        template_files.write_inputs(_inputs_of([graphs[name] for name in self.names]), os.path.join(base, "input"))

    def prompts(self, server: Server) -> dict[str, Prompt]:
        """The templates' prompts, cut down."""
        out = {}
        with _page(server, self.base) as browser:
            for name in self.names:
                try:
                    prompt = exported(browser, name)
                except RuntimeError as error:
                    self.reports[name] = Report(name, "not exported", str(error).splitlines()[0])
                    continue
                self.reports[name] = Report(name, "", cut=reduced(prompt))
                out[name] = prompt
        return out

    def run(self, server: Server, prompts: Mapping[str, Prompt]) -> dict[str, Run]:
        """All prompts on one server."""
        runs = {}
        for name, prompt in prompts.items():
            runs[name] = run = run_prompt(server, prompt)
            self.tell(f"{server.ranks} rank{'s' * (server.ranks > 1)}  {run.seconds:6.1f} s  {name}  {run.error}")
        return runs

    def judge(self, name: str, runs: Mapping[int, Run]) -> None:
        """Fill in a template's report from its runs by ranks."""
        report = self.reports[name]
        failed = {ranks: run.error for ranks, run in runs.items() if run.error}
        first, *others = runs.values()
        report.seconds = first.seconds
        if failed:
            ranks = " and ".join(str(number) for number in failed)
            report.state, report.why = "fails", f"on {ranks} rank(s): {next(iter(failed.values()))}"
            return
        report.difference = max((difference(first, other) for other in others), default=0.0)
        report.state = "differs" if report.difference > DIFFERENT else "runs"
        if not first.outputs:
            report.state, report.why = "fails", "it ended without a result"


def run_templates(
    graphs: Mapping[str, Mapping[str, Any]], base: str, ranks: Sequence[int], tell: Callable[[str], None]
) -> list[Report]:
    """Run templates {name: workflow} on each of the numbers of `ranks`; what each came to, in the order given.

    Raises RuntimeError without a browser.
    """
    machinery = Machinery(base, graphs, tell)
    runs: dict[int, dict[str, Run]] = {}
    prompts: dict[str, Prompt] = {}
    for number in ranks:
        with Server(base, ranks=number) as server:
            prompts = prompts or machinery.prompts(server)
            runs[number] = machinery.run(server, prompts)
    for name in prompts:
        machinery.judge(name, {number: found[name] for number, found in runs.items()})
    return [machinery.reports[name] for name in graphs]
