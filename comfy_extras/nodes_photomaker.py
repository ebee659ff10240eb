"""PhotoMaker for SDXL: a face of a picture in the prompt."""

from __future__ import annotations

from typing import Any

import torch

import comfy.photomaker
import folder_paths
from comfy_api.latest import io
from comfy_nodes.conditioning import need_clip
from comfy_nodes.model_files import watches_files
from comfy_nodes.v3 import extension

WORD = "photomaker"


@watches_files(photomaker_model_name="photomaker")
class PhotoMakerLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PhotoMakerLoader",
            category="_for_testing/photomaker",
            inputs=[io.Combo.Input("photomaker_model_name", options=folder_paths.get_filename_list("photomaker"))],
            outputs=[io.Photomaker.Output()],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, photomaker_model_name: str):
        path = folder_paths.get_full_path_or_raise("photomaker", photomaker_model_name)
        return io.NodeOutput(comfy.photomaker.load(path))

    load_photomaker_model = execute


def without_word(rows: list[list[Any]], number: int) -> list[list[Any]]:
    """Rows of (token, weight, word number) without the word `number`, as long as before: the last token is repeated."""
    out = []
    for row in rows:
        kept = [token for token in row if token[2] != number]
        out.append(kept + [row[-1]] * (len(row) - len(kept)))
    return out


class PhotoMakerEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PhotoMakerEncode",
            category="_for_testing/photomaker",
            inputs=[
                io.Photomaker.Input("photomaker"),
                io.Image.Input("image"),
                io.Clip.Input("clip"),
                io.String.Input("text", multiline=True, dynamic_prompts=True, default=f"photograph of {WORD}"),
            ],
            outputs=[io.Conditioning.Output()],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, photomaker: Any, image: torch.Tensor, clip: Any, text: str):
        """The face goes into the token before the word; words are counted by spaces, as if each were one token."""
        need_clip(clip)
        words = text.split(" ")
        number = words.index(WORD) + 1 if WORD in words else None
        tokens = clip.tokenize(text, return_word_ids=True)
        if number is not None:
            tokens = {name: without_word(rows, number) for name, rows in tokens.items()}
        cond, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
        if number is not None:
            cond = photomaker.merged(image, cond, number - 1)
        return io.NodeOutput([[cond, {"pooled_output": pooled}]])

    apply_photomaker = execute


comfy_entrypoint = extension(PhotoMakerLoader, PhotoMakerEncode)
