"""What an examination yields, and how it is printed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the report. `cure` says what to do and is never empty for a problem."""

    level: str
    subject: str
    text: str
    cure: str = ""

    def __post_init__(self) -> None:
        if self.level == PROBLEM and not self.cure:
            raise ValueError(f"{self.subject}: a problem needs a remedy")


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    findings: tuple[Finding, ...]


Check = Callable[[], Iterable[Finding]]


def examine(title: str, check: Check) -> Section:
    """Run a check; one that breaks is itself a problem, and what it found before is kept."""
    found: list[Finding] = []
    try:
        for finding in check():
            found.append(finding)
    except Exception as error:
        text = f"this check broke: {type(error).__name__}: {error}"
        found.append(Finding(PROBLEM, title, text, "report it with this output; the other checks do not depend on it"))
    return Section(title, tuple(found))


def problems(sections: Iterable[Section]) -> list[Finding]:
    """Every finding with which the program cannot work as asked."""
    return [finding for section in sections for finding in section.findings if finding.level == PROBLEM]


def as_text(sections: list[Section]) -> str:
    """The report for a terminal: every finding, then problems and warnings again with what to do."""
    lines = []
    for section in sections:
        lines.append(section.title)
        width = max((len(finding.subject) for finding in section.findings), default=0)
        lines += [f"  {f.level:8}{f.subject:{width}}  {f.text}" for f in section.findings]
        lines.append("")
    for level, title in ((PROBLEM, "problem"), (WARNING, "warning")):
        of_level = [f for section in sections for f in section.findings if f.level == level]
        if of_level:
            lines.append(f"{len(of_level)} {title}{'s' if len(of_level) > 1 else ''}:")
            for finding in of_level:
                lines.append(f"  - {finding.subject}: {finding.text}")
                if finding.cure:
                    lines.append(f"    remedy: {finding.cure}")
            lines.append("")
    if not problems(sections):
        lines.append("no problem found")
    return "\n".join(lines).rstrip() + "\n"


def as_json(sections: list[Section]) -> list[dict[str, Any]]:
    """The report for programs."""
    return [{"title": s.title, "findings": [asdict(f) for f in s.findings]} for s in sections]
