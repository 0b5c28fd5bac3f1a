"""The documents say what is so: file tree, commands, settings, errors, metrics."""

import re
import shlex
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer import Exit
from typer.exceptions import TyperException
from typer.main import get_command

from flows.cli import app
from flows.config import Settings
from serving.config import build_parser
from serving.settings import ModelSource
from tasks.steps import DistillConfig, PruneConfig, TrimConfig
from tasks.variants import Recipe
from tests.reference import PAGE, render_reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def parse(command: Any, arguments: list[str]) -> None:
    """Parse as the command line does, without running anything.

    Raises TyperException, or KeyError for no such command.
    """
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    with suppress(Exit):  # of --help
        command.make_context(command.name, list(arguments))


def test_reference_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_reference(), "run make fix"


def test_every_setting_says_what_it_means() -> None:
    assert "|  |" not in render_reference()


@pytest.mark.parametrize("model", [DistillConfig, PruneConfig, TrimConfig, ModelSource, Recipe])
def test_reference_has_every_key_of_what_a_list_holds(model: type[BaseModel]) -> None:
    keys = model.model_fields.keys() - {"kind"}
    tables = [set(re.findall(r"^\| `(\w+)` ", table, flags=re.MULTILINE)) for table in render_reference().split("\n\n")]
    assert keys in tables


def test_readme_tree_lists_every_module() -> None:
    listed = {}
    for line in blocks("text")[-1].splitlines():
        if match := re.match(r"(\w+(?:/\w+)*)/\s+(.*)", line):
            folder = match[1]
            listed[folder] = set(re.sub(r"\(.*?\)", "", match[2]).split())
    for package in ("flows", "tasks", "serving", "registry"):
        for init in (ROOT / package).rglob("__init__.py"):
            folder = init.parent.relative_to(ROOT).as_posix()
            modules = {path.stem for path in init.parent.glob("*.py")} - {"__init__"}
            assert listed[folder] == modules, folder


def test_readme_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z0-9]+)", README))
    assert named <= targets
    assert {"demo", "test", "e2e", "ui", "check", "fix", "bench", "help"} <= targets


def test_readme_commands_parse() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    lines = [line for block in blocks("sh") for line in block.splitlines() if "bin/thorforge" in line]
    assert lines
    for line in lines:
        call = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line).split(" | ")[0]  # what a variable is set to
        name, *arguments = shlex.split(call)[1:]
        assert name in commands, line
        if name == "serve":
            build_parser().parse_args(arguments)
        else:
            parse(commands[name], arguments)


def test_parse_refuses_what_the_command_line_would() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name, *arguments in (
        ["registry", "pull", "tiny", "bundle"], ["registry", "pul"], ["promote", "3f2a9c01", "--resaon", "x"],
        ["optimize", "--quality"],
    ):  # fmt: skip
        with pytest.raises((TyperException, KeyError)):
            parse(commands[name], arguments)


def test_readme_settings_are_accepted() -> None:
    assert len(blocks("toml")) == 3
    for settings in blocks("toml"):
        assert Settings.model_validate(tomllib.loads(settings))


@pytest.mark.parametrize(
    "page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]), ids=lambda path: path.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
