"""Environments: where a token is asked for, and where it may go."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import urlsplit


class _Fields(NamedTuple):
    name: str
    token_endpoint: str
    base_url: str


class Environment(_Fields):
    """One installation of Nexus: its token endpoint, and the API that takes its tokens. Frozen.

    `TEST` and `PRODUCTION` are the two that Quantoz documents. Raises `TypeError` for a URL that is no string, and
    `ValueError` for one that is not https; plain http is taken for a loopback host only.
    """

    __slots__ = ()

    def __new__(cls, name: str, *, token_endpoint: str, base_url: str) -> Environment:  # noqa: D102
        _check_url("token_endpoint", token_endpoint, "@\\#")
        _check_url("base_url", base_url, "@\\#?")
        return super().__new__(cls, name, token_endpoint, base_url)

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, str]]:
        return (self.name,), {"token_endpoint": self.token_endpoint, "base_url": self.base_url}

    @staticmethod
    def of(value: Environment | str) -> Environment:
        """Return `value`, or the environment that the names "test" and "production" stand for."""
        if isinstance(value, Environment):
            return value
        for environment in (TEST, PRODUCTION):
            if value == environment.name:
                return environment
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"unknown environment {value!r}: 'test' or 'production', or an Environment")


def _check_url(argument: str, url: str, forbidden: str) -> None:
    if not isinstance(url, str):
        raise TypeError(f"{argument} must be a str, not {type(url).__name__}")
    try:
        parts = urlsplit(url)
        scheme, host, _ = parts.scheme, parts.hostname or "", parts.port
    except ValueError:
        scheme = host = ""
    if scheme not in ("https", "http") or not host or not url.isprintable() or set(url) & {" ", *forbidden}:
        raise ValueError(f"{argument} must be an https URL with nothing but a host, port and path")
    if scheme == "http" and not re.fullmatch(r"localhost|127(\.\d{1,3}){3}|::1", host):
        raise ValueError(f"{argument} must be https: plain http is for loopback only, and secrets go to {url}")


TEST = Environment(
    "test", token_endpoint="https://testidentity.quantoz.com/connect/token", base_url="https://testapi.quantoz.com"
)
PRODUCTION = Environment(
    "production", token_endpoint="https://identity.quantoz.com/connect/token", base_url="https://api.quantoz.com"
)
