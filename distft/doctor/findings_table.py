"""All findings: as a table for people, as one object for programs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from distft.core.errors import DONE, MachineError
from distft.doctor.finding import Finding, Severity

WIDTH = 100
"""Width of the table in characters."""
ORDER = (Severity.OK, Severity.WARN, Severity.FAIL)


@dataclass
class Report:
    """The findings so far."""

    hosts: tuple[str, ...]
    """Hosts by rank."""
    rows: list[tuple[str, Finding]] = field(default_factory=list)

    def add(self, check: str, findings: Sequence[Finding]) -> None:
        """Add one check's findings."""
        self.rows += [(check, finding) for finding in findings]

    @property
    def verdict(self) -> Severity:
        """The worst verdict of all findings."""
        return max((finding.verdict for _, finding in self.rows), key=ORDER.index, default=Severity.OK)

    @property
    def code(self) -> int:
        """The exit code: 9 when a run would fail."""
        return MachineError.exit_code if self.verdict is Severity.FAIL else DONE

    @property
    def bad_hosts(self) -> list[str]:
        """Hosts that a run should avoid."""
        failed = [host for _, finding in self.rows if finding.verdict is Severity.FAIL for host in finding.hosts]
        return list(dict.fromkeys(failed))

    def to_json(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        return {
            "verdict": self.verdict.value,
            "code": self.code,
            "world": len(self.hosts),
            "hosts": list(dict.fromkeys(self.hosts)),
            "bad_hosts": self.bad_hosts,
            "findings": [
                {
                    "check": check,
                    "verdict": finding.verdict.value,
                    "found": finding.message,
                    "fix": finding.fix,
                    "hosts": list(finding.hosts),
                }
                for check, finding in self.rows
            ],
        }

    def text(self, *, as_json: bool) -> str:
        """Return the text to print."""
        return json.dumps(self.to_json()) if as_json else "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """Yield the lines of a table: check, verdict, message, and below a problem its fix."""
        first = max([len("check"), *(len(check) for check, _ in self.rows)])
        yield f"{'check':<{first}}  {'':<4}  found"
        for check, finding in self.rows:
            head = f"{check:<{first}}  {finding.verdict.value:<4}  "
            blank = " " * len(head)
            yield from textwrap.wrap(
                finding.message, WIDTH, initial_indent=head, subsequent_indent=blank, break_on_hyphens=False
            )
            if finding.fix and finding.verdict is not Severity.OK:
                yield from textwrap.wrap(
                    finding.fix, WIDTH, initial_indent=f"{blank}fix: ", subsequent_indent=f"{blank}     ",
                    break_on_hyphens=False,
                )  # fmt: skip
        counts = {verdict: sum(f.verdict is verdict for _, f in self.rows) for verdict in ORDER}
        end = {
            Severity.OK: "ready",
            Severity.WARN: f"ready, with {counts[Severity.WARN]} to look at",
            Severity.FAIL: f"a run would fail here: {counts[Severity.FAIL]} to mend",
        }
        yield f"doctor: {end[self.verdict]}"
