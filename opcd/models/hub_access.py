"""A quick check whether the Hugging Face hub can be reached: its own clients need half a minute to find out."""

import importlib.util
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

from opcd.runtime.errors import UserError
from opcd.runtime.extras import pip_install
from opcd.runtime.output import shown

PROXIES = ("http", "https", "all")
SOCKS = ("socks5", "socks5h")


def hub_reachable() -> bool:
    """Whether the hub's host name can be resolved, or a proxy is set that may reach the hub.

    Raises:
        UserError: the address of the hub or of a proxy is invalid.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    check_proxies()
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    try:
        address = urlsplit(constants.ENDPOINT)
        host, port = address.hostname, address.port or 443
    except ValueError as error:
        raise UserError(f"HF_ENDPOINT is not a valid address: {error}") from error
    try:
        return host is not None and bool(socket.getaddrinfo(host, port))
    except (OSError, UnicodeError):
        return False


def check_proxies() -> None:
    """Check the proxies of the environment: HTTP clients raise errors of many kinds for invalid ones.

    Raises:
        UserError: names the variable.
    """
    for name, value in getproxies().items():
        if name in PROXIES and value.strip() and (problem := _problem(value.strip())):
            raise UserError(f"{name}_proxy: {problem}, got {shown(value)}; set it to http://host:port, or unset it")


def _problem(value: str) -> str | None:
    """What is wrong with a proxy's address, or None."""
    try:
        address = urlsplit(value if "://" in value else f"http://{value}")
        host, port = address.hostname, address.port
    except ValueError as error:
        return f"not a valid address ({error})"
    if address.scheme not in ("http", "https", *SOCKS):
        return f"not a proxy scheme ({address.scheme})" if address.scheme else "not a valid address"
    if not host or any(character.isspace() for character in host):
        return "the address has no host"
    if port == 0:
        return "not a valid port"
    if address.scheme in SOCKS and importlib.util.find_spec("socksio") is None:
        return f"a SOCKS proxy needs the package socksio: {pip_install('socksio')}"
    return None
