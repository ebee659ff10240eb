"""A V1 pack in one file: what is hard on several ranks. Each rank writes down what it saw in a file of its own."""

import os
import random

import folder_paths

RANK = os.environ.get("RANK", "0")


class Anything(str):
    """Unequal to nothing; with `__eq__` alone it cannot be hashed."""

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False


ANY = Anything("*")


def _node(function, inputs, returns, **more):
    return type("Sample", (), {"INPUT_TYPES": classmethod(lambda cls: {"required": inputs}), "RETURN_TYPES": returns,
                               "FUNCTION": "run", "CATEGORY": "samples", "run": function, **more})  # fmt: skip


def _note(label, text):
    with open(os.path.join(os.environ["TACO_TEST_RECORDS"], f"{label}.{RANK}"), "a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def _draw(self, model):
    number = random.random()
    patched = model.clone()
    patched.model_options["sample"] = number
    return patched, (lambda: number)


def _look(self, model, drawn):
    _note("drawn", f"{model.model_options['sample']} {drawn()}")
    return (str(drawn()),)


def _save(self, model, text):
    folder, name, counter, _, _ = folder_paths.get_save_image_path("hard/file", folder_paths.get_output_directory())
    path = os.path.join(folder, f"{name}_{counter:05}_.txt")
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
    return path, counter


def _read(self, path, few):
    with open(path, encoding="utf-8") as file:
        _note("read", f"{os.path.basename(path)} {len(file.read()) > 0} {few}")
    return (path,)


NODE_CLASS_MAPPINGS = {
    "SampleDraw": _node(_draw, {"model": ("MODEL",)}, ("MODEL", "DRAWN"), NOT_IDEMPOTENT=True),
    "SampleDrawOnly": _node(lambda self, model: _draw(self, model)[1:], {"model": (ANY,)}, (ANY,), NOT_IDEMPOTENT=True),
    "SampleLook": _node(_look, {"model": ("MODEL",), "drawn": (ANY,)}, ("STRING",)),
    "SampleThrough": _node(lambda self, value: (value,), {"value": (ANY,)}, (ANY,), OUTPUT_NODE=True),
    "SampleSaveWith": _node(_save, {"model": ("MODEL",), "text": ("STRING", {})}, ("STRING", "INT"), OUTPUT_NODE=True),
    "SampleFew": _node(lambda self: (1,), {}, ("INT", "INT")),
    "SampleRead": _node(_read, {"path": ("STRING", {}), "few": ("INT", {})}, ("STRING",)),
}  # fmt: skip
