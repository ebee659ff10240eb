"""The configuration of the running program, for Python code outside the core."""

from __future__ import annotations

import os

from comfy.taco_dit import runtime

from .config_manager import DEFAULT_FILE, TacoConfig, load_config, validate_for


class TACODiTConfigManager:
    """The configuration in force: `TACODiTConfigManager().config`.

    Reads `path`, else the running program's configuration, else `taco_dit_config.yaml` in the folder of main.py, else
    the defaults. With `world_size` the degrees are checked against that number of ranks.
    """

    def __init__(self, path: str | None = None, world_size: int | None = None) -> None:
        if path is not None:
            config = load_config(path)
        else:
            config = self._running() or self._beside_main()
        self._config = config if world_size is None else validate_for(config, world_size)

    @staticmethod
    def _running() -> TacoConfig | None:
        current = runtime.active()
        return None if current is None else current.config

    @staticmethod
    def _beside_main() -> TacoConfig:
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
        path = os.path.join(root, DEFAULT_FILE)
        return load_config(path) if os.path.isfile(path) else TacoConfig()

    @property
    def config(self) -> TacoConfig:
        """The configuration."""
        return self._config
