"""A sample of the traffic on disk, for drift and calibration: JSON lines, rotated, capped, never in a request's way.

Requests put what they sampled into a bounded queue; a thread of its own writes. What does not fit, or cannot be
written, is dropped and counted.
"""

import errno
import hashlib
import logging
import os
import queue
import random
import secrets
import tempfile
import threading
import time
from binascii import b2a_base64
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from serving.errors import ConfigInvalid
from serving.settings import RequestLogSettings

_PATTERN = "requests-*.jsonl"
_QUEUE_TEXTS = 4096
# No model reads further; a longer text is cut in the log, its length is kept.
_MAX_TEXT_CHARS = 10_000
_HASH_BYTES = 16
_STOP_SECONDS = 5.0

# How many texts were `written`, `dropped` because the queue was full, or `failed` to be written.
Count = Callable[[str], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """What the texts of one request have in common."""

    model: str
    model_version: str
    prompt: str | None


@dataclass(slots=True)
class _Entry:
    time: float
    origin: Origin
    chars: int
    text: str | None
    vector: NDArray[np.float32] | None


class TextLog(Protocol):
    """Takes what was answered."""

    def offer(self, origin: Origin, texts: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Sample each text of an answered request; row k of `vectors` [N, D] belongs to text k."""
        ...


class Sampler:
    """Chooses texts by chance."""

    def __init__(self, ratio: float, sample: Callable[[], float] = random.random) -> None:
        self._ratio, self._sample = ratio, sample

    def pick(self, count: int) -> list[int]:
        """The places, of `count`, of the texts chosen."""
        return [place for place in range(count) if self._sample() < self._ratio]


class RequestLog:
    """Samples answered texts and writes them; `offer` is called on the event loop and never waits."""

    def __init__(
        self,
        settings: RequestLogSettings,
        folder: Path,
        count: Count = lambda _: None,
        sample: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings, self._count, self._clock = settings, count, clock
        self._sampler = Sampler(settings.sample_ratio, sample)
        self._queue: queue.Queue[_Entry | None] = queue.Queue(_QUEUE_TEXTS)
        self._writer = _Writer(folder, settings)
        self._key = secrets.token_bytes(_HASH_BYTES)  # a hash of a short text without a key is easily guessed
        self._is_failing = False
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)

    def start(self) -> None:
        """Start the thread that writes."""
        self._thread.start()

    def close(self) -> None:
        """Write what is queued and end the thread; a disk that hangs is left to the end of the process."""
        with suppress(queue.Full):
            self._queue.put(None, timeout=_STOP_SECONDS)
        self._thread.join(_STOP_SECONDS)

    def offer(self, origin: Origin, texts: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Sample each text of an answered request; row k of `vectors` [N, D] belongs to text k."""
        rows = self._sampler.pick(len(texts))
        if rows:
            self.keep(origin, [texts[row] for row in rows], vectors[rows])

    def keep(self, origin: Origin, texts: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Write these texts, which were sampled."""
        keeps_text = self._settings.text != "none"
        for row, text in enumerate(texts):
            vector = vectors[row].copy() if self._settings.embedding else None  # a view would keep all rows alive
            kept = text[:_MAX_TEXT_CHARS] if keeps_text else None
            try:
                self._queue.put_nowait(_Entry(self._clock(), origin, len(text), kept, vector))
            except queue.Full:
                self._count("dropped")

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            try:
                self._writer.write(self._render(entry))
            except OSError as error:
                self._count("failed")
                if not self._is_failing:
                    _log.error("request log cannot be written reason=%r", error.strerror)
                self._is_failing = True
            else:
                self._count("written")
                self._is_failing = False
        self._writer.close()

    def _render(self, entry: _Entry) -> bytes:
        record: dict[str, Any] = {
            "time": datetime.fromtimestamp(entry.time, UTC).isoformat(timespec="milliseconds"),
            "model": entry.origin.model,
            "model_version": entry.origin.model_version,
            "prompt": entry.origin.prompt,
            "chars": entry.chars,
        }
        if entry.text is not None and self._settings.text == "full":
            record["text"] = entry.text
        elif entry.text is not None:
            keyed = hashlib.blake2b(entry.text.encode(), key=self._key, digest_size=_HASH_BYTES)
            record["text_hash"] = keyed.hexdigest()
        if entry.vector is not None:
            record["embedding"] = b2a_base64(entry.vector.astype("<f4", copy=False).data, newline=False).decode()
        return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def open_request_log(settings: RequestLogSettings, count: Count) -> RequestLog | None:
    """The started log; None when no folder is set. Raises ConfigInvalid when the folder cannot be written to."""
    folder = settings.folder
    if folder is None:
        return None
    if settings.max_total_bytes < settings.max_file_bytes:
        raise ConfigInvalid(
            f"embedding.request_log.max_total_bytes = {settings.max_total_bytes} is less than "
            f"embedding.request_log.max_file_bytes = {settings.max_file_bytes}"
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigInvalid(f"embedding.request_log.folder: cannot write to {folder}: {error.strerror}") from None
    log = RequestLog(settings, folder, count)
    log.start()
    return log


class _Writer:
    """Files of at most `max_file_bytes`; before a new one is begun, the oldest go to make room for it."""

    def __init__(self, folder: Path, settings: RequestLogSettings) -> None:
        self._folder, self._settings = folder, settings
        self._file: int | None = None
        self._size = 0

    def write(self, line: bytes) -> None:
        """Append a line. Raises OSError; no part of the line stays behind."""
        if self._file is not None and self._size + len(line) > self._settings.max_file_bytes:
            self.close()
        if self._file is None:
            self._file = self._open(len(line))
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            self.close()
            raise
        self._size += len(line)

    def close(self) -> None:
        """Close the file that is open, if any."""
        if self._file is not None:
            os.close(self._file)
        self._file, self._size = None, 0

    def _open(self, needed_bytes: int) -> int:
        room = self._settings.max_total_bytes - max(self._settings.max_file_bytes, needed_bytes)
        files = sorted(self._folder.glob(_PATTERN))  # their names are times
        sizes = [path.stat().st_size for path in files]
        total = sum(sizes)
        for path, size in zip(files, sizes, strict=True):
            if total <= room:
                break
            path.unlink(missing_ok=True)
            total -= size
        name = datetime.now(UTC).strftime(_PATTERN.replace("*", "%Y%m%dT%H%M%S.%fZ"))
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        return os.open(self._folder / name, flags, 0o600)
