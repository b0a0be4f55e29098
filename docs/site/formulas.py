"""A hook of mkdocs: formulas as MathML, which browsers draw by themselves, with no script from elsewhere."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_page_content(text: str, **_: Any) -> str:
    """The page's HTML with each formula drawn; one that stands alone is a block."""
    return FORMULA.sub(
        lambda found: convert(html.unescape(found["latex"]), display="block" if found["tag"] == "div" else "inline"),
        text,
    )
