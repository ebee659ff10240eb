"""ComfyUI's place for the rules of caching, for node packs that import it."""

from app.middlewares import create_cache_middleware

cache_control = create_cache_middleware(private=False)

__all__ = ["cache_control"]
