"""Where files live: model folders, input, output, temp and user directories.

Custom nodes import this module and read or change its plain names directly, so it stays a flat list of functions over
a few module variables. `folder_names_and_paths[kind]` is `([directories], {extensions})`; entries may be added,
replaced or lengthened at any time and the next listing sees it. An empty extension set means "every file".
"""

from __future__ import annotations

import logging
import mimetypes
import os
import time
from collections.abc import Collection, Iterable
from typing import Any, Literal

supported_pt_extensions: set[str] = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft"}

base_path: str = os.path.dirname(os.path.realpath(__file__))
models_dir: str = os.path.join(base_path, "models")
output_directory: str = os.path.join(base_path, "output")
temp_directory: str = os.path.join(base_path, "temp")
input_directory: str = os.path.join(base_path, "input")
user_directory: str = os.path.join(base_path, "user")

folder_names_and_paths: dict[str, tuple[list[str], set[str]]] = {}
# directories of models that come with the program: searched and listed after all others, whenever those were added
_last_directories: set[str] = set()

# kind -> (its directories below models/, its extensions; None stands for the usual weight files)
_MODEL_FOLDERS: dict[str, tuple[tuple[str, ...], set[str] | None]] = {
    "checkpoints": (("checkpoints",), None),
    "configs": (("configs",), {".yaml"}),
    "loras": (("loras",), None),
    "vae": (("vae",), None),
    "text_encoders": (("text_encoders", "clip"), None),
    "diffusion_models": (("unet", "diffusion_models"), None),
    "clip_vision": (("clip_vision",), None),
    "style_models": (("style_models",), None),
    "embeddings": (("embeddings",), None),
    "diffusers": (("diffusers",), {"folder"}),
    "vae_approx": (("vae_approx",), None),
    "controlnet": (("controlnet", "t2i_adapter"), None),
    "gligen": (("gligen",), None),
    "upscale_models": (("upscale_models",), None),
    "custom_nodes": ((), set()),
    "hypernetworks": (("hypernetworks",), None),
    "photomaker": (("photomaker",), None),
    "classifiers": (("classifiers",), {""}),
    "model_patches": (("model_patches",), None),
    "audio_encoders": (("audio_encoders",), None),
}
_LEGACY_NAMES = {"unet": "diffusion_models", "clip": "text_encoders"}
_ANNOTATIONS = ("output", "input", "temp")
# folders of the user directory that are a program's, not a person's: no request may name them as its user
SYSTEM_USER_PREFIX = "__"

# kind -> (names, {directory: mtime}, time of the listing)
filename_list_cache: dict[str, tuple[list[str], dict[str, float], float]] = {}
extension_mimetypes_cache: dict[str, str] = {"webp": "image", "fbx": "model"}


class CacheHelper:
    """`with cache_helper:` lists every model folder at most once, however often it is asked for inside."""

    def __init__(self) -> None:
        self.cache: dict[str, tuple[list[str], dict[str, float], float]] = {}
        self.active = False

    def get(self, key: str, default: Any = None) -> Any:
        return self.cache.get(key, default) if self.active else default

    def set(self, key: str, value: tuple[list[str], dict[str, float], float]) -> None:
        if self.active:
            self.cache[key] = value

    def clear(self) -> None:
        self.cache.clear()

    def __enter__(self) -> CacheHelper:
        self.active = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.active = False
        self.clear()


cache_helper = CacheHelper()


def map_legacy(folder_name: str) -> str:
    """Today's name of a model folder kind (`unet` is `diffusion_models`, `clip` is `text_encoders`)."""
    return _LEGACY_NAMES.get(folder_name, folder_name)


# ---- directories ---------------------------------------------------------------------------------------------------


def set_base_directory(path: str | None) -> None:
    """Make `path` (None: this checkout) the parent of models, custom_nodes, input, output, temp and user.

    Resets `folder_names_and_paths` to its defaults; call it before custom nodes and extra model paths are loaded.
    """
    global base_path, models_dir, output_directory, temp_directory, input_directory, user_directory
    base_path = os.path.abspath(path) if path else os.path.dirname(os.path.realpath(__file__))
    models_dir = os.path.join(base_path, "models")
    output_directory = os.path.join(base_path, "output")
    temp_directory = os.path.join(base_path, "temp")
    input_directory = os.path.join(base_path, "input")
    user_directory = os.path.join(base_path, "user")
    folder_names_and_paths.clear()
    _last_directories.clear()
    for kind, (directories, extensions) in _MODEL_FOLDERS.items():
        found = supported_pt_extensions if extensions is None else set(extensions)
        folder_names_and_paths[kind] = ([os.path.join(models_dir, name) for name in directories], found)
    folder_names_and_paths["custom_nodes"][0].append(os.path.join(base_path, "custom_nodes"))
    filename_list_cache.clear()


def configure(args: Any) -> None:
    """Apply the directory flags of the command line (`comfy.cli_args.args`)."""
    if args.base_directory:
        set_base_directory(args.base_directory)
    if args.output_directory:
        set_output_directory(os.path.abspath(args.output_directory))
        for kind, name in (
            ("checkpoints", "checkpoints"),
            ("clip", "clip"),
            ("vae", "vae"),
            ("diffusion_models", "diffusion_models"),
            ("loras", "loras"),
        ):
            add_model_folder_path(kind, os.path.join(get_output_directory(), name))
    if args.input_directory:
        set_input_directory(os.path.abspath(args.input_directory))
    if args.temp_directory:
        set_temp_directory(os.path.join(os.path.abspath(args.temp_directory), "temp"))
    user = getattr(args, "user_directory", None)
    if user:
        set_user_directory(os.path.abspath(user))


def make_directories() -> None:
    """Create input, output, temp, user, and the folders of models and packs below `base_path` that are not there yet.

    Packs list them while they are imported and in `INPUT_TYPES`. One that cannot be made is named and left out.
    """
    folders = [input_directory, output_directory, temp_directory, user_directory]
    folders += [os.path.join(models_dir, name) for names, _ in _MODEL_FOLDERS.values() for name in names]
    for folder in [*folders, os.path.join(base_path, "custom_nodes")]:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            logging.warning("folder %s cannot be made (%s); nodes that list it do not work", folder, error.strerror)


def set_output_directory(output_dir: str) -> None:
    global output_directory
    output_directory = output_dir


def set_temp_directory(temp_dir: str) -> None:
    global temp_directory
    temp_directory = temp_dir


def set_input_directory(input_dir: str) -> None:
    global input_directory
    input_directory = input_dir


def set_user_directory(user_dir: str) -> None:
    global user_directory
    user_directory = user_dir


def get_output_directory() -> str:
    return output_directory


def get_temp_directory() -> str:
    return temp_directory


def get_input_directory() -> str:
    return input_directory


def get_user_directory() -> str:
    return user_directory


def get_system_user_directory(name: str = "system") -> str:
    """Folder of what a part of the program keeps (`__manager` for ComfyUI-Manager), which no request may read.

    It need not exist. Raises ValueError for a name of other signs than letters, digits and `_`, or that begins with `_`.
    """
    if not isinstance(name, str) or name.startswith("_") or not name.replace("_", "").isalnum():
        raise ValueError(f"{name!r} is no name of a system user: letters, digits and _ only, not beginning with _")
    return os.path.join(get_user_directory(), SYSTEM_USER_PREFIX + name)


def get_public_user_directory(user_id: str) -> str | None:
    """Folder of a user that requests may name; None for an empty name and for system users."""
    if not user_id or user_id.startswith(SYSTEM_USER_PREFIX):
        return None
    return os.path.join(get_user_directory(), user_id)


def get_directory_by_type(type_name: str | None) -> str | None:
    """Directory called `output`, `temp` or `input`; None for any other word."""
    return {"output": get_output_directory, "temp": get_temp_directory, "input": get_input_directory}.get(
        type_name or "", lambda: None
    )()


def get_input_subfolders() -> list[str]:
    """Folders below the input directory, with forward slashes, sorted."""
    root = get_input_directory()
    found = [os.path.relpath(os.path.join(at, name), root) for at, names, _ in os.walk(root) for name in names]
    return sorted(name.replace(os.sep, "/") for name in found)


# ---- annotated names: "picture.png [output]" -----------------------------------------------------------------------


def annotated_filepath(name: str) -> tuple[str, str | None]:
    """Split `name [output|input|temp]` into the bare name and the directory meant (None without annotation)."""
    for kind in _ANNOTATIONS:
        if name.endswith(f"[{kind}]"):
            return name[: -len(kind) - 2].rstrip(" "), get_directory_by_type(kind)
    return name, None


def _inside(root: str, name: str) -> str:
    """Path of `name` below `root`. Raises ValueError when it would leave the directory (`..`, absolute, drive, UNC)."""
    path = os.path.abspath(os.path.join(root, name))
    top = os.path.abspath(root)
    if path != top and not path.startswith(top.rstrip(os.sep) + os.sep):
        raise ValueError(f"file name {name!r} points outside {os.path.basename(top)!r}; use a name inside that folder")
    return path


def _without_links(path: str, root: str) -> str:
    """`path`, which lies below `root`. Raises ValueError when a symbolic link leads out of input, output and temp.

    The folders themselves may be links.
    """
    real = os.path.realpath(path)
    roots = {root, get_input_directory(), get_output_directory(), get_temp_directory()}
    for top in map(os.path.realpath, roots):
        if real == top or real.startswith(top.rstrip(os.sep) + os.sep):
            return path
    raise ValueError(
        f"{os.path.relpath(path, root)!r} is, or lies behind, a symbolic link out of {os.path.basename(root)!r}; put the file "
        "itself there, or make the folder itself the link"
    )


def get_annotated_filepath(name: str, default_dir: str | None = None) -> str:
    """Full path of an annotated name; without an annotation it lies in `default_dir` or else in the input directory.

    Raises ValueError when the name points outside that directory, also by a symbolic link.
    """
    bare, directory = annotated_filepath(name)
    root = directory or default_dir or get_input_directory()
    return _without_links(_inside(root, bare), root)


def exists_annotated_filepath(name: str) -> bool:
    """Whether an annotated name is an existing path inside its directory."""
    try:
        return os.path.exists(get_annotated_filepath(name))
    except ValueError:
        return False


# ---- model folders -------------------------------------------------------------------------------------------------


def add_model_folder_path(folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
    """Search `full_folder_path` for models of a kind, first when `is_default`; a new kind lists every file."""
    kind = map_legacy(folder_name)
    if kind not in folder_names_and_paths:
        folder_names_and_paths[kind] = ([full_folder_path], set())
        return
    paths = folder_names_and_paths[kind][0]
    if full_folder_path in paths:
        if not is_default or paths[0] == full_folder_path:
            return
        paths.remove(full_folder_path)
    paths.insert(0 if is_default else len(paths), full_folder_path)


def add_last_models(directory: str) -> None:
    """Search a directory that is laid out like models/ after a person's own, so that theirs are found and listed first.

    Kinds it has no sub-directory for keep their directories as they are.
    """
    for kind, (names, _) in _MODEL_FOLDERS.items():
        for path in (os.path.join(directory, name) for name in names):
            if os.path.isdir(path):
                _last_directories.add(path)
                add_model_folder_path(kind, path)


def get_folder_paths(folder_name: str) -> list[str]:
    """Directories of a model kind in the order of search, a new list. Raises KeyError for an unknown kind."""
    return sorted(folder_names_and_paths[map_legacy(folder_name)][0], key=_last_directories.__contains__)


def recursive_search(
    directory: str, excluded_dir_names: Collection[str] | None = None
) -> tuple[list[str], dict[str, float]]:
    """Every file below `directory` as relative path, and the mtime of each directory on the way.

    Symbolic links are followed, but a directory is entered once only, so link cycles end.
    """
    if not os.path.isdir(directory):
        return [], {}
    excluded = set(excluded_dir_names or ())
    files: list[str] = []
    times: dict[str, float] = {}
    seen: set[str] = set()
    for at, names, entries in os.walk(directory, followlinks=True, topdown=True):
        real = os.path.realpath(at)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if name not in excluded)
        files += [os.path.relpath(os.path.join(at, entry), directory) for entry in entries]
        try:
            times[at] = os.path.getmtime(at)
        except OSError:
            logging.warning("model folder %s cannot be read; its files are not listed", at)
    return files, times


def filter_files_extensions(files: Collection[str], extensions: Collection[str]) -> list[str]:
    """Those of `files` with one of `extensions` (all when empty), sorted."""
    return sorted(name for name in files if not extensions or os.path.splitext(name)[-1].lower() in extensions)


def filter_files_content_types(
    files: list[str], content_types: Iterable[Literal["image", "video", "audio", "model"]]
) -> list[str]:
    """Those of `files` whose extension belongs to one of the content types, in the given order."""
    wanted = set(content_types)
    result = []
    for name in files:
        extension = name.rsplit(".", 1)[-1].lower()
        if extension not in extension_mimetypes_cache:
            mime = mimetypes.guess_type(name, strict=False)[0]
            if not mime:
                continue
            extension_mimetypes_cache[extension] = mime.split("/")[0]
        if extension_mimetypes_cache[extension] in wanted:
            result.append(name)
    return result


def get_full_path(folder_name: str, filename: str) -> str | None:
    """Path of a model file, the first found over the kind's directories; None when missing or outside of them.

    Raises KeyError for an unknown kind.
    """
    for directory in get_folder_paths(folder_name):
        try:
            path = _inside(directory, filename)
        except ValueError:
            continue
        if os.path.isfile(path):
            return path
        if os.path.islink(path):
            logging.warning("model file %s is a link to nothing; skipped", path)
    return None


def get_full_path_or_raise(folder_name: str, filename: str) -> str:
    """Like `get_full_path`. Raises FileNotFoundError naming the file, the kind and where to put it."""
    path = get_full_path(folder_name, filename)
    if path is None:
        where = [path for path in get_folder_paths(folder_name) if path not in _last_directories]
        raise FileNotFoundError(
            f"Model in folder '{folder_name}' with filename '{filename}' not found; "
            f"put it into {' or '.join(where) or 'a folder of that kind'} and press R to refresh the list"
        )
    return path


def _list_folder(kind: str) -> tuple[list[str], dict[str, float], float]:
    last: dict[str, bool] = {}  # name -> whether only a last directory has it
    times: dict[str, float] = {}
    extensions = folder_names_and_paths[kind][1]
    for directory in get_folder_paths(kind):
        files, seen = recursive_search(directory, excluded_dir_names=[".git"])
        for name in filter_files_extensions(files, extensions):
            last.setdefault(name, directory in _last_directories)
        times.update(seen)
        # a directory that does not exist yet is noticed when it appears
        times.setdefault(directory, -1.0)
    return sorted(last, key=lambda name: (last[name], name)), times, time.perf_counter()


def own_files(folder_name: str) -> list[str]:
    """Names of a kind's files without those that come with the program. Raises KeyError for an unknown kind."""
    last = tuple(os.path.join(directory, "") for directory in _last_directories)
    found = ((name, get_full_path(folder_name, name)) for name in get_filename_list(folder_name))
    return [name for name, path in found if path is not None and not path.startswith(last)]


def _still_valid(kind: str, listing: tuple[list[str], dict[str, float], float]) -> bool:
    _, times, _ = listing
    for directory, stamp in times.items():
        try:
            if os.path.getmtime(directory) != stamp:
                return False
        except OSError:
            if stamp != -1.0:
                return False
    return all(directory in times for directory in folder_names_and_paths[kind][0])


def get_filename_list(folder_name: str) -> list[str]:
    """Names of all model files of a kind, relative to its directories, sorted; a new list.

    Those that come with the program are the last ones, so that a loader's first choice is a person's own. Listings are
    remembered until a directory below changes. Raises KeyError for an unknown kind.
    """
    kind = map_legacy(folder_name)
    listing = cache_helper.get(kind)
    if listing is None:
        listing = filename_list_cache.get(kind)
        extensions = folder_names_and_paths[kind][1]
        # a changed extension set has the same directories, so it is part of what was remembered
        if listing is None or not _still_valid(kind, listing) or _listed_extensions.get(kind) != frozenset(extensions):
            listing = _list_folder(kind)
            filename_list_cache[kind] = listing
            _listed_extensions[kind] = frozenset(extensions)
        cache_helper.set(kind, listing)
    return list(listing[0])


_listed_extensions: dict[str, frozenset[str]] = {}


# ---- names of results ----------------------------------------------------------------------------------------------


def _fill_placeholders(text: str, image_width: int, image_height: int) -> str:
    now = time.localtime()
    values = {
        "width": str(image_width),
        "height": str(image_height),
        "year": f"{now.tm_year}",
        "month": f"{now.tm_mon:02d}",
        "day": f"{now.tm_mday:02d}",
        "hour": f"{now.tm_hour:02d}",
        "minute": f"{now.tm_min:02d}",
        "second": f"{now.tm_sec:02d}",
    }
    for word, value in values.items():
        text = text.replace(f"%{word}%", value)
    return text


def get_save_image_path(
    filename_prefix: str, output_dir: str, image_width: int = 0, image_height: int = 0
) -> tuple[str, str, int, str, str]:
    """Where the next picture of a series goes: `(full_output_folder, filename, counter, subfolder, filename_prefix)`.

    Files are to be called `{filename}_{counter:05}_.<ext>`; `counter` follows the largest one present. The prefix may
    hold sub-folders and %width% %height% %year% %month% %day% %hour% %minute% %second%. The folder is created.
    Raises ValueError when the prefix leads outside `output_dir`.
    """
    if "%" in filename_prefix:
        filename_prefix = _fill_placeholders(filename_prefix, image_width, image_height)
    subfolder, filename = os.path.split(os.path.normpath(filename_prefix))
    try:
        folder = _without_links(_inside(output_dir, subfolder), output_dir)
    except ValueError:
        raise ValueError(
            f"filename_prefix {filename_prefix!r} leads outside the output folder; use a name or sub-folder inside it"
        ) from None
    os.makedirs(folder, exist_ok=True)
    start = os.path.normcase(filename) + "_"
    counter = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            name = os.path.normcase(entry.name)
            if name.startswith(start):
                digits = name[len(start) :].split("_", 1)[0].split(".", 1)[0]
                if digits.isdecimal():
                    counter = max(counter, int(digits))
    return folder, filename, counter + 1, subfolder, filename_prefix


set_base_directory(None)
