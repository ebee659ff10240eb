"""Draw the pictures that the page's templates dialog shows for our workflows: each is run, and what it saves is shown.

python -m tests.web.thumbnails [NAME ...]      writes demo/example_workflows/*.jpg, of all or of those whose name has NAME
"""

from __future__ import annotations

import glob
import io
import json
import math
import os
import sys
import tempfile
from typing import Any

from PIL import Image

from app import demo
from tests.e2e.server import Server

from .browser import Browser
from .test_page import READY

SIDE, GAP = 384, 12  # pixels; the dialog shows squares of about 300
PAPER = (64, 64, 68)


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """One square of SIDE pixels with all pictures, in rows of equal length."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    gap = GAP if columns > 1 else 0
    cell = (SIDE - gap * (columns + 1)) // columns
    page = Image.new("RGB", (SIDE, SIDE), PAPER)
    top = (SIDE - rows * cell - (rows - 1) * gap) // 2
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        at = (gap + column * (cell + gap), top + row * (cell + gap))
        page.paste(picture.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS), at)
    return page


def draw(server: Server, browser: Browser, graph: dict[str, Any]) -> list[Image.Image]:
    """Run a workflow in the page's form; the pictures it saved."""
    browser.run(f"app.loadGraphData({json.dumps(graph)})")
    prompt = browser.run("app.graphToPrompt().then(made => made.output)")
    outputs = server.run(prompt, timeout=300).outputs
    images = [image for number in sorted(outputs, key=int) for image in outputs[number].get("images", ())]
    saved = [image for image in images if image["type"] == "output"]
    return [Image.open(io.BytesIO(server.file(image))) for image in saved]


def main(wanted: list[str]) -> None:
    """Write the pictures."""
    if not os.path.isfile(os.path.join(demo.MODELS, "checkpoints", demo.CHECKPOINT)):
        raise SystemExit(f"{demo.MODELS} has no {demo.CHECKPOINT}; train it first: python -m demo.train")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base,
        Server(base) as server,
        Browser(os.path.join(base, "profile")) as browser,
    ):
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait(READY, 60)
        for path in sorted(glob.glob(os.path.join(demo.WORKFLOWS, "*.json"))):
            if wanted and not any(part in os.path.basename(path) for part in wanted):
                continue
            with open(path, encoding="utf-8") as file:
                graph = json.load(file)
            target = path.removesuffix(".json") + ".jpg"
            sheet(draw(server, browser, graph)).save(target, quality=85)
            print(f"{target}: {os.path.getsize(target) / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
