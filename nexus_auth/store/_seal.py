"""Seals: only who knows the client secret finds what is in a store, reads it, or puts it there."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, NoReturn

from ..secret import HiddenText
from ..steps import Client
from ..value import Value
from ._fork import deriving

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_VERSION = "nexus_auth store 1"  # changes with what is sealed and how: nobody then finds a row that it cannot read
_N, _R, _P = 2**14, 8, 1  # RFC 7914 section 2: each guess of a weak secret takes 16 MiB and some ten milliseconds
_MAX_MEMORY = 2**26  # bytes; hashlib has to be allowed what scrypt takes
_NONCE, _TAG = 12, 16  # bytes; NIST SP 800-38D section 5.2.1


class _Keys(Value):
    """What scrypt makes of a secret: the name of the client's rows, and the key to them."""

    name: str
    cipher: AESGCM


class Seal:
    """What one API client names and seals its rows with: with another secret or scope, one finds and opens nothing.

    The keys are derived once, when they are first needed, which takes some ten milliseconds; then the secret is let
    go. A `Seal` is not pickled.
    """

    def __init__(self, client: Client) -> None:
        # JSON marks where each field ends: no two clients have one text. The secret goes into the key.
        public = [value for name, value in vars(client).items() if name != "client_secret"]
        self._salt = hashlib.sha256(json.dumps([_VERSION, *public]).encode()).digest()
        self._secret_or_keys: HiddenText | _Keys = client.client_secret

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Seal is not pickled: it holds the key to the tokens in a store")

    def name(self, kind: str) -> str:
        """Return the name of this client's row of one kind: a token, a failure, the turn to fetch."""
        return f"{kind}:{self._keys().name}"

    def seal(self, kind: str, plaintext: bytes) -> bytes:
        """Return `plaintext` sealed for the row of that kind, and for no other."""
        nonce = os.urandom(_NONCE)
        return nonce + self._keys().cipher.encrypt(nonce, plaintext, self.name(kind).encode())

    def open(self, kind: str, sealed: bytes) -> bytes | None:
        """Return what was sealed for the row of that kind; None for anything else."""
        cipher, name = self._keys().cipher, self.name(kind)
        from cryptography.exceptions import InvalidTag  # is loaded by now, with the cipher

        if len(sealed) < _NONCE + _TAG:
            return None
        try:
            return cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], name.encode())
        except InvalidTag:
            return None

    def _keys(self) -> _Keys:
        with deriving:
            if isinstance(self._secret_or_keys, HiddenText):
                self._secret_or_keys = _derive(self._secret_or_keys, self._salt)
            return self._secret_or_keys


def _derive(client_secret: HiddenText, salt: bytes) -> _Keys:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # late: it takes a while, and most do without

    secret = client_secret.encode(errors="surrogatepass")
    derived = hashlib.scrypt(secret, salt=salt, n=_N, r=_R, p=_P, maxmem=_MAX_MEMORY, dklen=64)
    return _Keys(name=derived[32:].hex(), cipher=AESGCM(derived[:32]))
