"""Environments: where a token is asked for, and where it may go."""

import re


class Environment:
    """One installation of Nexus: its token endpoint, and the API that takes its tokens. Frozen.

    `TEST` and `PRODUCTION` are the two that Quantoz documents. Raises `TypeError` for a URL that is no string, and
    `ValueError` for one that is not https; plain http is taken for a loopback host only.
    """

    name: str
    token_endpoint: str
    base_url: str

    def __init__(self, name: str, *, token_endpoint: str, base_url: str) -> None:
        if not isinstance(name, str) or not name.isprintable():
            raise TypeError("name of an Environment must be a str of printable characters")
        for argument, url in (("token_endpoint", token_endpoint), ("base_url", base_url)):
            if not isinstance(url, str):
                raise TypeError(f"{argument} must be a str, not {type(url).__name__}")
            parts = re.fullmatch(r"(?ai:(https?)://(\[[0-9a-f:.]+\]|[^][\\/?#@:\s]+)(:[0-9]{1,5})?(/[^\\?#\s]*)?)", url)
            if not parts or not url.isprintable() or int((parts[3] or ":0")[1:]) > 65535:
                raise ValueError(f"{argument} must be an https URL with nothing but a host, port and path")
            if parts[1].lower() == "http" and not re.fullmatch(r"(?ai:localhost)|127(\.[0-9]+){3}|\[::1\]", parts[2]):
                raise ValueError(f"{argument} must be https, since secrets go there: plain http is for loopback only")
        vars(self).update(name=name, token_endpoint=token_endpoint, base_url=base_url)

    @staticmethod
    def of(value: "Environment | str") -> "Environment":
        """Return `value`, or the environment that the names "test" and "production" stand for."""
        known = value if isinstance(value, Environment) else {"test": TEST, "production": PRODUCTION}.get(str(value))
        if known is None:
            kind = ValueError if isinstance(value, str) else TypeError
            raise kind(f"unknown environment {value!r}: 'test' or 'production', or an Environment")
        return known

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"an Environment is frozen: {name} stays as it is")

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Environment) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.name, self.token_endpoint, self.base_url))

    def __repr__(self) -> str:
        return f"Environment({self.name!r}, token_endpoint={self.token_endpoint!r}, base_url={self.base_url!r})"


TEST = Environment("test", base_url="https://testapi.quantoz.com",
                   token_endpoint="https://testidentity.quantoz.com/connect/token")  # fmt: skip
PRODUCTION = Environment("production", base_url="https://api.quantoz.com",
                         token_endpoint="https://identity.quantoz.com/connect/token")  # fmt: skip
