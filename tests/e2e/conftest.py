"""One folder of tiny models and test nodes for all tests here, and one server per number of ranks, kept between tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from tests import tiny_families, tiny_models
from tests.e2e.server import Server

HERE = os.path.dirname(os.path.abspath(__file__))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No test here may hang: 90 s each unless it says otherwise."""
    for item in items:
        if str(item.path).startswith(HERE) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(90))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base directory: models, an input picture, the test nodes."""
    folder = tmp_path_factory.mktemp("base")
    tiny_models.write_flux(str(folder / "models"))
    tiny_models.write_family("adapters", str(folder / "models"))
    sd3 = "checkpoints/tiny_sd3.safetensors"
    tiny_models.write_files({sd3: tiny_families.files("sd3")[sd3]}, str(folder / "models"))
    shutil.copytree(os.path.join(HERE, "pack"), folder / "custom_nodes" / "e2e_pack")
    (folder / "input").mkdir()
    y, x = np.mgrid[0:104, 0:72]
    pixels = np.stack([x * 3, y * 2, (x + y) % 256], -1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "input" / "start.png")
    return str(folder)


@pytest.fixture(scope="session")
def serve(base: str) -> Iterator[Callable[[int], Server]]:
    """`serve(ranks)`: the server with that many ranks, started on first use, or again when a test ended it."""
    running: dict[int, Server] = {}

    def get(ranks: int) -> Server:
        server = running.get(ranks)
        if server is None or server.process.poll() is not None:
            # Three ranks are programs of their own, whose sets have an order of their own.
            own = {"TACO_FORK": "0"} if ranks == 3 else {}
            server = running[ranks] = Server(base, ranks, ["--preview-method", "latent2rgb"], env=own)
            server.wait_ready()
        return server

    yield get
    for server in running.values():
        server.stop()
