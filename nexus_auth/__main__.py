"""Command line of nexus_auth, to try credentials and to look at what the Nexus API answers.

get, token and check find in environment variables, never in arguments:
  NEXUS_CLIENT_ID, NEXUS_CLIENT_SECRET   the API client, made in the Nexus Identity portal
  NEXUS_ENVIRONMENT                      test or production, or for another environment
  NEXUS_TOKEN_ENDPOINT, NEXUS_BASE_URL   both its URLs

and take after their name the options
  --environment test|production          that environment, whatever the last three variables say
  --sandbox                              an embedded sandbox: no account, no network, no variables
  -v, --verbose                          say on stderr how the token is obtained

examples:
  python -m nexus_auth get /customer --sandbox
  python -m nexus_auth check --environment test
  curl -H "Authorization: Bearer $(python -m nexus_auth token)" https://testapi.quantoz.com/customer

exit status: 0 for success (2xx); 1 for a refusal or failure, with its reason on stderr; 2 for wrong usage
"""

import argparse
import contextlib
import json
import logging
import os
import shlex
import sys
import time
from typing import Any

import requests

from .requests import NexusAuth, TokenRequestError, nexus_session
from .testing import NexusSandbox

PROG = f"python -m {__package__}"
VARIABLES = [f"NEXUS_{name}" for name in ("CLIENT_ID", "CLIENT_SECRET", "TOKEN_ENDPOINT", "BASE_URL", "ENVIRONMENT")]
# Who waits at a terminal wants to know soon: seconds for a token; to connect to the API, and to wait for its answer.
OPTIONS: dict[str, Any] = {"scope": "api1", "timeout": 5, "max_wait": 10}
API_TIMEOUT = 5, 30


def get(session: requests.Session, arguments: argparse.Namespace) -> None:
    """Print what the API answers to GET PATH."""
    response = session.get(arguments.path, timeout=API_TIMEOUT)
    try:  # whatever the status: who reads a pipe reads the errors of the API there too
        _print_json(response.json())
    except (ValueError, RecursionError):
        sys.stdout.buffer.write(response.content)
    if not 200 <= response.status_code < 300:
        raise requests.HTTPError(_reason(response))


def token(session: requests.Session, arguments: argparse.Namespace) -> None:
    """Print an access token and nothing else, for curl."""
    access_token, auth = _sign(session)
    if arguments.details:
        lifetime = auth._credentials.token.expires_at - time.monotonic()
        seconds = None if lifetime == float("inf") else round(lifetime)
        _print_json({**auth.environment._asdict(), "scope": OPTIONS["scope"], "lifetime": seconds})
    else:
        print(access_token)


def check(session: requests.Session, _: argparse.Namespace) -> None:
    """Say whether credentials, environment, network and API are right, and where it stops if not."""
    auth: Any = session.auth
    print(f"environment variables: client {auth.client_id!r}, environment {auth.environment.name!r}", flush=True)
    with contextlib.suppress(TokenRequestError):  # A refusal is an answer too, and comes again in the next step.
        _access_token(session)
    print(f"network: token endpoint {auth.environment.token_endpoint} answers", flush=True)
    _access_token(session)
    print("credentials: the token endpoint gives a token for them", flush=True)
    response = session.get("/", timeout=API_TIMEOUT)
    if "Authorization" not in response.request.headers:
        raise requests.HTTPError(f"API {auth.environment.base_url} redirects to {response.url}, outside of it")
    # Nothing need be found at the root of the API; but what comes of a token that it does not take is a 401.
    if not response.ok and response.status_code not in (400, 404, 405):
        raise requests.HTTPError(_reason(response))
    print(f"API: {auth.environment.base_url} answers, and does not refuse the token")


def sandbox(*_: object) -> None:
    """Run a sandbox until Ctrl-C, and print the environment variables that lead to it."""
    print("\n".join(f"export {name}={shlex.quote(os.environ[name])}" for name in VARIABLES), flush=True)
    while True:
        time.sleep(3600)


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` names, and return its exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.CRITICAL)
    try:
        with NexusSandbox() if arguments.sandbox else contextlib.nullcontext() as nexus:
            with _session(arguments, nexus) as session:
                arguments.run(session, arguments)
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 0 if arguments.run is sandbox else 130
    except BrokenPipeError:  # Nobody reads on, of which the interpreter is not to complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        reason = f"{PROG} {arguments.command} stopped: {str(error) or type(error).__name__}"
        print("".join(c if c.isprintable() else " " for c in reason), file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    summary, _, epilog = str(__doc__).replace("python -m nexus_auth", PROG).partition("\n\n")
    verbatim = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(PROG, description=summary, epilog=epilog, formatter_class=verbatim)
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for run in (get, token, check, sandbox):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run, environment=None, sandbox=run is sandbox, verbose=False, iso8601=False)
        if run is not sandbox:
            place = command.add_mutually_exclusive_group()
            place.add_argument("--environment", choices=["test", "production"], help="whatever the variables say")
            place.add_argument("--sandbox", action="store_true", help="no account, no network, no variables")
            command.add_argument("-v", "--verbose", action="store_true", help="log on stderr")
    commands.choices["get"].add_argument("path", metavar="PATH", help="relative to the base URL, as /customer")
    commands.choices["get"].add_argument("--iso8601", action="store_true", help="all dates as yyyy-MM-ddTHH:mm:ssZ")
    details = "instead, as JSON, of what environment and scope it is, and its lifetime in seconds"
    commands.choices["token"].add_argument("--details", action="store_true", help=details)
    return parser


def _session(arguments: argparse.Namespace, nexus: NexusSandbox | None) -> requests.Session:
    """Return a session for what the environment variables say, having set those that an option is in place of."""
    if arguments.environment:
        os.environ.update(NEXUS_ENVIRONMENT=arguments.environment, NEXUS_TOKEN_ENDPOINT="", NEXUS_BASE_URL="")
    if nexus:
        urls = nexus.environment.token_endpoint, nexus.environment.base_url
        os.environ.update(zip(VARIABLES, (nexus.client_id, nexus.client_secret, *urls, ""), strict=True))
    auth, options = NexusAuth.from_env(), {**OPTIONS, "iso8601": arguments.iso8601}
    session = nexus_session(auth.client_id, os.environ["NEXUS_CLIENT_SECRET"], auth.environment, **options)
    session.trust_env = not nexus  # no proxy leads to the sandbox
    return session


def _access_token(session: requests.Session) -> str:
    return str(session.prepare_request(requests.Request("GET", "/")).headers["Authorization"]).removeprefix("Bearer ")


def _print_json(document: object) -> None:
    people = sys.stdout.isatty()
    print(json.dumps(document, indent=2 if people else None, ensure_ascii=not people))


def _reason(response: requests.Response) -> str:
    """Return the refusal of the API in its own words, if it is in Nexus's envelope."""
    said: list[object] = []
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        said = [response.json().get("message"), *(response.json().get("errors") or [])]
    status = f"GET {response.url}: HTTP {response.status_code} {response.reason}"
    return ": ".join(str(words) for words in [status, *said] if words)


if __name__ == "__main__":
    sys.exit(main())
