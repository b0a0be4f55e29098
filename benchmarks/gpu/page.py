"""The page of `benchmarks.gpu`: all figures as tables."""

from __future__ import annotations

from typing import Any

SMALL_SIZES = "small sizes"
"""In the name of a device whose figures are not to be published."""


def markdown(results: dict[str, Any]) -> str:
    """A table of all figures; parts that did not run with their reason."""
    about = results["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in about.items() if name != "device")
    lines = [f"# GPU: {about['device']}", "", f"{versions}.", ""]
    for name, part in results["parts"].items():
        took = f" ({part['seconds']} s)" if "seconds" in part else ""
        lines += [f"## {name}: {part['state']}{took}", ""]
        if about["commit"] != part.get("commit", about["commit"]):
            lines += [f"Commit {part['commit']}.", ""]
        if part.get("note") and part["figures"]:
            lines += [part["note"], ""]
        if "reason" in part:
            lines += ["```", part["reason"].strip(), "```", ""]
        if part["figures"]:
            lines += ["| figure | value | 95 % interval | n |", "|---|---|---|---|"]
            lines += [_row(row) for row in part["figures"]]
            lines.append("")
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> str:
    interval = f"[{row['low']:.4g}, {row['high']:.4g}]" if "low" in row else ""
    missed = "" if row.get("holds", True) else ", **missed**"
    limit = f" (limit {row['limit']:g}{missed})" if "limit" in row else ""
    value = f"{row['value']:.4g} {row['unit']}".strip() + limit
    return f"| {row['figure']} | {value} | {interval} | {row.get('n', '')} |"
