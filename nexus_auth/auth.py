"""The auth object: what every `NexusAuth` is, whichever HTTP library it signs for, and the blocking driver."""

import contextlib
import inspect
import logging
import os
import re
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator, MappingView, Sequence, Set
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, TypeVar

from .credentials import Credentials, credentials_of
from .environment import Environment
from .errors import TokenRequestError, TokenWaitError
from .grant import Fault, logger
from .known import Call, Decision, Failure, GiveUp, Limits, Raise, TooLong, Use
from .late_import import has_module
from .quota import Place
from .secret import HiddenText, NotText, hidden
from .steps import CallStore, Client, Failed, Response, SendTokenRequest, Sleep, Steps
from .threads import result_of, start_thread
from .token import Token

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .store import Store

    StoreArgument = str | os.PathLike[str] | Store

A = TypeVar("A", bound="BaseAuth")
T = TypeVar("T")
MAX_SECONDS = 1e9  # of an argument
REPEATABLE = (Sequence, Set, MappingView)  # bodies that can be read again and again; others may only look so


class AuthOptions(TypedDict, total=False):
    """The options of `from_env`, for type checkers; a door takes one of the last two."""

    scope: str
    leeway: float
    timeout: float
    max_wait: float
    store: "StoreArgument | None"
    session: Any
    client: Any


class BaseAuth(ABC):
    """The arguments of a `NexusAuth`, checked, and the credentials that it shares with others of its kind.

    `environment` and `client_id` can be read; the secret is shown nowhere, and the arguments stay as they are.
    """

    environment: Environment
    client_id: str

    # The errors of the HTTP library, the module they are in, and those of the door that are both.
    _library_errors: ClassVar[ModuleType]
    _library_error: ClassVar[type[Exception]]
    _connection_error: ClassVar[type[Exception]]
    _timeout_error: ClassVar[type[Exception]]
    _token_request_error: ClassVar[type[TokenRequestError]]
    _token_wait_error: ClassVar[type[TokenWaitError]]

    def __init__(
        self,
        client_id: str,
        client_secret: str,
        environment: Environment | str,
        *,
        scope: str,
        leeway: float,
        timeout: float,
        max_wait: float,
        store: "StoreArgument | None",
        lent: Any,
    ) -> None:
        for name, text in (("client_id", client_id), ("client_secret", client_secret), ("scope", scope)):
            _check_text(name, text)
        for name, seconds in (("leeway", leeway), ("timeout", timeout), ("max_wait", max_wait)):
            _check_seconds(name, seconds)
        if timeout == 0:
            raise ValueError("timeout must be more than 0 seconds")
        self.environment = Environment.of(environment)
        self.client_id = client_id
        self._client = Client(self.environment.token_endpoint, client_id, HiddenText(client_secret), scope)
        self._limits = Limits(leeway, timeout, max_wait)
        self._store = _opened(store)
        self._lent = lent
        self._credentials: Credentials = credentials_of(self._client, self._store)

    @classmethod
    def from_env(cls: type[A], prefix: str = "NEXUS_", **options: "Unpack[AuthOptions]") -> A:
        """Return an auth for what the environment variables name; `options` are those of the constructor.

        They are `NEXUS_CLIENT_ID`, `NEXUS_CLIENT_SECRET` and `NEXUS_ENVIRONMENT` (test or production), or in place of
        the last both `NEXUS_TOKEN_ENDPOINT` and `NEXUS_BASE_URL`; and `NEXUS_STORE`, if it is set. Another `prefix`,
        as "ACME_", takes the place of "NEXUS_". Raises `ValueError`, naming all that is missing.
        """
        arguments: dict[str, Any] = {"store": store_from_env(prefix), **options}
        return cls(*credentials_from_env(prefix), **arguments)

    @property
    def scope(self) -> str:
        """The scopes that the token is asked for, separated by spaces."""
        return self._client.scope

    @property
    def expires_in(self) -> float:
        """The seconds that the token at hand has to live: 0 if there is none, infinite if the server did not say."""
        return self._credentials.seconds_left()

    def access_token(self, *, refused: str | None = None) -> str:
        """Return the access token, obtained like that of a call: for a websocket, gRPC or a subprocess.

        It goes wherever you send it: unlike a call's it is not kept from strangers. `refused` is a token that the API
        has refused, as with a 401: another one is returned. Raises the errors of a call.
        """
        return self._token_of(self._obtain(self._insistent_call(refused), refused)).access_token

    def __repr__(self) -> str:
        if not hasattr(self, "_credentials"):  # error trackers show what could not be made, too
            return f"<{type(self).__name__}>"
        return f"<{type(self).__name__} client_id={self.client_id!r} environment={self.environment.name!r}>"

    def __setattr__(self, name: str, value: object) -> None:
        if name in _ARGUMENTS and hasattr(self, "_credentials"):
            raise AttributeError(f"{name} of a NexusAuth stays as it is: make another NexusAuth")
        super().__setattr__(name, value)

    def __copy__(self: A) -> A:
        return self.lent(self._lent)

    def __deepcopy__(self: A, memo: dict[int, Any]) -> A:
        return self.lent(self._lent)  # what is lent is no part of it

    def __getstate__(self) -> dict[str, Any]:
        store = travelling(self._store, "store")
        return {**self.__dict__, "_credentials": None, "_lent": self._travelling(), "_store": store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():  # not by `vars`, as in `Value`
            object.__setattr__(self, name, value)
        self._credentials = credentials_of(self._client, self._store)

    def lent(self: A, lent: Any) -> A:
        """Return a copy for whose token requests `lent` is lent: a session or client, or a weak reference to one."""
        return self._twin(type(self), _lent=lent)

    def _twin(self, kind: type[A], **changes: Any) -> A:
        """Return an auth of `kind` with the arguments of this one, but for `changes`."""
        twin = kind.__new__(kind)
        twin.__setstate__({**self.__dict__, **changes})
        return twin

    @property
    def _borrowed(self) -> Any:
        """The session or client that is lent, if it still lives: that of a factory lends itself, and owns its auth."""
        is_weak = isinstance(self._lent, weakref.ref)
        return self._lent() if is_weak else self._lent

    @abstractmethod
    def _travelling(self) -> Any:
        """Return what goes into a pickle of what is lent."""

    @abstractmethod
    def _send(self, step: SendTokenRequest) -> Response | Failed:
        """Send a token request once, and return the answer; see `SendTokenRequest`."""

    def _reject(self, request: object) -> TypeError:
        """Return the error that tells the user of another library which auth to take."""
        own, other = (kind.__module__.partition(".")[0] for kind in (self._library_error, type(request)))
        has_door = other in ("requests", "httpx", "httpx2") and has_module(f"{__package__}.{other}")
        right = f"; for {other}: from {__package__}.{other} import NexusAuth" if has_door else f", not for {other}"
        return TypeError(f"this NexusAuth is for {own}{right}")

    def _insistent_call(self, refused: str | None) -> Call:
        if refused is not None:
            _check_text("refused", refused)
            if refused.lower().startswith("bearer "):
                raise ValueError("refused must be the access token alone, without the word Bearer")
            self._credentials.answered(refused, 401)
        return Call(self._limits, insists=True)

    def _obtain(self, call: Call, refused: str | None = None) -> Decision:
        """Return what came of the way to a token, blocking."""
        place = Place(threading.get_ident())
        return self._perform(self._credentials.obtain(call, place, refused))

    def _token(self, decision: Decision, request: Any) -> Token:
        """Return the token for `request`, or raise the error that `decision` tells of."""
        try:
            return self._token_of(decision)
        except self._library_error as error:
            error.request = request  # type: ignore[attr-defined]  # that of the token has the secret in it
            raise

    def _replay_token(self, decision: Decision, call: Call, request: Any) -> Token | None:
        """Return the token to send `request` with once more after a 401; None: leave it at that."""
        if isinstance(decision, GiveUp):
            return None
        if not call.repeatable:
            message, url = "%s %s: not sent again after a 401, since its body cannot be", _logged(request.url)
            logger.info(message, request.method, url, extra=self._log_fields(url))
            return None
        return self._token(decision, request)

    @contextlib.contextmanager
    def _replay(self, call: Call) -> Generator[list[int], None, None]:
        """Judge by the status code that is put into the list whether the renewal of the token has helped."""
        status_codes: list[int] = []
        try:
            yield status_codes
        finally:
            if call.renewed is not None:
                self._credentials.replayed(call.renewed, status_codes[0] if status_codes else None)

    def _say_no_token_sent(self, url: object) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            message, url = "no token sent to %s: not of environment %s", _logged(url)
            logger.debug(message, url, self.environment.name, extra=self._log_fields(url))

    def _log_fields(self, url: str) -> dict[str, str]:
        """Return what a record of a call to `url` carries for structured logs."""
        return {"client_id": self.client_id, "environment": self.environment.name, "url": url}

    def _token_of(self, decision: Decision) -> Token:
        """Return the token that `decision` is, or raise the error."""
        if isinstance(decision, Use):
            return decision.token
        if isinstance(decision, TooLong):
            raise self._wait_error(decision.reason, decision.retry_after)
        if isinstance(decision, Raise):
            raise self._error_of(decision.failure)
        raise AssertionError(f"{decision} is no end of the way to a token")

    def _error_of(self, failure: Failure) -> Exception:
        """Return a new error that tells of `failure`: none is to be raised in several threads."""
        fault = failure.fault
        if failure.out_of_time:
            return self._wait_error(fault.reason, failure.until - self._credentials.clock(), fault.advice)
        seconds = self._credentials.clock() - failure.met_at
        remembered = f", {seconds:.0f} s ago" if seconds >= 1 else ""  # maybe of another client, with other proxies
        message = f"{self.environment} {fault.reason}{remembered}. {fault.advice}"
        if fault.library_error is not None:
            return self._class_of(fault)(message)
        return self._token_request_error(
            message,
            error=fault.error,
            error_description=fault.error_description,
            status_code=fault.status_code,
            environment=self.environment,
            retry_after=fault.retry_after,
        )

    def _wait_error(self, reason: str, seconds: float, advice: str = "Try again then.") -> TokenWaitError:
        seconds = round(max(0.0, seconds), 3)
        later = f"the next token request may go in {seconds:.1f} s, later than max_wait allows"
        message = f"{self.environment} {reason}: {later}. {advice}"
        return self._token_wait_error(message, retry_after=seconds)

    def _class_of(self, fault: Fault) -> type[Exception]:
        """Return the error class of this door's library: the fault may have been met by another."""
        kind = getattr(self._library_errors, fault.library_error or "", None)
        if isinstance(kind, type) and issubclass(kind, self._library_error):
            return kind
        return self._timeout_error if fault.timed_out else self._connection_error

    def _failed(self, error: Exception) -> Failed:
        """Return an error of the HTTP library as data, named by the nearest class that is the library's own."""
        library = self._library_error.__module__.partition(".")[0]
        name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__.partition(".")[0] == library)
        cause: BaseException | None = error
        while cause is not None and not str(cause):  # some errors say nothing, but what they came of does
            cause = cause.__cause__ or cause.__context__
        return Failed(name, str(cause or ""), isinstance(error, self._timeout_error))

    def _perform(self, steps: Steps[T]) -> T:
        """Perform `steps`, blocking, and return what they come to."""
        answer: Any = None
        with contextlib.closing(steps):
            while True:
                try:
                    step = steps.send(answer)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                answer = None
                match step:
                    case Sleep(seconds):
                        time.sleep(seconds)
                    case SendTokenRequest():
                        answer = self._send(step)
                    case CallStore(function, limit):  # pragma: no branch  # there is no other
                        answer = result_of(start_thread(function), limit)


_ARGUMENTS = frozenset(
    ("client_id", "client_secret", "environment", "scope", "leeway", "timeout", "max_wait", "store", "session",
     "client")
)  # fmt: skip


def own_send(lent: Any) -> Any:
    """Return the `send` that was set on the session or client itself, as mocks do; None if it has only its class's."""
    send = lent.send
    if hasattr(send, "mock"):
        return send  # of `unittest.mock.create_autospec`, for one: it makes functions
    if getattr(send, "__func__", None) is lent.__class__.send:
        return None  # without `vars`: CPython looks up attributes more slowly once an object's __dict__ was asked for
    # A method of whatever kind has __get__, and a mock has not, be it the lent object or the method of its class.
    is_method = hasattr(inspect.getattr_static(_real_class(lent), "send", None), "__get__")
    return None if is_method and "send" not in vars(lent) else send


def _real_class(thing: object) -> type:
    """Return the class of `thing`, where a mock pretends another by its `__class__`."""
    return type(thing)


def travelling(thing: T, name: str) -> T | None:
    """Return `thing` if it can be pickled; if not, say that it stays behind."""
    import pickle  # loaded by now, since this is what it calls

    try:
        pickle.dumps(thing)
    except Exception as error:  # whatever the classes of others raise
        logger.debug("the %s stays behind when its auth is pickled: %s", name, error)
        return None
    return thing


def merged_cookies(sent: str, received: str) -> str:
    """Return the Cookie header (RFC 6265 section 4.2) of a replay: what was `sent`, and what came with the 401."""
    pairs = [pair.partition("=") for header in (sent, received) for pair in header.split("; ") if pair]
    return "; ".join(f"{name}{equals}{value}" for name, (equals, value) in {p[0]: p[1:] for p in pairs}.items())


def credentials_from_env(prefix: str) -> tuple[str, str, Environment]:
    """Return client_id, client_secret and environment as the environment variables name them; see `from_env`."""
    names = {key: prefix + key for key in ("CLIENT_ID", "CLIENT_SECRET", "ENVIRONMENT", "TOKEN_ENDPOINT", "BASE_URL")}
    values = {key: hidden(os.environ.get(name, "")) for key, name in names.items()}
    has_url = bool(values["TOKEN_ENDPOINT"] or values["BASE_URL"])
    if values["ENVIRONMENT"] and has_url:
        raise ValueError(f"{names['ENVIRONMENT']} is set, and so is a URL that takes its place: unset one of them")
    needed = ["CLIENT_ID", "CLIENT_SECRET", *(("TOKEN_ENDPOINT", "BASE_URL") if has_url else ("ENVIRONMENT",))]
    if missing := [names[key] for key in needed if not values[key]]:
        raise ValueError(f"environment variables not set: {', '.join(missing)}")
    try:
        _check_text("client_id", values["CLIENT_ID"])
        _check_text("client_secret", values["CLIENT_SECRET"])
        if has_url:
            urls = {"token_endpoint": str(values["TOKEN_ENDPOINT"]), "base_url": str(values["BASE_URL"])}
            environment = Environment("custom", **urls)
        else:
            environment = Environment.of(str(values["ENVIRONMENT"]))
    except ValueError as error:
        raise ValueError(f"environment variables {prefix}*: {error}") from None
    return str(values["CLIENT_ID"]), values["CLIENT_SECRET"], environment


def credentials_or_env(
    client_id: str | None, client_secret: str | None, environment: Environment | str | None
) -> tuple[str, str, Environment | str]:
    """Return the three arguments of a factory, or what the environment variables say if it was called without them.

    Raises `TypeError` for some of the three but not all, naming what is missing; see `from_env` for the variables.
    """
    given = {"client_id": client_id, "client_secret": client_secret, "environment": environment}
    missing = [name for name, value in given.items() if value is None]
    if client_id is not None and client_secret is not None and environment is not None:
        return client_id, client_secret, environment
    if len(missing) == len(given):
        return credentials_from_env("NEXUS_")
    raise TypeError(f"missing: {', '.join(missing)}; without all three the environment variables NEXUS_* are read")


def store_from_env(prefix: str = "NEXUS_") -> str | None:
    """Return the store that the environment variable names, if one does; it may have a password in it."""
    return hidden(os.environ.get(f"{prefix}STORE", "")) or None


def _opened(store: "StoreArgument | None") -> "Store | None":
    if store is None:
        return None
    from .store import open_store  # loaded only where one is used

    return open_store(store)


def _logged(url: object) -> str:
    """Return `url` without userinfo, query and fragment, in which others keep secrets."""
    return re.sub(r"\A([^/]*//)[^/]*@", r"\1", re.split("[?#]", str(url))[0])


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        kind = text.type_name if isinstance(text, NotText) else type(text).__name__
        kind = "bytes" if isinstance(text, bytes) else kind  # those of a secret are of a class of ours
        raise TypeError(f"{name} must be a str, not {kind}")
    if not text.strip():
        raise ValueError(f"{name} is empty")
    if text.endswith(("\n", "\r")):
        raise ValueError(f"{name} ends with a newline: strip() what is read from a file")
    if re.search(r"[\ud800-\udfff]", text):
        raise ValueError(f"{name} has lone surrogates: it was read with the wrong encoding")


def _check_seconds(name: str, seconds: object) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} must be a number of seconds, not {type(seconds).__name__}")
    if not 0 <= seconds <= MAX_SECONDS:
        raise ValueError(f"{name} must be a sensible number of seconds, not {seconds}")
