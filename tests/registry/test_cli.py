"""The command line: results on stdout, one `error:` line on stderr, completion from what is in the store."""

import getpass
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from registry.channel import CHANNELS, read_channel
from registry.cli import app
from registry.client import push
from registry.manifest import digest_of, read_manifest, verify_bundle
from registry.moves import move_channel
from registry.store import FolderStore
from tests.registry.damage import edit_manifest, flip_byte

REPOSITORY = Path(__file__).parents[2]
COMMANDS = (["push"], ["pull"], ["list"], ["show"], ["verify"], ["channel", "get"], ["channel", "set"])


@pytest.fixture(autouse=True)
def environment(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THORFORGE_REGISTRY", str(store))


@pytest.fixture
def digests(store: FolderStore, bundles: list[Path]) -> list[str]:
    return [push(bundle, store) for bundle in bundles]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.rstrip("\n")


def fail(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_push_and_pull_print_the_digest_alone(bundle: Path, tmp_path: Path) -> None:
    digest = digest_of(bundle)
    assert succeed("push", bundle) == digest
    assert succeed("push", bundle) == digest
    assert succeed("pull", "tiny", digest[:8], tmp_path / "target") == digest
    assert verify_bundle(tmp_path / "target", digest)


def test_registry_option_wins_over_the_environment(bundle: Path, store: FolderStore, tmp_path: Path) -> None:
    succeed("push", bundle, "--registry", tmp_path / "elsewhere")
    assert FolderStore(tmp_path / "elsewhere").list_models() == ["tiny"]
    assert store.list_models() == []


def test_registry_defaults_to_the_working_folder(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THORFORGE_HOME", raising=False)
    monkeypatch.delenv("THORFORGE_REGISTRY")
    monkeypatch.chdir(tmp_path)
    succeed("push", bundle)
    assert FolderStore(tmp_path / ".thorforge" / "registry").list_models() == ["tiny"]


def test_list_compares_bundles(digests: list[str], store: FolderStore) -> None:
    move_channel(store, "tiny", "production", digests[0], None, moved_by="ann")
    head, *rows = succeed("list").splitlines()
    assert head.split("  ")[0] == "model"
    for name in ("variant", "digest", "precision", "cosine", "p50 ms", "texts/s", "compatibility", "created"):
        assert name in head
    cells = {row.split()[2]: row.split() for row in rows}
    assert set(cells) == {digest[:12] for digest in digests}
    assert cells[digests[0][:12]][:7] == ["tiny", "fp32-onnx", digests[0][:12], "fp32", "1.0000", "1.00", "1"]
    assert cells[digests[0][:12]][7:] == ["drop-in", "2026-01-01", "00:00", "production"]
    assert "production" not in cells[digests[1][:12]]


def test_list_takes_a_model_and_prints_json(digests: list[str]) -> None:
    documents = json.loads(succeed("list", "tiny", "--json"))
    assert sorted(document["digest"] for document in documents) == sorted(digests)
    assert documents[0]["manifest"]["model_name"] == "tiny"
    assert json.loads(succeed("list", "nano", "--json")) == []


def test_list_of_nothing_says_where_it_looked(store: FolderStore) -> None:
    result = run("list", "nano")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"no bundles of nano in {store}\n"


def test_list_warns_of_a_bundle_it_cannot_read(digests: list[str], store: FolderStore) -> None:
    flip_byte(store.root / "models" / "tiny" / digests[0] / "manifest.json")
    result = run("list")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: manifest.json of tiny")
    assert f"unreadable  {digests[0][:12]}" in result.stdout
    assert len(result.stdout.splitlines()) == 4
    assert [d["manifest"] for d in json.loads(run("list", "--json").stdout)].count(None) == 1


def test_list_prints_markup_as_it_is(bundle: Path, store: FolderStore) -> None:
    edit_manifest(bundle, lambda d: d.update(model_id="[red]hello[/nothing] :smile:"))
    digest = push(bundle, store)
    assert "[red]hello[/nothing] :smile:" in succeed("show", "tiny", digest)


def test_show_prints_the_whole_manifest(digests: list[str], bundles: list[Path], store: FolderStore) -> None:
    move_channel(store, "tiny", "canary", digests[0], None, moved_by="ann")
    lines = {line.split()[0]: line.split()[1:] for line in succeed("show", "tiny", "canary").splitlines()}
    assert lines["digest"] == [digests[0]]
    assert lines["channels"] == ["canary"]
    assert lines["validation.cosine_similarity_vs_fp32.mean"] == ["1.0"]
    assert lines["engines.0.runtime"] == ["onnxruntime"]
    assert lines["quantization"] == ["-"]
    document = json.loads(succeed("show", "tiny", digests[0][:8], "--json"))
    assert document["digest"] == digests[0]
    assert document["channels"] == ["canary"]
    assert document["manifest"] == read_manifest(bundles[0]).model_dump(mode="json")


def test_verify_checks_folders_and_stored_bundles(digests: list[str], bundle: Path, store: FolderStore) -> None:
    assert succeed("verify", bundle) == digests[0]
    assert succeed("verify", f"tiny@{digests[0][:8]}") == digests[0]
    flip_byte(bundle / "model.onnx")
    assert "model.onnx" in fail("verify", bundle)
    flip_byte(store.root / "models" / "tiny" / digests[0] / "golden.npz")
    assert "golden.npz" in fail("verify", f"tiny@{digests[0][:8]}")


def test_verify_takes_a_folder_with_an_at_sign(bundle: Path) -> None:
    folder = bundle.rename(bundle.with_name("tiny@production"))
    assert succeed("verify", folder) == digest_of(folder)


def test_channel_set_and_get(digests: list[str], store: FolderStore) -> None:
    first, second = digests[:2]
    assert succeed("channel", "set", "tiny", "production", first[:10], "--by", "ann") == first
    assert succeed("channel", "set", "tiny", "production", second, "--expect", first[:8]) == second
    assert succeed("channel", "get", "tiny", "production") == second
    record = read_channel(store, "tiny", "production")
    assert (record.sequence, record.previous, record.moved_by) == (2, first, getpass.getuser())
    assert json.loads(succeed("channel", "get", "tiny", "production", "--json")) == record.model_dump(mode="json")
    assert json.loads(succeed("channel", "get", "tiny", "--json")) == [record.model_dump(mode="json")]
    head, row = succeed("channel", "get", "tiny").splitlines()
    assert head.startswith("channel")
    assert row.split()[:4] == ["production", second[:12], first[:12], "2"]


def test_channel_set_says_on_stderr_where_the_channel_was(digests: list[str]) -> None:
    result = run("channel", "set", "tiny", "canary", digests[0])
    assert result.stderr == "canary of tiny was never set (move 1)\n"


@pytest.mark.parametrize("expect", ["none", "0" * 8, "0" * 64])
def test_channel_set_refuses_what_was_not_expected(digests: list[str], expect: str) -> None:
    succeed("channel", "set", "tiny", "production", digests[0])
    assert f"points at {digests[0]}" in fail("channel", "set", "tiny", "production", digests[1], "--expect", expect)
    assert succeed("channel", "get", "tiny", "production") == digests[0]


def test_channel_set_may_expect_that_it_was_never_set(digests: list[str]) -> None:
    assert succeed("channel", "set", "tiny", "production", digests[0], "--expect", "none") == digests[0]


def test_channel_set_expects_no_less_than_eight_digits(digests: list[str]) -> None:
    succeed("channel", "set", "tiny", "production", digests[0])
    assert "points at" in fail("channel", "set", "tiny", "production", digests[1], "--expect", digests[0][:7])


def test_channel_get_of_a_model_without_channels(digests: list[str]) -> None:
    result = run("channel", "get", "tiny")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no channel of tiny was ever set" in result.stderr


def test_refusals_are_one_line_and_status_one(digests: list[str], bundles: list[Path], tmp_path: Path) -> None:
    assert "holds no manifest.json" in fail("push", tmp_path)
    assert "no bundle 00000000 of tiny" in fail("pull", "tiny", "0" * 8, tmp_path / "target")
    target = shutil.copytree(bundles[1], tmp_path / "target")
    assert "is not bundle" in fail("pull", "tiny", digests[0], target)
    assert "use production, canary" in fail("show", "tiny", "staging")
    assert "use one of production, canary" in fail("channel", "set", "tiny", "staging", digests[0])
    assert "was never set" in fail("channel", "get", "tiny", "production")
    assert "is not a model name" in fail("list", "../tiny")
    assert "moved_by" in fail("channel", "set", "tiny", "canary", digests[0], "--by", "")


def test_refusals_of_the_system_are_one_line_too(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fail("push", bundle, "--registry", tmp_path / "file")
    assert str(tmp_path / "file") in fail("list", "--registry", tmp_path / "file")


def test_line_breaks_in_a_message_stay_inside_the_line(bundle: Path) -> None:
    edit_manifest(bundle, lambda d: d.update({"first\nsecond": 1}))
    assert "first second: unknown key" in fail("push", bundle)


def test_user_without_a_name_must_give_one(digests: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert "give --by NAME" in fail("channel", "set", "tiny", "canary", digests[0])
    assert succeed("channel", "set", "tiny", "canary", digests[0], "--by", "ann") == digests[0]


def test_errors_stay_one_line_below_another_command(bundle: Path) -> None:
    parent = typer.Typer()
    parent.add_typer(app, name="registry")
    result = CliRunner().invoke(parent, ["registry", "channel", "get", "tiny", "production"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: channel production of tiny was never set")
    result = CliRunner().invoke(parent, ["registry", "push", str(bundle)])
    assert result.stdout.strip() == digest_of(bundle)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches_with_an_example(command: list[str]) -> None:
    text = " ".join(succeed(*command, "--help").split())
    assert f"thorforge registry {' '.join(command)} " in text
    assert "THORFORGE_REGISTRY" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("show ", ["tiny"]),
        ("show t", ["tiny"]),
        ("show x", []),
        ("channel set tiny ", list(CHANNELS)),
        ("channel get tiny c", ["canary"]),
        ("pull tiny p", ["production"]),
        ("show ../tiny p", ["production"]),
        ("list --registry /nowhere ", []),
    ],
)
def test_completion_offers_what_is_there(digests: list[str], words: str, expected: list[str]) -> None:
    assert complete(words) == expected


def test_completion_offers_digests(digests: list[str]) -> None:
    assert complete("show tiny ") == [*CHANNELS, *(digest[:12] for digest in sorted(digests))]
    assert complete(f"show tiny {digests[1][:4]}") == [digests[1][:12]]


def complete(words: str) -> list[str]:
    line = f"registry {words}"
    environment = {"_REGISTRY_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    return CliRunner().invoke(app, [], env=environment, prog_name="registry").stdout.split()


def test_closed_pipe_ends_quietly(digests: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "registry", "list", "--json"]
    result = subprocess.run(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert result.stderr == b""


def test_module_runs_and_shows_progress_on_a_terminal_alone(bundle: Path, tmp_path: Path) -> None:
    master, slave = os.openpty()
    command = [sys.executable, "-m", "registry", "push", str(bundle), "--registry", str(tmp_path / "new")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    on_terminal = subprocess.run(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=slave, check=True, text=True
    )
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    in_pipe = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True, text=True)
    assert on_terminal.stdout == in_pipe.stdout == digest_of(bundle) + "\n"
    assert "pushing" in shown
    assert in_pipe.stderr == ""
