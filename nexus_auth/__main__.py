"""Command line of nexus_auth, to try credentials and to look at what the Nexus API answers.

get, token and check read these environment variables; credentials are never arguments, which other users can see:
  NEXUS_CLIENT_ID, NEXUS_CLIENT_SECRET   the API client, made in the Nexus Identity portal
  NEXUS_ENVIRONMENT                      test or production; or in its place, for another environment, both
  NEXUS_TOKEN_ENDPOINT, NEXUS_BASE_URL   its URLs

They take, after the command:
  --environment test|production          that environment, whatever the last three variables say
  --sandbox                              an embedded sandbox: no account, no network, no variables
  -v, --verbose                          a log on stderr of what is sent where (never a secret)

examples:
  %(prog)s get /customer --sandbox
  %(prog)s check --environment test
  curl -H "Authorization: Bearer $(%(prog)s token)" https://testapi.quantoz.com/customer

exit status: 0 for success (2xx); 1 for a refusal or failure, its reason on stderr; 2 for wrong usage
"""

import json
import logging
import os
import shlex
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import nullcontext, suppress
from typing import Any

import requests

from .errors import TokenRequestError
from .requests import NexusAuth, nexus_session
from .testing import NexusSandbox

VARIABLES = [f"NEXUS_{name}" for name in ("CLIENT_ID", "CLIENT_SECRET", "TOKEN_ENDPOINT", "BASE_URL", "ENVIRONMENT")]
# Seconds, few since somebody waits at a terminal: for one token request, for a token, to connect to the API and for
# its answer.
TIMEOUT, MAX_WAIT, API_TIMEOUT = 5, 10, (5, 30)


def get(session: Any, arguments: Namespace) -> None:
    """Print what the API answers to GET PATH."""
    if "://" in arguments.path:
        raise ValueError("PATH is from the base URL on, as /customer")
    response = session.get(arguments.path, timeout=API_TIMEOUT)
    try:  # whatever the status: who reads a pipe finds the errors of the API there too
        print(json.dumps(response.json(), ensure_ascii=not (tty := sys.stdout.isatty()), indent=2 if tty else None))
    except (ValueError, RecursionError):
        sys.stdout.buffer.write(response.content)
    sys.stdout.flush()
    if not 200 <= response.status_code < 300:
        raise requests.HTTPError(_reason(response))


def token(session: Any, arguments: Namespace) -> None:
    """Print an access token and nothing else, for curl."""
    shown, auth = _access_token(session), session.auth
    if arguments.details:
        left = auth._credentials.token.expires_at - time.monotonic()
        lifetime = None if left == float("inf") else round(left)
        shown = json.dumps({"environment": auth.environment.name, "scope": auth._terms.scope, "lifetime": lifetime})
    print(shown, flush=True)


def check(session: Any, _: Namespace) -> None:
    """Say whether credentials, environment, network and API are right, and where it stops if not."""
    client_id, environment = session.auth.client_id, session.auth.environment
    print(f"environment variables: client {client_id!r}, environment {environment.name!r}", flush=True)
    with suppress(TokenRequestError):  # A refusal is an answer too, and is remembered for the next step.
        _access_token(session)
    print(f"network: token endpoint {environment.token_endpoint} answers", flush=True)
    _access_token(session)
    print("credentials: the token endpoint gives a token for them", flush=True)
    response = session.get("/", timeout=API_TIMEOUT)
    # Nothing need be found at the root of the API, but there a token that it does not take gets a 401 as anywhere.
    # An answer to a request without the token is that of another host, to which the API redirected.
    if "Authorization" not in response.request.headers or not (response.ok or response.status_code in (400, 404, 405)):
        raise requests.HTTPError(f"no sign that {environment.base_url} takes the token: {_reason(response)}")
    print(f"API: {environment.base_url} answers HTTP {response.status_code} and does not refuse the token", flush=True)


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
        with NexusSandbox() if arguments.sandbox else nullcontext() as nexus, _session(arguments, nexus) as session:
            arguments.run(session, arguments)
        return 0
    except KeyboardInterrupt:
        return 0 if arguments.run is sandbox else 130
    except BrokenPipeError:  # Nobody reads on, and the interpreter is not to complain of it when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        print("".join(c if c.isprintable() else " " for c in f"{__package__} stopped: {error}"), file=sys.stderr)
    return 1


def _parser() -> ArgumentParser:
    parser = ArgumentParser(f"python -m {__package__}", epilog=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for run in (get, token, check, sandbox):
        command = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run, sandbox=run is sandbox, environment=None, iso8601=False, verbose=False)
        if run is not sandbox:
            place = command.add_mutually_exclusive_group()
            place.add_argument("--environment", choices=["test", "production"], help="whatever the variables say")
            place.add_argument("--sandbox", action="store_true", help="no account, no network, no variables")
            command.add_argument("-v", "--verbose", action="store_true", help="log on stderr")
    commands.choices["get"].add_argument("path", metavar="PATH", help="from the base URL on, as /customer")
    commands.choices["get"].add_argument("--iso8601", action="store_true", help="dates as yyyy-MM-ddTHH:mm:ssZ")
    commands.choices["token"].add_argument("--details", action="store_true", help="its lifetime, scope and environment")
    return parser


def _session(arguments: Namespace, nexus: NexusSandbox | None) -> requests.Session:
    """Return a session for what the environment variables say, once those that an option replaces are set."""
    if arguments.environment:
        os.environ.update(NEXUS_ENVIRONMENT=arguments.environment, NEXUS_TOKEN_ENDPOINT="", NEXUS_BASE_URL="")
    if nexus:
        urls = nexus.environment.token_endpoint, nexus.environment.base_url
        os.environ.update(zip(VARIABLES, (nexus.client_id, nexus.client_secret, *urls, ""), strict=True))
    auth, secret, iso = NexusAuth.from_env(), os.environ["NEXUS_CLIENT_SECRET"], arguments.iso8601
    session = nexus_session(auth.client_id, secret, auth.environment, timeout=TIMEOUT, max_wait=MAX_WAIT, iso8601=iso)
    session.trust_env = not nexus  # no proxy leads to the sandbox
    return session


def _access_token(session: requests.Session) -> str:
    return str(session.prepare_request(requests.Request("GET", "/")).headers["Authorization"]).removeprefix("Bearer ")


def _reason(response: requests.Response) -> str:
    """Return the refusal of the API in its own words, if it is in Nexus's envelope."""
    said: list[object] = [f"GET {response.url}: HTTP {response.status_code} {response.reason}"]
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        said += response.json().get("message"), *(response.json().get("errors") or ())
    return ": ".join(str(words) for words in said if words)


if __name__ == "__main__":
    sys.exit(main())
