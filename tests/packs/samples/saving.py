"""A V1 pack in one file: an output node that writes a file and hands its input on."""

import os

import folder_paths


class SampleSaveText:
    CATEGORY = "samples"
    FUNCTION = "save"
    RETURN_TYPES = ("STRING", "INT")
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {}), "prefix": ("STRING", {"default": "sample"})}}

    def save(self, text, prefix):
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_.txt"
        with open(os.path.join(folder, file), "x", encoding="utf-8") as stream:
            stream.write(text)
        shown = {"filename": file, "subfolder": subfolder, "type": "output"}
        return {"ui": {"texts": [shown]}, "result": (text, counter)}


NODE_CLASS_MAPPINGS = {"SampleSaveText": SampleSaveText}
