r"""The prompt syntax: `(text)` weighs 1.1 times, `(text:1.3)` weighs 1.3, `\(` and `\)` are parentheses."""

from __future__ import annotations

_OPEN, _CLOSE = "\0\2", "\0\1"


def escape_important(text: str) -> str:
    r"""Hide `\(` and `\)` from the parser."""
    return text.replace("\\)", _CLOSE).replace("\\(", _OPEN)


def unescape_important(text: str) -> str:
    """Show hidden parentheses as plain ones."""
    return text.replace(_CLOSE, ")").replace(_OPEN, "(")


def parse_parentheses(string: str) -> list[str]:
    """Split at outermost parentheses, which stay on their parts: "a (b (c)) d" -> ["a ", "(b (c))", " d"].

    An opening one that is never closed stays open to the end. A closing one too many is text, and from there on the
    depth is off by one: later pairs at the outermost level stay in the text around them, as in ComfyUI.
    """
    parts: list[str] = []
    begin = depth = 0
    for i, character in enumerate(string):
        if character == "(":
            if depth == 0:
                parts.append(string[begin:i])
                begin = i
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                parts.append(string[begin : i + 1])
                begin = i + 1
    parts.append(string[begin:])
    return [part for part in parts if part]


def _own_weight(inner: str, outer_weight: float) -> tuple[str, float]:
    """(text, weight) of what stood in a pair of parentheses."""
    text, colon, number = inner.rpartition(":")
    if colon and text:
        try:
            return text, float(number)
        except ValueError:
            pass
    return inner, outer_weight * 1.1


def token_weights(string: str, current_weight: float) -> list[tuple[str, float]]:
    """The text in runs of one weight; an explicit weight replaces those around it, a plain pair multiplies them."""
    out: list[tuple[str, float]] = []
    for part in parse_parentheses(string):
        if len(part) >= 2 and part[0] == "(" and part[-1] == ")":
            out += token_weights(*_own_weight(part[1:-1], current_weight))
        else:
            out.append((part, current_weight))
    return out
