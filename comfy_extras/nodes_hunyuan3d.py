"""3D meshes as files; the models that make them are not in this version."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

import numpy as np

import folder_paths
from comfy_nodes.files import metadata_texts

# glTF 2.0: numbers of its component types, buffer targets and chunk kinds
FLOAT32, UINT32 = 5126, 5125
VERTEX_BUFFER, INDEX_BUFFER = 34962, 34963
JSON_CHUNK, BINARY_CHUNK = 0x4E4F534A, 0x004E4942


def _chunk(kind: int, data: bytes, filler: bytes) -> bytes:
    data += filler * (-len(data) % 4)
    return struct.pack("<II", len(data), kind) + data


def glb(vertices: np.ndarray, faces: np.ndarray, texts: dict[str, str]) -> bytes:
    """A binary glTF file of vertices [N, 3] and triangles [M, 3]. Raises ValueError for an empty mesh."""
    if len(vertices) == 0 or len(faces) == 0:
        raise ValueError(f"the mesh has {len(vertices)} vertices and {len(faces)} faces: there is nothing to save")
    points = np.ascontiguousarray(vertices, dtype="<f4")
    corners = np.ascontiguousarray(faces, dtype="<u4").reshape(-1)
    binary = points.tobytes() + corners.tobytes()
    views = [
        {"buffer": 0, "byteOffset": 0, "byteLength": points.nbytes, "target": VERTEX_BUFFER},
        {"buffer": 0, "byteOffset": points.nbytes, "byteLength": corners.nbytes, "target": INDEX_BUFFER},
    ]
    accessors = [
        {
            "bufferView": 0,
            "componentType": FLOAT32,
            "count": len(points),
            "type": "VEC3",
            "min": points.min(0).tolist(),
            "max": points.max(0).tolist(),
        },
        {"bufferView": 1, "componentType": UINT32, "count": len(corners), "type": "SCALAR"},
    ]
    scene = {
        "asset": {"version": "2.0", "generator": "TACO-DiT", **({"extras": texts} if texts else {})},
        "buffers": [{"byteLength": len(binary)}],
        "bufferViews": views,
        "accessors": accessors,
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "nodes": [{"mesh": 0}],
        "scenes": [{"nodes": [0]}],
        "scene": 0,
    }
    body = _chunk(JSON_CHUNK, json.dumps(scene).encode(), b" ") + _chunk(BINARY_CHUNK, binary, b"\0")
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


class SaveGLB:
    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"mesh": ("MESH",), "filename_prefix": ("STRING", {"default": "mesh/ComfyUI"})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True
    CATEGORY = "3d"

    def save(self, mesh: Any, filename_prefix: str, prompt: Any = None, extra_pnginfo: Any = None):
        """One file per mesh of `mesh.vertices` [B, N, 3] and `mesh.faces` [B, M, 3]."""
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        texts = metadata_texts(prompt, extra_pnginfo)
        results = []
        for position, (vertices, faces) in enumerate(zip(mesh.vertices, mesh.faces)):
            file = f"{name}_{counter + position:05}_.glb"
            with open(os.path.join(folder, file), "wb") as stream:
                stream.write(glb(vertices.cpu().float().numpy(), faces.cpu().numpy(), texts))
            results.append({"filename": file, "subfolder": subfolder, "type": "output"})
        return {"ui": {"3d": results}}


NODE_CLASS_MAPPINGS = {"SaveGLB": SaveGLB}
