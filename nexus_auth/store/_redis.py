"""Redis and Valkey: a store for processes on several machines behind one address."""

from __future__ import annotations

import base64
import math
import os
import re
import time
from contextlib import suppress
from importlib import import_module
from typing import Any, Protocol
from urllib.parse import urlsplit

from ..secret import HiddenText
from ._error import StoreError
from ._fork import importing

_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss", "unix": "unix"}
_TIMEOUT = 1.0  # seconds to connect, and seconds for an answer
_IDLE = 60.0  # seconds after which a connection is not used again, since a firewall may have dropped it unnoticed

# Time is the server's own, in microseconds. A sorted set holds the permits of one name, each with the time at which it
# runs out, and lives as long as the last of them. A script is one atomic step; it has one key, so that a cluster
# can run it, and is sent whole each time, so that it does not matter what the server has forgotten.
_NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
"""
_LIVE_AS_LONG_AS_THE_LAST = """
local last = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2]
redis.call('PEXPIRE', KEYS[1], math.ceil((last - now) / 1000))
"""
_ACQUIRE = f"""{_NOW}
local owner, limit, hold = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local held = redis.call('ZCARD', KEYS[1])
if held >= limit and not redis.call('ZSCORE', KEYS[1], owner) then
    local one_too_many = redis.call('ZRANGE', KEYS[1], held - limit, held - limit, 'WITHSCORES')
    return one_too_many[2] - now
end
redis.call('ZADD', KEYS[1], now + hold, owner)
{_LIVE_AS_LONG_AS_THE_LAST}
return 0
"""
_RELEASE = f"""{_NOW}
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
{_LIVE_AS_LONG_AS_THE_LAST}
"""
_GET = "return {redis.call('GET', KEYS[1]), redis.call('PTTL', KEYS[1])}"
_PUT = """
if tonumber(ARGV[2]) > 0 then
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
else
    redis.call('DEL', KEYS[1])
end
"""


class RedisClient(Protocol):
    """What a lent client has to have: those of redis-py and valkey-py do, for a server, a cluster or Sentinel."""

    def eval(self, script: str, numkeys: int, /, *keys_and_args: Any) -> Any:
        """Return what a script answers."""


class RedisStore:
    """A store for several machines, in Redis from 6.2 on or in Valkey.

    The quota is that of one IP address: machines behind another address take another server or another `prefix`.

    Of a `redis://`, `rediss://`, `valkey://`, `valkeys://` or `unix://` URL it makes connections of its own, through
    redis-py. They wait a second at most and try nothing twice, and what goes wrong is a `StoreError`. A blocking client
    of redis-py or valkey-py is used as it is: its timeouts, retries and errors are its owner's. An account needs the
    commands EVAL, TIME, ZADD, ZREMRANGEBYSCORE, ZRANGE, ZCARD, ZSCORE, GET, SET, DEL, PTTL and PEXPIRE.

    Raises `ValueError` for a URL that cannot be read, and `ImportError` for any where redis-py is missing.

    A URL's password is shown nowhere, and no pickle holds one: to pickle a store that has one, or that was lent a
    client, is a `TypeError`. Two stores of one URL, or of one client, with one prefix are equal.
    """

    def __init__(self, url_or_client: str | RedisClient, prefix: str = "nexus_auth:") -> None:
        self._client: _Connections | RedisClient
        if isinstance(url_or_client, str):
            self._client = _Connections(url_or_client)
        elif callable(getattr(url_or_client, "eval", None)) and not hasattr(url_or_client, "__aenter__"):
            self._client = url_or_client
        else:
            kind = type(url_or_client).__name__
            raise TypeError(f"store must be a URL or a blocking client of redis-py or valkey-py, not {kind}")
        self._prefix = prefix

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RedisStore) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        if not hasattr(self, "_prefix"):  # error trackers show what could not be made, too
            return "RedisStore()"
        where = repr(self._client) if isinstance(self._client, _Connections) else type(self._client).__name__
        return f"RedisStore({where}, prefix={self._prefix!r})"

    def __copy__(self) -> RedisStore:
        return self

    def __deepcopy__(self, memo: object) -> RedisStore:
        return self

    def __reduce__(self) -> tuple[type[RedisStore], tuple[str, str]]:
        if isinstance(self._client, _Connections) and not self._client.passwords:
            return RedisStore, (str(self._client.url), self._prefix)
        what = "a password or a lent client is not pickled"
        raise TypeError(f"a RedisStore with {what}: make the store in the process that uses it")

    def acquire(self, name: str, owner: str, limit: int, hold: float) -> float:
        """Hold a permit of `name` for `hold` seconds from now, and return 0; or return how long to wait for one."""
        wait: int = self._run(_ACQUIRE, f"permits:{name}", owner, limit, math.ceil(hold * 1e6))
        return wait / 1e6

    def release(self, name: str, owner: str, keep: float) -> None:
        """Hold the permit for `keep` seconds from now, even if it has run out meanwhile; 0 gives it back at once."""
        self._run(_RELEASE, f"permits:{name}", owner, math.ceil(keep * 1e6))

    def get(self, name: str) -> tuple[bytes, float] | None:
        """Return the value that was put under `name`, and for how many seconds it still lives; None without one."""
        value, left = self._run(_GET, f"item:{name}")
        if value is None or left <= 0:
            return None
        try:
            return base64.b64decode(value, validate=True), left / 1e3
        except ValueError:  # somebody else has written it
            return None

    def put(self, name: str, value: bytes, ttl: float) -> None:
        """Keep `value` under `name` for `ttl` seconds, in place of what is there."""
        # As text, since a lent client may decode what it receives.
        self._run(_PUT, f"item:{name}", base64.b64encode(value), math.floor(ttl * 1e3))

    def _run(self, script: str, key: str, *arguments: str | bytes | int) -> Any:
        return self._client.eval(script, 1, self._prefix + key, *arguments)

    def _identity(self) -> tuple[str | int, str]:
        return (str(self._client.url) if isinstance(self._client, _Connections) else id(self._client)), self._prefix


class _Connections:
    """The connections of a store's own: they wait a second at most, try nothing twice, and show no password."""

    def __init__(self, url: str) -> None:
        """Connect to nothing yet; raise `ValueError` without the URL in it, and `ImportError` without redis-py."""
        found = re.match("(.+?)://", str(url))
        scheme = _SCHEMES.get(found[1].lower()) if found else None
        if not found or not scheme:
            raise ValueError(f"store must be a folder or a URL, which begins with {'://, '.join(sorted(_SCHEMES))}://")
        self.url = HiddenText(f"{scheme}://{str(url)[found.end() :]}")
        with importing:  # all of it, since redis-py imports more of itself when it makes a client
            self._set_up()

    def _set_up(self) -> None:
        try:
            redis: Any = import_module("redis")  # late: it takes a while, and who has no use for it need not have it
        except ImportError as error:
            raise ImportError("a store in Redis needs redis-py: pip install redis") from error
        import_module("encodings.idna")  # else the first connection imports it, and a fork may come between
        self._errors = (redis.RedisError, OSError)
        self._process = os.getpid()
        self._used_at = time.monotonic()
        with suppress(AttributeError, TypeError, ValueError, redis.RedisError):  # all that redis-py says to a URL
            self._place = _without_password(self.url)
            self._client = _client(self.url)
            pool = self._client.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # refuses an option that it does not know
            options = pool.connection_kwargs.items()
            self.passwords = [HiddenText(value) for option, value in options if value and "password" in option]
            return
        advice = "percent-encode what is special in its password, and look at its host, port and options"
        raise ValueError(f"store must be a folder or a URL, and this URL cannot be read: {advice}")

    def __repr__(self) -> str:
        return repr(getattr(self, "_place", ""))

    def eval(self, script: str, numkeys: int, /, *keys_and_args: Any) -> Any:
        """Return what a script answers; raise `StoreError` for what redis-py raises."""
        if self._process != os.getpid():
            # redis-py 8.1 would wait for a lock that another thread of the parent may have held at the fork.
            self._client, self._process = _client(self.url), os.getpid()
        now = time.monotonic()
        if now - self._used_at > _IDLE:
            self._client.connection_pool.disconnect(inuse_connections=False)
        self._used_at = now
        try:
            return self._client.eval(script, numkeys, *keys_and_args)
        except self._errors as error:
            reason = str(error)
        for password in self.passwords:
            reason = reason.replace(password, "***")
        # Raised outside of the clause: the frames of redis-py hold the password, and would come along.
        raise StoreError(f"the store at {self._place} cannot be used: {reason}")


def _client(url: HiddenText) -> Any:
    """Return a client of redis-py, which has not connected yet."""
    redis, backoff, retry = (import_module(name) for name in ("redis", "redis.backoff", "redis.retry"))
    pool = redis.ConnectionPool.from_url(
        str(url),
        socket_connect_timeout=_TIMEOUT,
        socket_timeout=_TIMEOUT,
        retry=retry.Retry(backoff.NoBackoff(), 0),
        max_connections=2**31,  # one for each thread that is at it, however many
    )
    # Unlike one of `redis.Redis.from_url`, this client does not lock its pool when a child throws it away.
    return redis.Redis(connection_pool=pool)


def _without_password(url: str) -> str:
    """Return a URL as it may be shown; raise `ValueError` where a part of a password may stand in a wrong place."""
    parts = urlsplit(str(url))
    if parts.fragment or "@" in parts.path + parts.query:
        raise ValueError
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
