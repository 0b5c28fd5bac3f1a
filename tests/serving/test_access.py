"""Who may ask: keys of settings and files, rotation, and what fails closed."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving.access import Access, KeyRing, warn_if_open
from serving.errors import AdminDisabled, ConfigInvalid, InvalidApiKey
from serving.settings import SecuritySettings
from tests.serving.conftest import make_settings

KEY, OTHER, TOKEN = "key-of-a-client", "key-of-another", "token-of-an-admin"
EMBED, ADMIN = "/api/v1/embed", "/api/v1/admin/models"


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def scope(path: str, *values: str) -> dict[str, object]:
    return {"path": path, "headers": [(b"host", b"a"), *((b"authorization", v.encode()) for v in values)]}


def is_let_in(access: Access, path: str, *values: str) -> bool:
    refusal = access.refusal(scope(path, *values))
    assert refusal is None or not any(secret in str(refusal) for secret in (KEY, OTHER, TOKEN))
    return refusal is None


def write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns + 10**9))


def test_without_keys_everybody_may_ask_and_nobody_administer() -> None:
    access = Access(SecuritySettings())
    assert is_let_in(access, EMBED)
    refusal = access.refusal(scope(ADMIN, f"Bearer {TOKEN}"))
    assert isinstance(refusal, AdminDisabled)
    assert "embedding.security.admin_tokens_file" in str(refusal)


def test_several_keys_count_and_only_they() -> None:
    access = Access(SecuritySettings(api_keys=(KEY, OTHER)))  # type: ignore[arg-type]
    assert all(is_let_in(access, EMBED, f"{scheme} {key}") for scheme in ("Bearer", "bearer") for key in (KEY, OTHER))
    for wrong in ((), ("",), (KEY,), ("Bearer",), ("Bearer ",), (f"Bearer {KEY}x",), (f"Basic {KEY}",)):
        assert not is_let_in(access, EMBED, *wrong)
    assert not is_let_in(access, EMBED, f"Bearer {KEY}", f"Bearer {KEY}")  # which of the two is meant?
    assert isinstance(access.refusal(scope(EMBED)), InvalidApiKey)


def test_probes_and_pages_are_open_unless_a_setting_says_otherwise() -> None:
    access = Access(SecuritySettings(api_keys=(KEY,)))  # type: ignore[arg-type]
    assert all(is_let_in(access, path) for path in ("/healthz", "/readyz", "/metrics"))
    assert all(is_let_in(access, path) for path in ("/", "/docs", "/openapi.json"))  # a browser sends no key for a page
    assert not any(is_let_in(access, path) for path in ("/v1/models", "/info", "/healthz/", "/docs/", "/nope"))
    closed = Access(SecuritySettings(api_keys=(KEY,), open_paths=("/docs",)))  # type: ignore[arg-type]
    assert is_let_in(closed, "/docs")
    assert not is_let_in(closed, "/metrics")


def test_api_keys_and_admin_tokens_do_not_stand_in_for_each_other() -> None:
    access = Access(SecuritySettings(api_keys=(KEY,), admin_tokens=(TOKEN,), open_paths=(ADMIN,)))  # type: ignore[arg-type]
    assert is_let_in(access, ADMIN, f"Bearer {TOKEN}")
    assert not is_let_in(access, ADMIN, f"Bearer {KEY}")
    assert not is_let_in(access, ADMIN)
    assert not is_let_in(access, EMBED, f"Bearer {TOKEN}")


def test_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    write(path, f"# of the crawler\n{KEY}\n\n  {OTHER}  \n")
    ring = KeyRing((), path, clock)
    assert ring.accepts(KEY.encode())
    assert ring.accepts(OTHER.encode())
    assert not ring.accepts(b"# of the crawler")
    write(path, f"{OTHER}\nnew-key\n")
    assert ring.accepts(KEY.encode())  # looked at a moment ago
    clock.now += 1
    assert [ring.accepts(key.encode()) for key in (KEY, OTHER, "new-key")] == [False, True, True]


@pytest.mark.parametrize("damage", ["", "# nothing\n", "two words\n", "\x01\n", None])
def test_file_without_keys_lets_nobody_in(tmp_path: Path, damage: str | None, caplog: pytest.LogCaptureFixture) -> None:
    path, clock = tmp_path / "keys", Clock()
    write(path, KEY)
    ring = KeyRing((), path, clock)
    if damage is None:
        path.unlink()
    else:
        write(path, damage)
    for _ in range(3):
        clock.now += 1
        assert not ring.accepts(KEY.encode())
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    write(path, KEY)
    clock.now += 1
    assert ring.accepts(KEY.encode())
    (tmp_path / "broken").write_bytes(b"" if damage is None else damage.encode())
    with pytest.raises(ConfigInvalid, match=str(tmp_path)):
        KeyRing((), tmp_path / "broken")


def test_missing_and_binary_files_are_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"cannot read the key file .*none: No such file"):
        Access(SecuritySettings(api_keys_file=tmp_path / "none"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigInvalid, match="is not text in UTF-8"):
        Access(SecuritySettings(admin_tokens_file=tmp_path / "binary"))


def test_given_keys_count_beside_a_file_that_breaks(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys", Clock()
    write(path, OTHER)
    access = Access(SecuritySettings(api_keys=(KEY,), api_keys_file=path), clock)  # type: ignore[arg-type]
    path.unlink()
    clock.now += 1
    assert is_let_in(access, EMBED, f"Bearer {KEY}")
    assert not is_let_in(access, EMBED, f"Bearer {OTHER}")


@pytest.mark.parametrize(
    ("host", "security", "warnings"),
    [
        ("127.0.0.1", {}, 0),
        ("::1", {}, 0),
        ("localhost", {}, 0),
        ("0.0.0.0", {}, 1),
        ("worker.example", {}, 1),
        ("0.0.0.0", {"api_keys": [KEY]}, 0),
        ("0.0.0.0", {"api_keys_file": "/keys"}, 0),
        ("0.0.0.0", {"admin_tokens": [TOKEN]}, 1),
    ],
)
def test_worker_open_to_the_network_is_warned_of(
    bundle: Path, caplog: pytest.LogCaptureFixture, host: str, security: dict[str, object], warnings: int
) -> None:
    warn_if_open(make_settings(bundle, host=host, security=security))
    assert len(caplog.records) == warnings
    assert warnings == 0 or f"host={host}" in caplog.text
