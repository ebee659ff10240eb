"""The model library: networks, samplers, loaders and memory management, under ComfyUI's names."""
