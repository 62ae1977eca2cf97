"""Which addresses may be served. Imports nothing heavy: the command line asks before it starts."""

import ipaddress

from weft.core.errors import WeftError


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, *, insecure: bool) -> None:
    """There are no API keys yet, so everybody who reaches the port may use and stop the models.
    Raises WeftError unless `host` is this machine only or `insecure` says that this is meant."""
    if not insecure and not is_loopback(host):
        raise WeftError(
            f"{host} can be reached from other machines and there are no API keys yet; serve "
            "127.0.0.1, or pass --insecure if the network keeps strangers out"
        )
