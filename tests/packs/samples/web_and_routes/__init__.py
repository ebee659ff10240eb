"""A V1 pack with a page script, routes, a prompt handler and messages of its own."""

import os

from aiohttp import web

from server import PromptServer

WEB_DIRECTORY = "./js"
routes = PromptServer.instance.routes
_said = []


@routes.get("/samples/said")
async def said(request):
    return web.json_response(_said)


@routes.post("/samples/say/{word}")
async def say(request):
    body = await request.json()
    _said.append(request.match_info["word"] * body["times"])
    return web.json_response({"count": len(_said), "folder": os.path.basename(os.path.dirname(__file__))})


def shout(body):
    for node in body.get("prompt", {}).values():
        if node.get("class_type") == "SampleTell" and node["inputs"].get("text") == "quiet":
            node["inputs"]["text"] = "LOUD"
    return body


PromptServer.instance.add_on_prompt_handler(shout)


class SampleTell:
    """Sends a message of its own to the page, and shows a text."""

    CATEGORY = "samples"
    FUNCTION = "tell"
    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {"multiline": True})}, "hidden": {"me": "UNIQUE_ID"}}

    def tell(self, text, me):
        server = PromptServer.instance
        server.send_sync("samples.tell", {"node": me, "text": text}, server.client_id)
        return {"ui": {"text": [text]}, "result": (text,)}


NODE_CLASS_MAPPINGS = {"SampleTell": SampleTell}
NODE_DISPLAY_NAME_MAPPINGS = {"SampleTell": "Tell (sample)"}
