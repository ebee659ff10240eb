"""Does an output's type fit an input's type?"""

from __future__ import annotations

from typing import Any

ANY = "*"


def _parts(kind: str) -> set[str]:
    return {part.strip() for part in kind.split(",")}


def validate_node_input(received_type: Any, input_type: Any, strict: bool = False) -> bool:
    """Whether a link carrying `received_type` may end in an input of `input_type`.

    Types are names, comma-separated unions of names, `*`, or the list of a choice. They fit when they share a member;
    with `strict` every received member must be accepted. Custom nodes use `str` subclasses whose `!=` is always False
    to mean "anything", so `!=` is asked first, with the received type on the left.
    """
    if not received_type != input_type:  # noqa: SIM202
        return True
    if isinstance(received_type, list | tuple) or isinstance(input_type, list | tuple):
        # a choice with its options spelled out against a choice that only says it is one
        return "COMBO" in (
            received_type if isinstance(received_type, str) else "",
            input_type if isinstance(input_type, str) else "",
        )
    if not isinstance(received_type, str) or not isinstance(input_type, str):
        return False
    received, accepted = _parts(received_type), _parts(input_type)
    if ANY in received or ANY in accepted:
        return True
    return received <= accepted if strict else bool(received & accepted)
