"""HTTPS: the certificate, read again when its files change, and handshakes, which count as connections."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from serving.access import Stamp, stamp_file
from serving.errors import ConfigInvalid
from serving.settings import LimitsSettings, TlsSettings

# Files are looked at no more often than this.
_RECHECK_SECONDS = 1.0
# After a connection could not be accepted.
_RETRY_SECONDS = 1.0

# A handshake in memory takes two rounds of TLS 1.3, three of TLS 1.2.
_MAX_ROUNDS = 8

_log = logging.getLogger(__name__)


def open_certificate(
    settings: TlsSettings, on_reload: Callable[[str], None], clock: Callable[[], float]
) -> "Certificate | None":
    """The configured certificate; None when there is none.

    Raises ConfigInvalid, which names the setting and the file at fault.
    """
    certificate, key = settings.certificate, settings.key
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        given, missing = ("key", "certificate") if certificate is None else ("certificate", "key")
        raise ConfigInvalid(f"embedding.tls.{given} needs embedding.tls.{missing} beside it")
    return Certificate(certificate, key, on_reload, clock)


class Certificate:
    """A certificate and its key. Handshakes that begin use `context`; connections keep what they began with."""

    def __init__(
        self, certificate: Path, key: Path, on_reload: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        """`on_reload` hears what became of a new pair: loaded or refused. Raises ConfigInvalid."""
        self._paths, self._on_reload, self._clock = (certificate, key), on_reload, clock
        self._handled = self._seen = self._stamp()
        self._checked_at = clock()
        self.context = _load(certificate, key)

    def refresh(self) -> None:
        """Read the files again when they changed and have stood still from one look to the next.

        So a pair is not read while one file is new and the other old. A pair that cannot be used is refused, and
        not tried again until it changes.
        """
        now = self._clock()
        if now - self._checked_at < _RECHECK_SECONDS:
            return
        self._checked_at = now
        stamp = self._stamp()
        has_settled, self._seen = stamp == self._seen, stamp
        if stamp == self._handled or not has_settled:
            return
        self._handled = stamp
        certificate, key = self._paths
        try:
            context = _load(certificate, key)
            _rehearse(context, certificate)
        except ConfigInvalid as error:
            _log.error("new certificate refused, the old one stays: %s", error)
            self._on_reload("refused")
            return
        self.context = context
        _log.info("certificate read again path=%s", certificate)
        self._on_reload("loaded")

    def _stamp(self) -> tuple[Stamp | None, ...]:
        return tuple(map(stamp_file, self._paths))


class TlsListener:
    """Accepts connections and shakes hands: unlike in a server of the loop, each counts from its start.

    One that finds no room is closed before the handshake, which is what costs: it gets no answer.
    """

    def __init__(
        self,
        listener: socket.socket,
        certificate: Certificate,
        connect: Callable[[], Any],
        count_connections: Callable[[], int],
        limits: LimitsSettings,
    ) -> None:
        """`connect` makes the protocol of a connection, `count_connections` says how many there are of those."""
        self._listener, self._certificate, self._connect = listener, certificate, connect
        self._count_connections, self._limits = count_connections, limits
        self._loop = asyncio.get_running_loop()
        self._handshakes: dict[asyncio.Task[None], Any] = {}
        self._is_closed = False
        self._listen()

    @property
    def num_handshakes(self) -> int:
        """Handshakes that are under way."""
        return sum(connection.transport is None for connection in list(self._handshakes.values()))

    def close(self) -> None:
        """Accept no more, so that a new client finds the door closed; drop those that have not shaken hands yet."""
        self._is_closed = True
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for task in self._handshakes:
            task.cancel()

    async def wait_closed(self) -> None:
        """Return when that is done."""
        await asyncio.gather(*self._handshakes, return_exceptions=True)

    def _listen(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        """Take one client; the loop calls again while others wait."""
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # the client is gone already
        except OSError as error:  # no file descriptors: trying again at once would keep the loop busy
            _log.error("a connection is not accepted reason=%s", error.strerror)
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_RETRY_SECONDS, self._listen)
            return
        if self.num_handshakes + self._count_connections() >= self._limits.max_connections:
            client.close()
            return
        client.setblocking(False)
        connection = self._connect()
        task = self._loop.create_task(self._shake_hands(client, connection))
        self._handshakes[task] = connection
        task.add_done_callback(partial(self._end, client))

    def _end(self, client: socket.socket, task: "asyncio.Task[None]") -> None:
        del self._handshakes[task]
        if task.cancelled():  # perhaps before it began
            client.close()

    async def _shake_hands(self, client: socket.socket, connection: Any) -> None:
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                lambda: connection,
                client,
                ssl=self._certificate.context,
                ssl_handshake_timeout=self._limits.header_timeout_seconds,
            )
        except OSError as error:  # no TLS, no version in common, too slow or gone
            _log.debug("handshake failed reason=%s", type(error).__name__)


def _load(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or later. Raises ConfigInvalid."""
    for name, path in (("certificate", certificate), ("key", key)):
        try:
            content = path.read_text(encoding="ascii")
        except OSError as error:
            raise ConfigInvalid(f"embedding.tls.{name}: cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            content = ""
        if "-----BEGIN " not in content:
            raise ConfigInvalid(f"embedding.tls.{name}: {path} is no PEM file")
        if "ENCRYPTED" in content:
            raise ConfigInvalid(f"embedding.tls.{name}: {path} has a passphrase: nobody is there to type it")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl's own, or a file that went meanwhile
        reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigInvalid(f"embedding.tls: {certificate} and {key} are no pair: {reason}") from None
    return context


def _rehearse(server: ssl.SSLContext, certificate: Path) -> None:
    """Shake hands in memory with a client that trusts this certificate alone: it finds one that has expired.

    Raises ConfigInvalid.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # its issuer need not be known
    try:
        client.load_verify_locations(certificate)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = (
            client.wrap_bio(to_client, to_server, server_hostname="worker"),
            server.wrap_bio(to_server, to_client, server_side=True),
        )
        for _ in range(_MAX_ROUNDS):
            are_done = [_step(end) for end in ends]
            if all(are_done):
                return
    except ssl.SSLCertVerificationError as error:
        raise ConfigInvalid(f"embedding.tls.certificate: {certificate}: {error.verify_message}") from None
    except OSError as error:
        reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
        raise ConfigInvalid(f"embedding.tls: no handshake with {certificate}: {reason}") from None
    raise ConfigInvalid(f"embedding.tls: a handshake with {certificate} does not end")


def _step(end: ssl.SSLObject) -> bool:
    """Whether this end of the handshake is done."""
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True
