"""A V3 pack: comfy_entrypoint, a relative import, on_load, and a web folder named in pyproject.toml."""

from comfy_api.latest import ComfyExtension

from .sample_nodes import SampleCombine, SampleReport


class SampleExtension(ComfyExtension):
    async def on_load(self):
        SampleReport.loaded = True

    async def get_node_list(self):
        return [SampleCombine, SampleReport]


async def comfy_entrypoint():
    return SampleExtension()
