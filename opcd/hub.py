"""Whether the Hugging Face hub can be asked at all: its own clients find out after half a minute."""

import os
import socket

from huggingface_hub import constants


def hub_reachable() -> bool:
    """Whether the host of the Hugging Face hub can be found by name, or a proxy is set that may reach it."""
    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    host = constants.ENDPOINT.split("//")[-1].split("/")[0].split(":")[0]
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
