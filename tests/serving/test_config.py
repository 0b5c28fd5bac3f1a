from pathlib import Path

import pytest

from serving.config import describe_settings, iterate_keys, load_settings
from serving.errors import ConfigInvalid

BUNDLE = ["--bundle", "/bundle"]


def write(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


FULL = """
[embedding]
port = 8001
[embedding.batching]
max_batch_size = 16
[embedding.models]
default = "tiny"
[[embedding.models.available]]
path = "/bundle"
name = "tiny"
engine = "openvino"
num_threads = 2
"""


def test_defaults_serve_a_bundle() -> None:
    settings = load_settings(BUNDLE, {})
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.models.available[0].path == Path("/bundle")


def test_file_sets_every_section(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, FULL), {})
    assert settings.port == 8001
    assert settings.batching.max_batch_size == 16
    assert settings.models.available[0].engine == "openvino"
    assert settings.models.available[0].num_threads == 2


def test_flag_beats_variable_beats_file_beats_default(tmp_path: Path) -> None:
    config = write(tmp_path, FULL)
    environ = {"AKIDB_EMBEDDING_PORT": "8002", "AKIDB_EMBEDDING_BATCHING_MAX_BATCH_SIZE": "17", "HOME": "/"}
    settings = load_settings([*config, "--port", "8003"], environ)
    assert settings.port == 8003
    assert settings.batching.max_batch_size == 17
    assert settings.batching.max_batch_tokens == 8192
    assert settings.models.default == "tiny"
    assert load_settings(config, environ).port == 8002


def test_bundle_flag_replaces_the_file_s_models(tmp_path: Path) -> None:
    settings = load_settings([*write(tmp_path, FULL), "--bundle", "/other"], {})
    assert [source.path for source in settings.models.available] == [Path("/other")]


def test_variable_of_a_list_is_json() -> None:
    environ = {"AKIDB_EMBEDDING_MODELS_AVAILABLE": '[{"path": "/bundle", "engine": "onnxruntime"}]'}
    assert load_settings([], environ).models.available[0].engine == "onnxruntime"
    with pytest.raises(ConfigInvalid, match="AKIDB_EMBEDDING_MODELS_AVAILABLE is not JSON"):
        load_settings([], {"AKIDB_EMBEDDING_MODELS_AVAILABLE": "/bundle"})


def test_every_key_has_a_flag_a_variable_and_a_help_text() -> None:
    keys = list(iterate_keys())
    assert all(key.description for key in keys)
    by_name = {key.name: key for key in keys}
    key = by_name["embedding.batching.max_wait_time_ms"]
    assert (key.flag, key.variable) == ("--batching-max-wait-time-ms", "AKIDB_EMBEDDING_BATCHING_MAX_WAIT_TIME_MS")
    assert len({key.variable for key in keys}) == len({key.flag for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[embedding]\nprot = 1", r"config\.toml: unknown key embedding\.prot: did you mean embedding\.port\?"),
        ("[embedding.batching]\nmax_size = 1", r"unknown key embedding\.batching\.max_size"),
        ("[embeding]", r"unknown key embeding: did you mean embedding\?"),
        (
            '[[embedding.models.available]]\npath = "/b"\nengin = "auto"',
            r"unknown key embedding\.models\.available\[0\]\.engin: did you mean .*\.engine\?",
        ),
        ("[embedding]\nzzz = 1", "unknown key embedding.zzz: known: host, port"),
        ("[embedding]\nbatching = 3", "embedding.batching is not a table"),
        ("embedding = 3", "embedding is not a table"),
        ("[embedding", "is not TOML"),
        ("[embedding]\nport = 99999", r"config\.toml: embedding\.port = 99999: .*less than or equal to 65535"),
        ('[embedding]\nport = "x"', r"embedding\.port = 'x'"),
        ("[embedding.batching]\nmax_wait_time_ms = 11", "embedding.batching.max_wait_time_ms = 11"),
        ("[embedding]\nrequest_timeout_seconds = nan", "request_timeout_seconds"),
        ("[embedding]\ndrain_grace_seconds = 31", "drain_grace_seconds = 31.0 is more than .*drain_seconds = 30"),
        ('[embedding.models]\ndefault = "../x"', "embedding.models.default"),
        ("[embedding.models]\navailable = 3", "embedding.models.available = 3"),
    ],
)
def test_bad_file_is_refused_with_the_key_s_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        load_settings([*write(tmp_path, text), *([] if "models" in text else BUNDLE)], {})


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"cannot read .*none\.toml"):
        load_settings(["--config", str(tmp_path / "none.toml")], {})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"AKIDB_EMBEDDING_PROT": "1"}, "unknown key AKIDB_EMBEDDING_PROT: did you mean AKIDB_EMBEDDING_PORT"),
        ({"AKIDB_EMBEDDING_PORT": "many"}, "AKIDB_EMBEDDING_PORT: embedding.port = 'many'"),
        ({"AKIDB_EMBEDDING_LOG_LEVEL": "loud"}, "AKIDB_EMBEDDING_LOG_LEVEL: embedding.log_level = 'loud'"),
    ],
)
def test_bad_variable_is_refused_with_its_name(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        load_settings(BUNDLE, environ)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "many"], "--port: embedding.port = 'many'"),
        (["--prot", "1"], "unrecognized arguments: --prot 1"),
        (["--port"], "expected one argument"),
    ],
)
def test_bad_flag_is_refused_with_its_name(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        load_settings([*BUNDLE, *argv], {})


def test_no_model_and_several_models_are_refused() -> None:
    with pytest.raises(ConfigInvalid, match="no model to serve: give --bundle DIR"):
        load_settings([], {})
    with pytest.raises(ConfigInvalid, match="has 2 models: this worker serves one"):
        load_settings([], {"AKIDB_EMBEDDING_MODELS_AVAILABLE": '[{"path": "/a"}, {"path": "/b"}]'})


def test_description_names_every_setting_on_one_line() -> None:
    line = describe_settings(load_settings([*BUNDLE, "--port", "1"], {}))
    assert "\n" not in line
    assert "embedding.port=1 " in line
    assert 'embedding.models.available=[{"path": "/bundle"}]' in line
    assert all(f"{key.name}=" in line for key in iterate_keys())


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        load_settings(["--help"], {})
    assert raised.value.code == 0
    text = capsys.readouterr().out
    assert all(key.flag in text for key in iterate_keys() if key.path != ("models", "available"))
