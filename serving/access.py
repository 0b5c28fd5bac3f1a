"""Who may ask: API keys and admin tokens, from settings or from files that are re-read when they change."""

import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import SecretStr
from starlette.types import Scope

from serving.errors import AdminDisabled, ConfigInvalid, InvalidApiKey, ServingError
from serving.settings import SecuritySettings, Settings, check_secret

ADMIN_PREFIX = "/api/v1/admin/"
# A key file is looked at no more often than this, so that the hot path does not wait for the file system.
_RECHECK_SECONDS = 1.0
_SCHEME = b"bearer "

_log = logging.getLogger(__name__)

Stamp = tuple[int, int, int]


class KeyRing:
    """The secrets of one kind. Only their digests are kept; all are compared, in constant time each."""

    def __init__(
        self, given: Sequence[SecretStr], path: Path | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`path`: a file with one key a line; empty lines and lines that begin with # do not count.

        Raises ConfigInvalid for a file that cannot be read or holds no key, or one that no client can send.
        """
        self._given = tuple(_digest(secret.get_secret_value().encode()) for secret in given)
        self._path, self._clock = path, clock
        self._from_file: tuple[bytes, ...] = ()
        self._stamp: Stamp | None = None
        self._checked_at = clock()
        self.is_configured = bool(self._given) or path is not None
        if path is not None:
            self._stamp = stamp_file(path)
            self._from_file = _read_keys(path)

    def accepts(self, presented: bytes) -> bool:
        """Whether `presented` is one of the secrets."""
        self._refresh()
        digest = _digest(presented)
        matches = [hmac.compare_digest(digest, known) for known in (*self._given, *self._from_file)]
        return any(matches)

    def _refresh(self) -> None:
        """Read the file again when it changed. One that is empty, damaged or gone lets nobody in."""
        now = self._clock()
        if self._path is None or now - self._checked_at < _RECHECK_SECONDS:
            return
        self._checked_at = now
        stamp = stamp_file(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._from_file = _read_keys(self._path)
        except ConfigInvalid as error:
            self._from_file = ()
            _log.error("no key of the file is accepted until it is mended: %s", error)
        else:
            _log.info("keys read again path=%s count=%d", self._path, len(self._from_file))


class Access:
    """Decides from path and headers alone whether a request goes on."""

    def __init__(self, settings: SecuritySettings, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigInvalid as `KeyRing` does."""
        self._api = KeyRing(settings.api_keys, settings.api_keys_file, clock)
        self._admin = KeyRing(settings.admin_tokens, settings.admin_tokens_file, clock)
        self._open_paths = frozenset(settings.open_paths)

    def refusal(self, scope: Scope) -> ServingError | None:
        """Why the request is refused: AdminDisabled or InvalidApiKey; None when it is not."""
        path: str = scope["path"]
        if path.startswith(ADMIN_PREFIX):
            if not self._admin.is_configured:
                return AdminDisabled(
                    "the admin API is off: set embedding.security.admin_tokens_file to a file of tokens, one a line"
                )
            return _check(self._admin, scope, "an admin token")
        if not self._api.is_configured or path in self._open_paths:
            return None
        return _check(self._api, scope, "an API key")


def warn_if_open(settings: Settings) -> None:
    """Log a warning when others than this machine's users can reach the worker and no key is asked of them."""
    security = settings.security
    if not _is_loopback(settings.host) and not security.api_keys and security.api_keys_file is None:
        _log.warning(
            "everybody who reaches host=%s may use this worker: set embedding.security.api_keys_file", settings.host
        )


def stamp_file(path: Path) -> Stamp | None:
    """What changes when the file at `path` does; None when there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _check(ring: KeyRing, scope: Scope, what: str) -> InvalidApiKey | None:
    presented = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(presented) == 1 and presented[0][: len(_SCHEME)].lower() == _SCHEME:
        if ring.accepts(presented[0][len(_SCHEME) :].strip()):
            return None
        return InvalidApiKey(f"the key sent is not {what} of this worker")
    return InvalidApiKey(f"this path wants {what}: send the header Authorization: Bearer KEY once")


def _digest(secret: bytes) -> bytes:
    """All of one length, so that comparing says nothing about that of the secret."""
    return hashlib.sha256(secret).digest()


def _read_keys(path: Path) -> tuple[bytes, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigInvalid(f"cannot read the key file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigInvalid(f"the key file {path} is not text in UTF-8") from None
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1))
    try:
        keys = [check_secret(line, f"line {number}") for number, line in lines if line and not line.startswith("#")]
    except ValueError as error:
        raise ConfigInvalid(f"the key file {path}: {error}") from None
    if not keys:
        raise ConfigInvalid(f"the key file {path} holds no key: write one a line, or take the setting away")
    return tuple(_digest(key.encode()) for key in keys)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
