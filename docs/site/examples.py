"""An extension of griffe: `Example:` in a docstring is code, as `Examples:` is; griffe knows the second only."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

HEADING = re.compile(r"^Example:$", re.MULTILINE)


class Examples(Extension):
    """Rename the section of each docstring."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = HEADING.sub("Examples:", obj.docstring.value)
