"""Hooks by which custom nodes take part in sampling: callbacks at set moments, and wrappers around core functions.

Both kinds live in `transformer_options` (or in a `ModelPatcher`) as `{type: {key: [function, ...]}}`. A wrapper is
called as `wrapper(executor, *args, **kwargs)` and continues with `executor(*args, **kwargs)`, so any number of packs
can surround the same function without knowing of one another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

KeyedFunctions = dict[Any, list[Callable[..., Any]]]


class CallbacksMP:
    """Moments at which a `ModelPatcher` calls back."""

    ON_CLONE = "on_clone"
    ON_LOAD = "on_load_after"
    ON_DETACH = "on_detach_after"
    ON_CLEANUP = "on_cleanup"
    ON_PRE_RUN = "on_pre_run"
    ON_PREPARE_STATE = "on_prepare_state"
    ON_APPLY_HOOKS = "on_apply_hooks"
    ON_REGISTER_ALL_HOOK_PATCHES = "on_register_all_hook_patches"
    ON_INJECT_MODEL = "on_inject_model"
    ON_EJECT_MODEL = "on_eject_model"

    @classmethod
    def init_callbacks(cls) -> dict[str, KeyedFunctions]:
        """An empty table with an entry per moment."""
        return _empty_table(cls)


class WrappersMP:
    """Core functions that can be wrapped, from the outermost to the innermost."""

    OUTER_SAMPLE = "outer_sample"
    PREPARE_SAMPLING = "prepare_sampling"
    SAMPLER_SAMPLE = "sampler_sample"
    PREDICT_NOISE = "predict_noise"
    CALC_COND_BATCH = "calc_cond_batch"
    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"

    @classmethod
    def init_wrappers(cls) -> dict[str, KeyedFunctions]:
        """An empty table with an entry per function."""
        return _empty_table(cls)


def _empty_table(names: type) -> dict[str, KeyedFunctions]:
    return {value: {} for name, value in vars(names).items() if name.isupper()}


def _functions(kind: str, call_type: str, options: dict[str, Any], is_model_options: bool) -> KeyedFunctions:
    """The live `{key: [function]}` of one type, created when absent."""
    if is_model_options:
        options = options.setdefault("transformer_options", {})
    return options.setdefault(kind, {}).setdefault(call_type, {})


def _lookup(kind: str, call_type: str, options: dict[str, Any], is_model_options: bool) -> KeyedFunctions:
    """As `_functions`, without creating anything."""
    if is_model_options:
        options = options.get("transformer_options", {})
    return options.get(kind, {}).get(call_type, {})


def add_callback(
    call_type: str, callback: Callable[..., Any], transformer_options: dict[str, Any], is_model_options: bool = False
) -> None:
    """Register a callback under no particular key."""
    add_callback_with_key(call_type, None, callback, transformer_options, is_model_options)


def add_callback_with_key(
    call_type: str,
    key: Any,
    callback: Callable[..., Any],
    transformer_options: dict[str, Any],
    is_model_options: bool = False,
) -> None:
    """Register a callback under `key`, by which it can be found and removed."""
    _functions("callbacks", call_type, transformer_options, is_model_options).setdefault(key, []).append(callback)


def get_callbacks_with_key(
    call_type: str, key: Any, transformer_options: dict[str, Any], is_model_options: bool = False
) -> list[Callable[..., Any]]:
    """The callbacks of one type under one key."""
    return _lookup("callbacks", call_type, transformer_options, is_model_options).get(key, [])


def get_all_callbacks(
    call_type: str, transformer_options: dict[str, Any], is_model_options: bool = False
) -> list[Callable[..., Any]]:
    """The callbacks of one type under all keys, in order of registration."""
    return sum(_lookup("callbacks", call_type, transformer_options, is_model_options).values(), [])


def add_wrapper(
    wrapper_type: str, wrapper: Callable[..., Any], transformer_options: dict[str, Any], is_model_options: bool = False
) -> None:
    """Register a wrapper under no particular key."""
    add_wrapper_with_key(wrapper_type, None, wrapper, transformer_options, is_model_options)


def add_wrapper_with_key(
    wrapper_type: str,
    key: Any,
    wrapper: Callable[..., Any],
    transformer_options: dict[str, Any],
    is_model_options: bool = False,
) -> None:
    """Register a wrapper under `key`, by which it can be found and removed."""
    _functions("wrappers", wrapper_type, transformer_options, is_model_options).setdefault(key, []).append(wrapper)


def get_wrappers_with_key(
    wrapper_type: str, key: Any, transformer_options: dict[str, Any], is_model_options: bool = False
) -> list[Callable[..., Any]]:
    """The wrappers of one type under one key."""
    return _lookup("wrappers", wrapper_type, transformer_options, is_model_options).get(key, [])


def get_all_wrappers(
    wrapper_type: str, transformer_options: dict[str, Any], is_model_options: bool = False
) -> list[Callable[..., Any]]:
    """The wrappers of one type under all keys, in order of registration (the first is the outermost)."""
    return sum(_lookup("wrappers", wrapper_type, transformer_options, is_model_options).values(), [])


class WrapperExecutor:
    """A function surrounded by wrappers; calling it goes one wrapper further in.

    `original` is the innermost function, `class_obj` the object it belongs to (None for plain functions).
    """

    def __init__(
        self,
        original: Callable[..., Any],
        class_obj: Any = None,
        wrappers: list[Callable[..., Any]] | None = None,
        idx: int = 0,
    ) -> None:
        self.original = original
        self.class_obj = class_obj
        self.wrappers = list(wrappers or ())
        self.idx = idx

    @property
    def is_last(self) -> bool:
        """Whether only the original function is left."""
        return self.idx >= len(self.wrappers)

    @classmethod
    def new_executor(
        cls, original: Callable[..., Any], wrappers: list[Callable[..., Any]], idx: int = 0
    ) -> WrapperExecutor:
        """An executor of a plain function."""
        return cls(original, None, wrappers, idx)

    @classmethod
    def new_class_executor(
        cls, original: Callable[..., Any], class_obj: Any, wrappers: list[Callable[..., Any]], idx: int = 0
    ) -> WrapperExecutor:
        """An executor of a method of `class_obj`."""
        return cls(original, class_obj, wrappers, idx)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """Run from this level inwards."""
        if self.is_last:
            return self.original(*args, **kwargs)
        return self.wrappers[self.idx](self, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What a wrapper calls to go on: the next level."""
        inner = type(self)(self.original, self.class_obj, self.wrappers, self.idx + 1)
        return inner.execute(*args, **kwargs)


class PatcherInjection:
    """A pair of functions that put something into a loaded model and take it out again; each gets the patcher."""

    def __init__(self, inject: Callable[..., Any], eject: Callable[..., Any]) -> None:
        self.inject = inject
        self.eject = eject


def copy_nested_dicts(input_dict: dict[Any, Any]) -> dict[Any, Any]:
    """A copy whose dicts and lists, at any depth of dicts, are new; other values are shared."""
    return {key: _copy_container(value) for key, value in input_dict.items()}


def _copy_container(value: Any) -> Any:
    if isinstance(value, dict):
        return copy_nested_dicts(value)
    return value.copy() if isinstance(value, list) else value


def merge_nested_dicts(dict1: dict[Any, Any], dict2: dict[Any, Any], copy_dict1: bool = True) -> dict[Any, Any]:
    """`dict1` with `dict2` merged in: dicts recursively, lists appended, other values replaced.

    With `copy_dict1=False` the first dict itself is changed and returned.
    """
    merged = copy_nested_dicts(dict1) if copy_dict1 else dict1
    for key, value in dict2.items():
        if isinstance(value, dict):
            merged[key] = merge_nested_dicts(merged.get(key, {}), value)
        elif isinstance(value, list):
            merged[key] = [*merged.get(key, []), *value]
        else:
            merged[key] = value
    return merged
