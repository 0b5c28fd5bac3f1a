"""Renders docs/reference.md from the code: `python -m tests.reference` writes it, a test checks that it is current."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel

import registry.errors
import tasks.errors
from flows.config import OptimizeConfig
from registry.approval import ApprovalPolicy
from registry.gate import GateSettings
from registry.settings import RegistrySettings, variable_of
from serving.config import iterate_keys
from serving.errors import STATUS
from serving.metrics import Metrics
from serving.settings import ModelSource
from tasks.production.delivery import WorkerConfig
from tasks.production.notify import WebhookConfig
from tasks.settings import BuildConfig
from tasks.steps import DistillConfig, PruneConfig, TrimConfig
from tasks.variants import Recipe, list_variants

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"


def render_reference() -> str:
    """Every setting, error and metric, as Markdown."""
    return "\n".join(
        (
            "# Reference",
            "",
            "Written from the code by `make fix`; a test keeps it current.",
            "",
            "## Settings of the pipeline: `thorforge.toml`",
            "",
            *_table(("key", "default", "meaning"), _fields("optimize", OptimizeConfig)),
            *_table(("key", "default", "meaning"), _fields("optimize.gate", GateSettings)),
            *_table(("key", "default", "meaning"), _fields("optimize.tensorrt", BuildConfig)),
            *_table(("key of each `[[optimize.recipe]]`", "default", "meaning"), _fields("", Recipe)),
            *(line for step in (DistillConfig, PruneConfig, TrimConfig) for line in _step_table(step)),
            *_table(("key", "default", "meaning"), _fields("promote.approval", ApprovalPolicy)),
            *_table(("key of each `[[promote.workers]]`", "default", "meaning"), _fields("", WorkerConfig)),
            *_table(("key of each `[[promote.webhooks]]`", "default", "meaning"), _fields("", WebhookConfig)),
            *_table(
                ("key", "variable", "default", "meaning"),
                (
                    (key, f"`{variable_of(key[10:-1])}`", default, meaning)
                    for key, default, meaning in _fields("registry", RegistrySettings)
                ),
            ),
            "## Settings of the worker: `config.toml`, environment, flags",
            "",
            *_table(
                ("key", "variable", "flag", "default", "meaning"),
                (
                    (f"`{k.name}`", f"`{k.variable}`", f"`{k.flag}`", f"`{k.default}`", k.description)
                    for k in iterate_keys()
                ),
            ),
            *_table(("key of each `[[embedding.models.available]]`", "default", "meaning"), _fields("", ModelSource)),
            "## Errors of the worker",
            "",
            *_table(
                ("error", "status", "when"),
                ((e.__name__, f"{status.value} {status.phrase}", _summary(e)) for e, status in STATUS.items()),
            ),
            "## Errors of the pipeline and the registry",
            "",
            *_table(
                ("error", "when"),
                ((e.__name__, _summary(e)) for e in (*_leaves(tasks.errors), *_leaves(registry.errors))),
            ),
            "## Metrics of the worker",
            "",
            *_table(("metric", "kind", "labels", "meaning"), _metrics()),
        )
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _step_table(step: type[BaseModel]) -> list[str]:
    kind = step.model_fields["kind"].default
    rows = (row for row in _fields("", step) if row[0] != "`kind`")
    return _table((f'key of a step with `kind = "{kind}"`', "default", "meaning"), rows)


def _fields(section: str, model: type[BaseModel]) -> list[tuple[str, str, str]]:
    rows = []
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if (section, name) == ("optimize", "variants"):  # on this node there may be more
            default = list_variants()
        if not isinstance(default, BaseModel):
            shown = ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            key = f"{section}.{name}" if section else name
            rows.append((f"`{key}`", "required" if field.is_required() else f"`{shown}`", field.description or ""))
    return rows


def _leaves(module: object) -> list[type[Exception]]:
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Exception)]
    return [
        c for c in classes if not c.__subclasses__() or all(s.__module__ != c.__module__ for s in c.__subclasses__())
    ]


def _summary(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def _metrics() -> list[tuple[str, str, str, str]]:
    metrics = Metrics()
    rows = []
    for collector in metrics.registry._collector_to_names:
        family = next(iter(collector.describe()))
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(getattr(collector, "_labelnames", ()))
        rows.append((f"`{name}`", family.type, labels, family.documentation))
    return sorted(rows)


if __name__ == "__main__":
    PAGE.write_text(render_reference(), encoding="utf-8")
