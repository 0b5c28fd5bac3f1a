from pathlib import Path

import pytest

from serving.config import describe_settings, iterate_keys, load_settings
from serving.errors import ConfigInvalid
from serving.settings import BatchingSettings

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
    assert settings.batching.max_batch_tokens is None
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


def test_gpus_are_a_list_of_different_numbers(tmp_path: Path) -> None:
    assert load_settings(BUNDLE, {"AKIDB_EMBEDDING_MULTI_GPU_DEVICES": "[0, 2]"}).multi_gpu.devices == (0, 2)
    config = write(tmp_path, "[embedding.multi_gpu]\ndevices = [1]")
    assert load_settings([*config, *BUNDLE], {}).multi_gpu.devices == (1,)
    assert load_settings(BUNDLE, {}).multi_gpu.devices == ()
    for text, message in (("[1, 1]", "has a GPU twice"), ("[-1]", "greater than or equal to 0"), ("2", "tuple")):
        with pytest.raises(ConfigInvalid, match=f"AKIDB_EMBEDDING_MULTI_GPU_DEVICES: .*{message}"):
            load_settings(BUNDLE, {"AKIDB_EMBEDDING_MULTI_GPU_DEVICES": text})


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


def test_no_model_is_refused_and_several_are_not() -> None:
    with pytest.raises(ConfigInvalid, match="no model to serve: give --bundle DIR"):
        load_settings([], {})
    settings = load_settings(["--bundle", "/a", "--bundle", "/b"], {})
    assert [source.path for source in settings.models.available] == [Path("/a"), Path("/b")]


def test_traffic_weights_are_a_table_or_json(tmp_path: Path) -> None:
    text = '[embedding.traffic.weights.tiny]\n"int8-1" = 9\n"int8-2" = 1\n'
    expected = {"tiny": {"int8-1": 9.0, "int8-2": 1.0}}
    assert load_settings([*BUNDLE, *write(tmp_path, text)], {}).traffic.weights == expected
    given = '{"tiny": {"int8-1": 9, "int8-2": 1}}'
    assert load_settings([*BUNDLE, "--traffic-weights", given], {}).traffic.weights == expected
    assert load_settings(BUNDLE, {"AKIDB_EMBEDDING_TRAFFIC_WEIGHTS": given}).traffic.weights == expected
    for wrong in ("many", '{"tiny": {"int8-1": -1}}', '{"../x": {}}', '{"tiny": {"int8-1": Infinity}}'):
        with pytest.raises(ConfigInvalid, match=r"^--traffic-weights"):
            load_settings([*BUNDLE, "--traffic-weights", wrong], {})


SECRET = "very-secret-key"
API_KEYS = "AKIDB_EMBEDDING_SECURITY_API_KEYS"


def test_secrets_are_given_by_variable_and_never_shown() -> None:
    environ = {API_KEYS: f"{SECRET},other-secret", "AKIDB_EMBEDDING_SECURITY_ADMIN_TOKENS": SECRET}
    settings = load_settings(BUNDLE, environ)
    assert [key.get_secret_value() for key in settings.security.api_keys] == [SECRET, "other-secret"]
    line = describe_settings(settings)
    assert "embedding.security.api_keys=(2 not shown)" in line
    assert "secret" not in line + repr(settings) + settings.model_dump_json()


@pytest.mark.parametrize("flag", [["--security-api-keys", SECRET], [f"--security-admin-tokens={SECRET}"]])
def test_secret_on_the_command_line_is_refused_and_not_repeated(flag: list[str]) -> None:
    with pytest.raises(ConfigInvalid, match="every user of the machine sees a command line") as raised:
        load_settings([*BUNDLE, *flag], {})
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("value", ["", " , ", f"{SECRET}\x01", f"{SECRET}é"])
def test_secret_that_is_empty_or_cannot_be_sent_is_refused_and_not_repeated(value: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"{API_KEYS}: embedding.security.api_keys: ") as raised:
        load_settings(BUNDLE, {API_KEYS: value})
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("value", [f'"{SECRET} é"', f'["{SECRET} x"]', f'{{ "{SECRET}" = 1 }}', '[""]', "3"])
def test_secret_of_the_wrong_type_in_the_file_is_refused_and_not_repeated(tmp_path: Path, value: str) -> None:
    config = write(tmp_path, f"[embedding.security]\napi_keys = {value}")
    with pytest.raises(ConfigInvalid, match=r"embedding\.security\.api_keys") as raised:
        load_settings([*BUNDLE, *config], {})
    assert SECRET not in str(raised.value)


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


def test_runs_and_queue_are_larger_on_the_cuda_engine_unless_a_size_is_set() -> None:
    assert BatchingSettings().sizes(has_custom_kernels=False) == (64, 8192, 4096, 65_536)
    assert BatchingSettings().sizes(has_custom_kernels=True) == (256, 32_768, 32_768, 524_288)
    own = {"max_batch_size": 7, "max_batch_tokens": 16, "max_queue_size": 1, "max_queue_tokens": 2}
    for on_gpu in (False, True):
        assert BatchingSettings.model_validate(own).sizes(on_gpu) == (7, 16, 1, 2)
