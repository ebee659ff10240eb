"""The ComfyUI release whose nodes, routes and files this program is compatible with."""

__version__ = "0.3.64"
