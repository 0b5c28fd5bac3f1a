"""Settings of whoever uses a registry: `[registry]` of `thorforge.toml` in the working folder; a variable wins.

They are read where they are needed, so that no caller can leave a limit or a key out.
"""

import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.errors import SettingsInvalid
from registry.manifest import describe_validation

__all__ = ["CONFIG_NAME", "RegistrySettings", "configured_place", "load_settings", "variable_of"]

CONFIG_NAME = "thorforge.toml"


class RegistrySettings(BaseModel):
    """What bundles have to be like, who signs them, and how much of the disk pulled ones may take."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bundle_bytes: int = Field(
        default=64 << 30, ge=1, description="largest bundle that is pushed, pulled or promoted, all its files together"
    )
    cache_bytes: int = Field(
        default=20 << 30,
        ge=0,
        description="how much pulled bundles may take in one folder before those that nobody uses are evicted, "
        "the one used longest ago first",
    )
    public_key: Path | None = Field(
        default=None,
        description="PEM file of Ed25519 keys, one of which must have signed what is pushed, pulled or promoted; "
        "None: nothing need be signed",
    )
    signing_key: Path | None = Field(
        default=None, description="PEM file of the private key that signs what is pushed; None: it stays as it is"
    )


def load_settings() -> RegistrySettings:
    """The settings that hold here. Raises SettingsInvalid, which names the key."""
    table = {**_read_section("registry")}
    table |= {name: value for name in RegistrySettings.model_fields if (value := os.environ.get(variable_of(name)))}
    try:
        return RegistrySettings.model_validate(table)
    except ValidationError as error:
        raise SettingsInvalid(f"[registry] of {CONFIG_NAME}, or its variables: {describe_validation(error)}") from None


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return f"THORFORGE_{name.upper()}"


def configured_place() -> str | None:
    """`optimize.registry`: where the flows' registry is."""
    place = _read_section("optimize").get("registry")
    return None if place is None else str(place)


def _read_section(name: str) -> dict[str, Any]:
    try:
        table = tomllib.loads(Path(CONFIG_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsInvalid(f"{CONFIG_NAME} cannot be read as TOML: {error}") from None
    section = table.get(name, {})
    if not isinstance(section, dict):
        raise SettingsInvalid(f"{name} in {CONFIG_NAME} is no section")
    return section
