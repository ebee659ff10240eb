"""A network whose calls go through torch.compile."""

from __future__ import annotations

from typing import Any

import torch

from comfy.ldm import dit

KEY = "torch.compile"


class CompiledNetwork:
    """A wrapper of APPLY_MODEL.

    It does nothing while tokens are spread over ranks: a graph cannot go across an exchange, and the engine compiles the
    parts between exchanges itself.
    """

    rows_independent = True

    def __init__(self, backend: str, **options: Any) -> None:
        self.backend = backend
        self.options = options
        self.network: Any = None
        self.function: Any = None

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        model = executor.class_obj
        options = kwargs.get("transformer_options") or (args[5] if len(args) > 5 else None)
        if dit.call_of(options).plan is not None:
            return executor(*args, **kwargs)
        if self.network is not model.diffusion_model:
            self.network = model.diffusion_model
            self.function = torch.compile(self.network, backend=self.backend, **self.options)
        before, model.network_runner = model.network_runner, self.function
        try:
            return executor(*args, **kwargs)
        finally:
            model.network_runner = before
