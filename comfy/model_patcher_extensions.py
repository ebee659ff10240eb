"""Wrappers, callbacks, attachments, injections and additional models of a patcher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

NamedFunctions = dict[str, dict[str | None, list[Callable[..., Any]]]]


def _flat(store: NamedFunctions, kind: str) -> list[Callable[..., Any]]:
    return [function for functions in store.get(kind, {}).values() for function in functions]


def _copied(store: NamedFunctions) -> NamedFunctions:
    return {kind: {key: list(functions) for key, functions in keyed.items()} for kind, keyed in store.items()}


class ExtensionsMixin:
    """`ModelPatcher`'s registries; each entry is filed under a key so that its owner can remove it."""

    model: Any

    def _init_extensions(self) -> None:
        self.attachments: dict[str, Any] = {}
        self.additional_models: dict[str, list[Any]] = {}
        self.callbacks: NamedFunctions = {}
        self.wrappers: NamedFunctions = {}
        self.injections: dict[str, list[Any]] = {}
        self.is_injected = False
        self.skip_injection = False
        self.is_clip = False

    def _clone_extensions(self, other: Any) -> None:
        other.attachments = {
            key: value.on_model_patcher_clone() if hasattr(value, "on_model_patcher_clone") else value
            for key, value in self.attachments.items()
        }
        other.additional_models = {key: [m.clone() for m in models] for key, models in self.additional_models.items()}
        other.callbacks = _copied(self.callbacks)
        other.wrappers = _copied(self.wrappers)
        other.injections = {key: list(value) for key, value in self.injections.items()}
        other.is_clip = self.is_clip

    # --- callbacks and wrappers ------------------------------------------------------------------------------------

    def add_callback(self, call_type: str, callback: Callable[..., Any]) -> None:
        """Call `callback(patcher, ...)` at an event of `CallbacksMP`."""
        self.add_callback_with_key(call_type, None, callback)

    def add_callback_with_key(self, call_type: str, key: str | None, callback: Callable[..., Any]) -> None:
        """`add_callback`, filed under `key`."""
        self.callbacks.setdefault(call_type, {}).setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, call_type: str, key: str) -> None:
        """Remove the callbacks filed under `key`."""
        self.callbacks.get(call_type, {}).pop(key, None)

    def get_callbacks(self, call_type: str, key: str | None) -> list[Callable[..., Any]]:
        """The callbacks filed under `key`."""
        return self.callbacks.get(call_type, {}).get(key, [])

    def get_all_callbacks(self, call_type: str) -> list[Callable[..., Any]]:
        """All callbacks of an event."""
        return _flat(self.callbacks, call_type)

    def _call_callbacks(self, call_type: str, *args: Any) -> None:
        for callback in self.get_all_callbacks(call_type):
            callback(self, *args)

    def add_wrapper(self, wrapper_type: str, wrapper: Callable[..., Any]) -> None:
        """Wrap a stage of `WrappersMP`: `wrapper(executor, *args, **kwargs)`."""
        self.add_wrapper_with_key(wrapper_type, None, wrapper)

    def add_wrapper_with_key(self, wrapper_type: str, key: str | None, wrapper: Callable[..., Any]) -> None:
        """`add_wrapper`, filed under `key`."""
        self.wrappers.setdefault(wrapper_type, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, wrapper_type: str, key: str) -> None:
        """Remove the wrappers filed under `key`."""
        self.wrappers.get(wrapper_type, {}).pop(key, None)

    def get_wrappers(self, wrapper_type: str, key: str | None) -> list[Callable[..., Any]]:
        """The wrappers filed under `key`."""
        return self.wrappers.get(wrapper_type, {}).get(key, [])

    def get_all_wrappers(self, wrapper_type: str) -> list[Callable[..., Any]]:
        """All wrappers of a stage."""
        return _flat(self.wrappers, wrapper_type)

    # --- attachments and additional models -------------------------------------------------------------------------

    def set_attachments(self, key: str, attachment: Any) -> None:
        """Keep something with the patcher."""
        self.attachments[key] = attachment

    def remove_attachments(self, key: str) -> None:
        """Forget an attachment."""
        self.attachments.pop(key, None)

    def get_attachment(self, key: str) -> Any:
        """What was attached under `key`, or None."""
        return self.attachments.get(key)

    def set_additional_models(self, key: str, models: list[Any]) -> None:
        """Patchers that are loaded together with this one."""
        self.additional_models[key] = models

    def remove_additional_models(self, key: str) -> None:
        """Forget additional models."""
        self.additional_models.pop(key, None)

    def get_additional_models_with_key(self, key: str) -> list[Any]:
        """The additional models filed under `key`."""
        return self.additional_models.get(key, [])

    def get_additional_models(self) -> list[Any]:
        """All additional models."""
        return [model for models in self.additional_models.values() for model in models]

    def get_nested_additional_models(self) -> list[Any]:
        """Additional models, theirs, and so on, each once."""
        found: list[Any] = []
        waiting = self.get_additional_models()
        while waiting:
            model = waiting.pop(0)
            if not any(model is known for known in found):
                found.append(model)
                waiting += model.get_additional_models()
        return found

    # --- injections ------------------------------------------------------------------------------------------------

    def set_injections(self, key: str, injections: list[Any]) -> None:
        """`PatcherInjection`s applied while the model is loaded."""
        self.injections[key] = injections

    def remove_injections(self, key: str) -> None:
        """Forget injections."""
        self.injections.pop(key, None)

    def get_injections(self, key: str) -> list[Any] | None:
        """The injections filed under `key`, or None."""
        return self.injections.get(key)

    def inject_model(self) -> None:
        """Apply all injections once."""
        if self.is_injected or self.skip_injection:
            return
        for injections in self.injections.values():
            for injection in injections:
                injection.inject(self)
                self.is_injected = True
        if self.is_injected:
            self._call_callbacks("on_inject_model")

    def eject_model(self) -> None:
        """Take all injections back."""
        if not self.is_injected:
            return
        for injections in self.injections.values():
            for injection in injections:
                injection.eject(self)
        self.is_injected = False
        self._call_callbacks("on_eject_model")

    @contextlib.contextmanager
    def use_ejected(self, skip_and_inject_on_exit_only: bool = False) -> Iterator[None]:
        """Inside, injections are taken back; with the flag they are also not applied until the end."""
        was_injected, was_skipping = self.is_injected, self.skip_injection
        self.eject_model()
        self.skip_injection = self.skip_injection or skip_and_inject_on_exit_only
        try:
            yield
        finally:
            self.skip_injection = was_skipping
            if was_injected or skip_and_inject_on_exit_only:
                self.inject_model()
