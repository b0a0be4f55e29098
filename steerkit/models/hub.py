"""The Hugging Face hub: whether it can be reached."""

from __future__ import annotations

import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies


def offline_options(name: str) -> dict[str, bool]:
    """`{"local_files_only": True}` for a hub id if the hub accepts no connection, else no options.

    The client of the hub retries six times for each file, which takes 23 seconds or more, and has no setting for it.
    Behind a proxy the hub cannot be checked here, and no options are returned.
    """
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    is_path = name.startswith((".", "/", "~")) or Path(name).exists()
    if is_path or constants.HF_HUB_OFFLINE or {hub.scheme, "all"} & set(getproxies()):
        return {}
    port = hub.port or {"http": 80}.get(hub.scheme, 443)
    try:
        socket.create_connection((hub.hostname or "", port), timeout=constants.HF_HUB_ETAG_TIMEOUT).close()
    except OSError:
        return {"local_files_only": True}
    return {}
