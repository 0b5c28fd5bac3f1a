"""What the style guide promises of the code as a whole, checked on its syntax trees."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "tasks", "serving", "registry", "benchmarks")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 40
# One module owns each vendor's SDK; a path ending in "/" owns it for the folder.
OWNERS = {
    "mlflow": ("tasks/tracking.py",),
    "boto3": ("registry/store.py",),
    "evidently": ("tasks/drift.py",),
    "tensorrt": ("tasks/build.py", "serving/engines/tensorrt.py"),
}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(module: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports, at the top or inside functions."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_contract_the_checks_see_the_code() -> None:
    assert {name_of(path).partition("/")[0] for path in sources(*PACKAGES)} >= set(PACKAGES) - {"benchmarks"}
    assert len(sources(*PACKAGES)) > 40


@pytest.mark.parametrize("path", sources(*PACKAGES, "tests"), ids=name_of)
def test_contract_file_has_one_subject_and_at_most_400_lines(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    if not name_of(path).startswith("tests/"):
        assert ast.get_docstring(ast.parse(text)), "the first line says what the file is for"


@pytest.mark.parametrize(
    "path",
    [
        path
        for folder in ("serving", "tests")
        for ending in ("cu", "cuh", "c", "h", "cpp")
        for path in sorted((ROOT / folder).rglob(f"*.{ending}"))
    ],
    ids=name_of,
)
def test_contract_other_code_has_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_contract_functions_have_at_most_40_lines(path: Path) -> None:
    functions = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno is not None}
    assert {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("vendor", OWNERS)
def test_contract_one_module_owns_each_vendor(vendor: str) -> None:
    users = {
        name_of(path)
        for path in sources(*PACKAGES)
        if any(name.partition(".")[0] == vendor for name in imported(tree(path)))
    }
    assert users <= set(OWNERS[vendor])


def test_contract_nothing_is_ever_unpickled() -> None:
    banned = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    users = {name_of(p) for p in sources(*PACKAGES) for name in imported(tree(p)) if name.partition(".")[0] in banned}
    assert users == set()
    for path in sources(*PACKAGES):
        for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) in ("np.load", "numpy.load"):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert options.get("allow_pickle") == "False", f"{name_of(path)}:{call.lineno}"


def test_contract_nothing_of_ours_is_mocked() -> None:
    users = {
        name_of(path)
        for path in sources("tests")
        if any(re.match(r"(unittest\.mock|mock|pytest_mock)(\.|$)", name) for name in imported(tree(path)))
    }
    assert users == set()


@pytest.mark.parametrize("package", ["tasks", "registry", "serving"])
def test_contract_every_error_is_in_its_modules_tree(package: str) -> None:
    module = import_module(f"{package}.errors")
    errors = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Exception)]
    own = [error for error in errors if error.__module__ == module.__name__]
    listed = re.findall(r"(?:├──|└──)\s+(\w+)", module.__doc__ or "")
    base = next(error for error in own if error.__base__ is Exception and error.__subclasses__())
    assert sorted(listed) == sorted(error.__name__ for error in own if issubclass(error, base) and error is not base)
    assert re.search(rf"^{base.__name__}$", module.__doc__ or "", re.MULTILINE)
    assert all(error.__doc__ for error in own)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_contract_lock_pins_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [
        *project["dependencies"],
        *(line for extra in ("serve", "openvino", "forge", "dev") for line in extras[extra]),
    ]
    names = {normal(re.split(r"[\s\[<>=!~;]", line)[0]) for line in asked} - {"thorforge"}
    lines = [line for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if line.strip()]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._!-]+", line)] == []
    pinned = {normal(line.partition("==")[0]) for line in lines}
    assert len(pinned) == len(lines)
    assert names - pinned == set()


def test_no_module_of_flows_hides_one_of_the_standard_library() -> None:
    # Prefect's workers load a deployment's flow as a file, with its folder before everything else on the path.
    assert not {path.stem for path in sources("flows")} & sys.stdlib_module_names - {"__init__"}
