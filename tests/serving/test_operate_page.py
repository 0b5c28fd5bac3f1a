"""docs/operate.md says what is so: its settings are accepted, its keys, metrics and fields exist."""

import re
import tomllib
from pathlib import Path

import pytest

from serving.config import iterate_keys
from serving.metrics import Metrics
from serving.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "operate.md").read_text(encoding="utf-8")
KEYS = {key.name for key in iterate_keys()}


def test_settings_of_the_operate_page_are_accepted() -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    settings, *_ = [Settings.model_validate(tomllib.loads(block)["embedding"]) for block in blocks]
    assert settings.tracing.endpoint is not None
    assert settings.request_log.folder == Path("/var/lib/worker/log")


def test_keys_named_on_the_operate_page_exist() -> None:
    named = set(re.findall(r"`(embedding\.[a-z_.]+)`", PAGE))
    assert named <= KEYS
    limits = {key for key in KEYS if key.startswith("embedding.limits.")}
    assert limits <= named, "every limit is explained"


@pytest.mark.parametrize("name", re.findall(r"`(\w+)` = |`(\w+_bytes|\w+_ratio|\w+_seconds)`", PAGE))
def test_short_names_of_keys_exist(name: tuple[str, str]) -> None:
    short = name[0] or name[1]
    assert any(key.endswith(f".{short}") for key in KEYS) or short.startswith(("akidb_", "nvidia_gpu_")), short


def test_metrics_named_on_the_operate_page_exist() -> None:
    families = {family.name for family in Metrics().registry.collect()}
    for name in re.findall(r"`(akidb_\w+)`", PAGE):
        assert name.removesuffix("_total") in families, name
