"""Command line of nexus_auth, to try credentials and to look at what the Nexus API answers.

get, token and check read these environment variables; credentials are never arguments, which other users can see:
  NEXUS_CLIENT_ID, NEXUS_CLIENT_SECRET   the API client, made in the Nexus Identity portal
  NEXUS_ENVIRONMENT                      test or production; or in its place, for another environment, both
  NEXUS_TOKEN_ENDPOINT, NEXUS_BASE_URL   its URLs
  NEXUS_STORE                            where processes share a token: a folder or a redis:// URL; if it is not set,
                                         a folder in your cache folder. A token is sealed with the client secret.

They take, after the command:
  --environment test|production          that environment, whatever the variables say of it
  --sandbox                              an embedded sandbox: no account, no network, no variables, no store
  --no-store                             share nothing with other processes
  --max-wait SECONDS                     the longest to wait for a token; a request under way keeps its 5 seconds
  -v, --verbose                          a log on stderr of what is sent where (never a secret)

examples:
  %(prog)s get /customer --sandbox
  %(prog)s check --environment test
  curl -H "Authorization: Bearer $(%(prog)s token)" https://testapi.quantoz.com/customer

exit status: 0 for success (2xx); 1 for a refusal or failure, its reason on stderr, or for a pipe that nobody reads;
2 for wrong usage; 130 for Ctrl-C
"""

import json
import logging
import math
import os
import re
import shlex
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NoReturn

import requests

from ._version import __version__
from .auth import credentials_from_env, store_from_env
from .errors import TokenRequestError
from .requests import nexus_session
from .testing import REVOKE_PATH, NexusSandbox

if TYPE_CHECKING:
    from .store import Store

# Seconds, few since somebody waits at a terminal: for one token request, for a token, to connect to the API and for
# its answer.
TIMEOUT, MAX_WAIT, API_TIMEOUT = 5, 10, (5, 30)


def get(arguments: Namespace) -> None:
    """Print what the API answers to GET PATH."""
    with _session(arguments, _store(arguments)) as session:
        response = session.get(arguments.path, timeout=API_TIMEOUT)
        _show(response)  # whatever the status: who reads a pipe finds the errors of the API there too
        if not 200 <= response.status_code < 300:
            raise requests.HTTPError(_reason(response))


def token(arguments: Namespace) -> None:
    """Print an access token and nothing else, for curl."""
    with _session(arguments, _store(arguments)) as session:
        shown = session.auth.access_token()
        if arguments.details:
            shown = json.dumps(_details(session.auth))
        print(shown, flush=True)


def check(arguments: Namespace) -> None:
    """Say whether credentials, environment, network, store and API are right, and where not; it asks for a token."""
    store = _store(arguments)
    trouble = _trouble(store) if store is not None else None
    with _session(arguments, None if store is None else _Unread(store)) as session:
        environment = session.auth.environment
        source = "sandbox" if arguments.sandbox else "environment variables"
        _say(f"{source}: client {session.auth.client_id!r}, environment {environment.name!r}")
        if store is not None:
            _say(f"store: {store!r} {'does not work' if trouble else 'works'}")
        with suppress(TokenRequestError):  # a refusal is an answer too, and is remembered for the next step
            session.auth.access_token()
        _say(f"network: token endpoint {environment.token_endpoint} answers")
        session.auth.access_token()
        _say("credentials: the token endpoint gives a token for them")
        _say(_taken(session, environment.base_url))
    if trouble:
        raise ValueError(f"everything works but the store: {trouble}")


def sandbox(arguments: Namespace) -> None:
    """Run a sandbox until Ctrl-C, and print the environment variables that lead to it."""
    nexus = NexusSandbox(port=arguments.port, limit=arguments.limit, expires_in=arguments.expires_in)
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        try:
            stack.enter_context(nexus)
        except OSError as error:
            raise OSError(f"--port {arguments.port}: {error}") from None
        variables = {
            "NEXUS_CLIENT_ID": nexus.client_id,
            "NEXUS_CLIENT_SECRET": nexus.client_secret,
            "NEXUS_TOKEN_ENDPOINT": nexus.environment.token_endpoint,
            "NEXUS_BASE_URL": nexus.environment.base_url,
            "NEXUS_ENVIRONMENT": "",
        }
        for name, value in variables.items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        # Not on stdout, which is for a shell to read.
        print(f"# to revoke all its tokens: curl -X POST {nexus.environment.base_url}{REVOKE_PATH}", file=sys.stderr)
        while True:
            time.sleep(3600)
    arrived = f"token requests: {len(nexus.token_requests)}, API requests: {len(nexus.requests)}"
    print(f"# {arrived}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` names, and return its exit status."""
    arguments = _parser().parse_args(argv)
    _log_to_stderr(logging.DEBUG if arguments.verbose else logging.CRITICAL)
    if sys.stdout is None:  # closed by who started this
        print(f"{__package__} stopped: there is no stdout to write to", file=sys.stderr)
        return 1
    try:
        arguments.run(arguments)
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads on, and the interpreter is not to complain of it when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, ImportError) as error:  # ImportError: a store that needs what is not installed
        print(_visible(f"{__package__} stopped: {error}"), file=sys.stderr)
    return 1


class _Parser(ArgumentParser):
    """A parser whose messages show what was typed, and do not let it steer the terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(_visible(message))


def _parser() -> ArgumentParser:
    started_as = PurePath(sys.argv[0]).name.removesuffix(".exe")
    prog = f"python -m {__package__}" if started_as == "__main__.py" else started_as
    parser = _Parser(prog, epilog=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"{__package__} {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for run in (get, token, check, sandbox):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run, iso8601=False, verbose=False)
    for name in ("get", "token", "check"):
        _add_common_options(commands.choices[name])
    commands.choices["get"].add_argument("path", metavar="PATH", type=_path, help="from the base URL on, as /customer")
    commands.choices["get"].add_argument("--iso8601", action="store_true", help="dates as yyyy-MM-ddTHH:mm:ssZ")
    commands.choices["token"].add_argument("--details", action="store_true",
                                           help="in its place, its lifetime, scope and environment")  # fmt: skip
    _add_sandbox_options(commands.choices["sandbox"])
    return parser


def _add_common_options(command: ArgumentParser) -> None:
    place = command.add_mutually_exclusive_group()
    place.add_argument("--environment", choices=["test", "production"], help="whatever the variables say of it")
    place.add_argument("--sandbox", action="store_true", help="no account, no network, no variables, no store")
    command.add_argument("--no-store", action="store_true", help="share nothing with other processes")
    command.add_argument("--max-wait", metavar="SECONDS", type=_seconds, default=MAX_WAIT,
                         help=f"the longest to wait for a token; {MAX_WAIT} if not given")  # fmt: skip
    command.add_argument("-v", "--verbose", action="store_true", help="log on stderr")


def _add_sandbox_options(command: ArgumentParser) -> None:
    command.add_argument("--port", type=_whole_number(65535), default=0, help="any free one if not given")
    command.add_argument("--limit", metavar="REQUESTS", type=_whole_number(math.inf), default=60,
                         help="token requests a minute; 60 if not given")  # fmt: skip
    command.add_argument("--expires-in", metavar="SECONDS", type=_whole_number(math.inf), default=3600,
                         help="lifetime of its tokens; 3600 if not given")  # fmt: skip


def _path(text: str) -> str:
    if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE):
        raise ArgumentTypeError("it is from the base URL on, as /customer")
    return text


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) <= 1e9:
            return float(text)
    raise ArgumentTypeError(f"a number of seconds, not {text!r}")


def _whole_number(most: float) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or int(text) > most:
            raise ArgumentTypeError(f"a whole number{'' if most == math.inf else f' up to {most}'}, not {text!r}")
        return int(text)

    return whole_number


@contextmanager
def _session(arguments: Namespace, store: "Store | None") -> Generator[Any, None, None]:
    """Open a session for a sandbox of its own, or for what options and environment variables name."""
    options: dict[str, Any] = {"timeout": TIMEOUT, "max_wait": arguments.max_wait, "iso8601": arguments.iso8601}
    if arguments.sandbox:
        with NexusSandbox() as nexus:
            credentials = nexus.client_id, nexus.client_secret, nexus.environment
            with nexus_session(*credentials, **options) as session:
                session.trust_env = False  # no proxy leads to the sandbox
                yield session
        return
    if arguments.environment:
        os.environ.update(NEXUS_ENVIRONMENT=arguments.environment, NEXUS_TOKEN_ENDPOINT="", NEXUS_BASE_URL="")
    with nexus_session(*credentials_from_env("NEXUS_"), store=store, **options) as session:
        yield session


def _store(arguments: Namespace) -> "Store | None":
    """Return the store to use: that of the environment variable, or a folder in the user's cache folder."""
    where = store_from_env() or _cache_folder()
    if arguments.no_store or arguments.sandbox or where is None:
        return None
    from .store import open_store  # late: without a store nothing of it is loaded

    return open_store(where)


def _cache_folder() -> str | None:
    """Return our folder in the user's cache folder; None if there is no telling where that is."""
    cache = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # the XDG Base Directory Specification has relative ones ignored
        cache = os.path.expanduser(os.path.join("~", ".cache"))
    return os.path.join(cache, "nexus_auth") if os.path.isabs(cache) else None


def _trouble(store: "Store") -> Exception | None:
    """Return what is wrong with `store`."""
    try:
        store.put("check", b"check", 1.0)
    except Exception as error:  # whatever the store raises
        return error
    return None


class _Unread:
    """A store in which no token and no failure of others is found: what is fetched is proved, and counts in it."""

    def __init__(self, store: "Store") -> None:
        self._store = store

    def __repr__(self) -> str:
        return repr(self._store)

    def acquire(self, name: str, owner: str, limit: int, hold: float) -> float:
        return self._store.acquire(name, owner, limit, hold)

    def release(self, name: str, owner: str, keep: float) -> None:
        self._store.release(name, owner, keep)

    def get(self, name: str) -> tuple[bytes, float] | None:
        # Until when the token endpoint wants to be left alone is found all the same.
        return None if name.startswith(("token:", "failure:")) else self._store.get(name)

    def put(self, name: str, value: bytes, ttl: float) -> None:
        self._store.put(name, value, ttl)


def _details(auth: Any) -> dict[str, Any]:
    left = auth.expires_in
    return {
        "environment": auth.environment.name,
        "scope": auth.scope,
        "lifetime": None if left == math.inf else round(left),
    }


def _taken(session: Any, base_url: str) -> str:
    """Return what shows that the API takes the token. Raises `requests.HTTPError` if nothing does."""
    response = session.get("/", timeout=API_TIMEOUT)
    # Nothing need be found at the root of the API, but there a token that it does not take gets a 401 as anywhere.
    # An answer to a request without the token is that of another host, to which the API redirected.
    if "Authorization" not in response.request.headers or not (response.ok or response.status_code in (400, 404, 405)):
        raise requests.HTTPError(f"no sign that {base_url} takes the token: {_reason(response)}")
    return f"API: {base_url} answers HTTP {response.status_code} and does not refuse the token"


def _show(response: requests.Response) -> None:
    """Print the body of `response`: for people on a terminal, as plain JSON or as it came in a pipe."""
    for_people = sys.stdout.isatty()
    try:
        document = response.json()
    except (ValueError, RecursionError):
        if for_people:
            print(_visible(response.text, keep="\n\t"), flush=True)
        else:
            sys.stdout.buffer.write(response.content)
            sys.stdout.flush()
        return
    shows_all = for_people and sys.stdout.encoding.lower() == "utf-8"
    text = json.dumps(document, ensure_ascii=not shows_all, indent=2 if for_people else None)
    print(_visible(text, keep="\n"), flush=True)


def _reason(response: requests.Response) -> str:
    """Return the refusal of the API in its own words, if it is in Nexus's envelope."""
    said: list[object] = [f"GET {response.url}: HTTP {response.status_code} {response.reason}"]
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        said += response.json().get("message"), *(response.json().get("errors") or ())
    return ": ".join(str(words) for words in said if words)


def _visible(text: str, keep: str = "") -> str:
    """Return `text` with escapes, those of JSON, for control and direction characters, which would steer a terminal."""
    return "".join(c if c.isprintable() or c in keep else json.dumps(c)[1:-1] for c in text)


def _say(text: str) -> None:
    print(_visible(text), flush=True)


def _log_to_stderr(level: int) -> None:
    class Visible(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return _visible(super().format(record), keep="\n\t")

    handler = logging.StreamHandler()
    handler.setFormatter(Visible(logging.BASIC_FORMAT))
    logging.basicConfig(level=level, handlers=[handler])


if __name__ == "__main__":
    sys.exit(main())
