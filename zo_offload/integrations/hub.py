"""Whether the Hugging Face hub can be asked at all, before its library asks it again and again.

The library waits 23 seconds for each file that it can neither find in its cache nor fetch, for a
name that was mistyped as for any other, and loaders ask for several. So where nothing of a model is
at hand, a connection is tried first, for a few seconds. Where one is made, nothing is different.
"""

import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from zo_offload.errors import ModelError

PATIENCE_SECONDS = 4.0  # for a name server, too, and a connection that is lost and comes back
PAUSE_SECONDS = 0.5
PORTS = {"http": 80, "https": 443}


def check_reached(name: str | Path) -> None:
    """Before the library is asked for a model of which nothing is here.

    Args:
        name: Directory or id.

    Raises:
        ModelError: It is no directory, not in the cache, and no connection to the hub can be made.
    """
    from huggingface_hub import constants

    if Path(name).exists() or constants.HF_HUB_OFFLINE or _is_cached(str(name)):
        return
    if not is_reached(constants.ENDPOINT, PATIENCE_SECONDS):
        raise ModelError(
            f"{name}: no such directory here, not in the hub's cache, and {constants.ENDPOINT} is "
            "not reached; check the name or path, or the network"
        )


def is_reached(endpoint: str, patience_seconds: float) -> bool:
    """Whether a connection can be made; True where that is not ours to say.

    Args:
        endpoint: Its address; where a proxy stands before it, that is left to the library.
        patience_seconds: After which it cannot.
    """
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port or PORTS.get(parts.scheme)
    except ValueError:
        return True
    proxies = getproxies()
    if host is None or port is None or parts.scheme in proxies or "all" in proxies:
        return True
    made = threading.Event()
    until = time.monotonic() + patience_seconds
    # In a thread that is left to itself: a name server that does not answer cannot be hurried.
    threading.Thread(target=_connect, args=(host, port, until, made), daemon=True).start()
    return made.wait(patience_seconds)


def _connect(host: str, port: int, until: float, made: threading.Event) -> None:
    while (left := until - time.monotonic()) > 0:
        with suppress(OSError), socket.create_connection((host, port), timeout=left):
            made.set()
            return
        time.sleep(PAUSE_SECONDS)


def _is_cached(name: str) -> bool:
    """Whether the model's configuration is there; what is no id is the library's to refuse."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return try_to_load_from_cache(name, "config.json") is not None
    except ValueError:
        return True
