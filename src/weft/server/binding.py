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


def check_bind(host: str, *, insecure: bool, has_keys: bool = False) -> None:
    """Without API keys everybody who reaches the port may use and stop the models. Raises WeftError
    unless `host` is this machine only, there are keys, or `insecure` says that this is meant."""
    if not (insecure or has_keys or is_loopback(host)):
        raise WeftError(
            f"{host} can be reached from other machines and there are no API keys; serve "
            "127.0.0.1, make a key with `weft key new`, or pass --insecure if the network keeps "
            "strangers out"
        )
