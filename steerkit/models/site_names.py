"""The names of sites: `steerkit.models.sites` finds and verifies them in a model."""

from __future__ import annotations

from typing import Any

SITES = ("resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""In the order in which a block computes them."""
DEFAULT = "resid_post"
Place = tuple[str, int]
"""A site and a layer."""


def check_name(site: Any) -> str:
    """The name of a site; `ValueError` for any other value."""
    if not isinstance(site, str) or site not in SITES:
        raise ValueError(f"expected a site among {SITES}; got {site!r}. Pass one of them.")
    return site


def place_order(place: Place) -> tuple[int, int]:
    """A sort key: the order in which a forward reaches places."""
    return place[1], SITES.index(place[0])
