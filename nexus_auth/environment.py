"""Environments of Nexus: where a token is asked for, and where it may go."""

import re

from .value import Value

_URL = re.compile(
    r"""(?aix)
    (?P<scheme> https?) ://
    (?P<host> \[ [0-9a-f:.]+ \] | [^][\\/?#@:\s]+ )
    (?: : (?P<port> [0-9]{1,5}) )?
    (?: / [^\\?#\s]* )?
    """
)
LONGEST_SHOWN = 16  # characters of a name that is unknown
_LOOPBACK = r"(?ai)localhost|127(\.[0-9]+){3}|\[::1\]"


class Environment(Value):
    """One installation of Nexus: its token endpoint, and the API that takes its tokens.

    `TEST` and `PRODUCTION` are the two that Quantoz documents. Raises `TypeError` for an argument that is no string,
    and `ValueError` for a URL that is not https; plain http is taken for a loopback host only.
    """

    name: str
    token_endpoint: str
    base_url: str

    def __init__(self, name: str, *, token_endpoint: str, base_url: str) -> None:
        if not isinstance(name, str) or not name.isprintable():
            raise TypeError("name of an Environment must be a str of printable characters")
        _check_url("token_endpoint", token_endpoint)
        _check_url("base_url", base_url)
        super().__init__(name, token_endpoint, base_url)

    def __str__(self) -> str:
        return f"token endpoint {self.token_endpoint} ({self.name})"

    @staticmethod
    def of(value: "Environment | str") -> "Environment":
        """Return `value`, or the environment that the names "test" and "production" stand for."""
        if isinstance(value, Environment):
            return value
        expected = "'test' or 'production', or an Environment"
        if not isinstance(value, str):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(f"environment must be {expected} of {__package__}, not {value!r} (a {kind})")
        if value not in _KNOWN:
            # What is longer may be the secret, given in place of the environment.
            shown = repr(value) if len(value) <= LONGEST_SHOWN or "://" in value else "(a longer text)"
            raise ValueError(f"unknown environment {shown}: {expected}")
        return _KNOWN[value]


def _check_url(argument: str, url: str) -> None:
    if not isinstance(url, str):
        raise TypeError(f"{argument} must be a str, not {type(url).__name__}")
    parts = _URL.fullmatch(url)
    if parts is None or not url.isprintable() or int(parts["port"] or 0) > 65535:
        raise ValueError(f"{argument} must be an https URL with nothing but a host, port and path, and no white space")
    if parts["scheme"].lower() == "http" and not re.fullmatch(_LOOPBACK, parts["host"]):
        raise ValueError(f"{argument} must be https, since secrets go there: plain http is for loopback only")


TEST = Environment(
    "test",
    token_endpoint="https://testidentity.quantoz.com/connect/token",
    base_url="https://testapi.quantoz.com",
)
PRODUCTION = Environment(
    "production",
    token_endpoint="https://identity.quantoz.com/connect/token",
    base_url="https://api.quantoz.com",
)
_KNOWN = {"test": TEST, "production": PRODUCTION}
