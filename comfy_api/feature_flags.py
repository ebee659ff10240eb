"""What this server and a connected page can do beyond the basics."""

from __future__ import annotations

from typing import Any

SERVER_FEATURE_FLAGS: dict[str, Any] = {"supports_preview_metadata": True}


def get_server_features() -> dict[str, Any]:
    """The flags told to clients; `max_upload_size` in bytes."""
    from comfy.cli_args import args

    return {**SERVER_FEATURE_FLAGS, "max_upload_size": round(args.max_upload_size * 1024 * 1024)}


def get_connection_feature(
    sockets_metadata: dict[str, dict[str, Any]], sid: str | None, feature_name: str, default: Any = False
) -> Any:
    """The value a client announced for a flag, `default` when it announced none."""
    flags = sockets_metadata.get(sid or "", {}).get("feature_flags", {})
    return flags.get(feature_name, default)


def supports_feature(sockets_metadata: dict[str, dict[str, Any]], sid: str | None, feature_name: str) -> bool:
    """Whether a client said literally true for a flag."""
    return get_connection_feature(sockets_metadata, sid, feature_name) is True
