"""The Hugging Face hub: whether it can be reached."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies


def offline_options(name: str) -> dict[str, bool]:
    """What tells transformers to look on this machine only, for a hub id where nothing takes a connection at the hub.

    Its client would ask six times for every file, in 23 seconds or more, and has no setting for that. Behind a proxy
    only the client knows the way.
    """
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    path = name.startswith((".", "/", "~")) or Path(name).exists()
    if path or constants.HF_HUB_OFFLINE or {hub.scheme, "all"} & set(getproxies()):
        return {}
    port = hub.port or {"http": 80}.get(hub.scheme, 443)
    try:
        socket.create_connection((hub.hostname or "", port), timeout=constants.HF_HUB_ETAG_TIMEOUT).close()
    except OSError:
        return {"local_files_only": True}
    return {}
