"""Whether the Hugging Face hub can be asked at all: its own clients find out after half a minute."""

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
    """Whether the host of the Hugging Face hub can be found by name, or a proxy is set that may reach it.

    Raises:
        UserError: the proxy that is set is none.
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
        raise UserError(f"HF_ENDPOINT is no address: {error}") from error
    if host is None:
        return False
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError):
        return False
    return True


def check_proxies() -> None:
    """Refuse proxies of the environment that no client can use; they raise errors of many kinds.

    Raises:
        UserError: names the variable.
    """
    for name, value in getproxies().items():
        if name in PROXIES and value.strip() and (problem := _problem(value.strip())):
            raise UserError(f"{name}_proxy: {problem}, got {shown(value)}; set it to http://host:port, or unset it")


def _problem(value: str) -> str | None:
    """Why an address is no proxy, or None."""
    try:
        address = urlsplit(value if "://" in value else f"http://{value}")
        host, port = address.hostname, address.port
    except ValueError as error:
        return f"no address ({error})"
    if address.scheme not in ("http", "https", *SOCKS):
        return f"no scheme of a proxy ({address.scheme})" if address.scheme else "no address"
    if not host or any(character.isspace() for character in host):
        return "an address without a host"
    if port == 0:
        return "no port"
    if address.scheme in SOCKS and importlib.util.find_spec("socksio") is None:
        return f"a SOCKS proxy needs the package socksio: {pip_install('socksio')}"
    return None
