"""A V1 pack that lists folders while it is imported and when it is asked for its inputs, and reads the environment."""

import os

import folder_paths

MODELS = [os.listdir(path) for paths, _ in folder_paths.folder_names_and_paths.values() for path in paths
          if os.path.dirname(path) == folder_paths.models_dir]  # fmt: skip
FOLDERS = [folder_paths.get_input_directory(), folder_paths.get_output_directory(), folder_paths.get_temp_directory(),
           folder_paths.get_user_directory(), *folder_paths.get_folder_paths("custom_nodes")]  # fmt: skip
FOUND = [os.path.isdir(folder) for folder in FOLDERS]


class SampleFolders:
    CATEGORY = "samples"
    FUNCTION = "tell"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        names = [name for name in os.listdir(folder_paths.get_input_directory()) if name.endswith(".png")]
        return {"required": {"where": (["input", *names],)}}

    def tell(self, where):
        flags = (os.environ.get("HF_HUB_DISABLE_TELEMETRY"), os.environ.get("DO_NOT_TRACK"))
        return (f"{all(FOUND)} {len(MODELS) >= 19} {'-'.join(map(str, flags))}",)


NODE_CLASS_MAPPINGS = {"SampleFolders": SampleFolders}
