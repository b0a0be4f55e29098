"""Print pip constraints that pin every dependency of pyproject.toml to its lower bound.

Example: python .ci/bounds.py torch==2.13.0 > oldest.txt

Each argument is a pin that replaces the bound of the package that it names.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def requirements(pyproject: Path = PYPROJECT) -> list[str]:
    """Return the requirements of the package and of all its extras, as they are written in pyproject.toml."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]


def name_of(requirement: str) -> str:
    """Return the normalised package name of a requirement: `lm-eval[hf]>=0.4` is `lm-eval`."""
    match = re.match(r"[\w.-]+", requirement)
    if match is None:
        raise ValueError(f"expected a requirement such as numpy>=2.0; got {requirement!r}. Name the package first.")
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def lower_bounds(lines: list[str]) -> dict[str, str]:
    """Return the lower bound of each package, the highest one where a package is required twice."""
    bounds: dict[str, str] = {}
    for line in lines:
        version = line.partition(">=")[2]
        if not re.fullmatch(r"[\d.]+", version):
            raise ValueError(f"expected one lower bound, such as numpy>=2.0; got {line!r}. Use >= alone.")
        known = bounds.get(name_of(line), "0")
        bounds[name_of(line)] = max(known, version, key=lambda text: [int(part) for part in text.split(".")])
    return bounds


if __name__ == "__main__":
    pins = {name: f"{name}=={version}" for name, version in lower_bounds(requirements()).items()}
    pins |= {name_of(pin): pin for pin in sys.argv[1:]}
    print("\n".join(pins.values()))
