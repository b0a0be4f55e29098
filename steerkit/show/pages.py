"""HTML pages: the template environment, and JSON that is safe inside a script element."""

from __future__ import annotations

from typing import Any

import jinja2
from markupsafe import Markup

from steerkit.io.json import canonical_json


def environment() -> jinja2.Environment:
    """The templates of `steerkit/show/templates`, with autoescape; an undefined name raises."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("steerkit.show"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def inert_json(value: Any) -> Markup:
    """JSON that an HTML parser does not take for markup, nor JavaScript for a line end."""
    text = canonical_json(value)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
