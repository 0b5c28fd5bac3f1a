"""Report: the self-contained HTML page an approver reads, and the Prefect artifacts of a run."""

import html
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from tasks.benchmark import TORCH
from tasks.publish import Published
from tasks.reporting.plots import plot_latency_cdf, plot_pareto, plot_steps, to_svg
from tasks.reporting.quantization_plots import plot_quantization
from tasks.select import Judged, Study

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #d1d9e0; text-align: right; font-variant-numeric: tabular-nums }
td:first-child, th:first-child { text-align: left }
th { background: #f6f8fa }
.pass { color: #1a7f37 } .caution { color: #9a6700 } .fail { color: #cf222e } .verdict { font-weight: 600 }
figure { margin: 1rem 0 } svg { max-width: 100%; height: auto } code { background: #f6f8fa; overflow-wrap: anywhere }
"""


@task(task_run_name="report", cache_policy=NO_CACHE)
def report(path: Path, study: Study, published: Published | None) -> Path:
    """Write the HTML report to `path`, and the result table and the verdicts as Prefect artifacts."""
    create_table_artifact(
        table=result_rows(study.judged),
        key="optimize-results",
        description=f"Candidates of {study.teacher.name}, fastest first",
    )
    create_markdown_artifact(
        markdown=_verdicts_markdown(study, published),
        key="optimize-verdicts",
        description="What the gate said, and why",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_html(study, published), encoding="utf-8")
    return path


def result_rows(judged: Sequence[Judged]) -> list[dict[str, str]]:
    """The result table, formatted for reading: one row a candidate, fastest first."""
    return [
        {
            "candidate": row.name,
            "verdict": row.gate.verdict,
            "cosine": f"{row.quality.metrics['cosine_mean'].value:.4f}",
            "nDCG loss %": _percent(row, "ndcg_at_10_loss"),
            "recall loss %": _percent(row, "recall_at_10_loss"),
            **({"STS loss %": _percent(row, "sts_spearman_loss")} if "sts_spearman" in row.quality.metrics else {}),
            "p50 ms": f"{row.speed.latency_ms(50):.2f}",
            "p95 ms": f"{row.speed.latency_ms(95):.2f}",
            "texts/s": f"{row.speed.throughput_per_s:.0f}",
            "× torch": f"{row.speedup_vs_torch:.2f}",
            "MB": f"{row.size_mb:.1f}",
            "M params": f"{row.model.num_parameters / 1e6:.1f}",
            "in layers": f"{row.model.num_encoder_parameters / 1e6:.1f}",
            "cost/M": f"{row.cost_per_million:.4g}",
            "peak MB": f"{row.speed.peak_memory_mb:.0f}",
            "compatibility": row.compatibility,
            "Pareto": "yes" if row.is_on_pareto_front else "no",
        }
        for row in judged
    ]


def plot_study(study: Study) -> dict[str, Figure]:
    """All pictures of a run by name, in the order of the report."""
    first = {"pareto": plot_pareto(study), "latency_cdf": plot_latency_cdf(study)}
    return first | plot_steps(study) | plot_quantization(study)


def render_html(study: Study, published: Published | None) -> str:
    """The whole page: no script, no outside asset."""
    teacher, speeds = study.teacher, study.speeds
    torch, first = speeds.speeds[TORCH], study.judged[0].quality
    outcome = (
        f"Published <b>{html.escape(published.variant)}</b> as <code>{html.escape(published.name)}</code> "
        f"<code>{published.digest}</code>."
        if published
        else "Nothing was published: no candidate passes the gate."
    )
    return "\n".join(
        (
            "<!doctype html><html lang='en'><meta charset='utf-8'>",
            f"<title>{html.escape(teacher.name)}: optimisation report</title><style>{_STYLE}</style>",
            f"<h1>{html.escape(teacher.name)}</h1><p>{outcome}</p>",
            f"<p>Rule: {study.rule}. The gate compares the bad end of each 95 % interval",
            "with its limit. Losses are shares of the teacher's score, bad end in brackets; cosine is the mean.</p>",
            _table(result_rows(study.judged)),
            f"<p>torch fp32 in the same run: {torch.throughput_per_s:.0f} texts/s, p50 {torch.latency_ms(50):.2f} ms.",
            f"Measured on {html.escape(speeds.hardware)}, mean {speeds.mean_tokens:.0f} tokens a text.</p>",
            *(
                f"<figure aria-label='{html.escape(name)}'>{to_svg(figure)}</figure>"
                for name, figure in plot_study(study).items()
            ),
            "<h2>Why</h2>",
            "<ul>",
            *(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in study.explain().items()),
            "</ul>",
            *(_verdict_html(row) for row in study.judged),
            f"<h2>What was judged</h2><p>Teacher <code>{html.escape(teacher.uri)}</code>,",
            f"{teacher.num_parameters / 1e6:.1f} M parameters, digest <code>{teacher.digest}</code>.",
            f"Corpus <code>{html.escape(study.corpus_uri)}</code>: {first.num_texts} evaluation texts,",
            f"{first.num_queries} queries. STS files: {html.escape(', '.join(map(str, study.sts)) or 'none')}.",
            "</p></html>",
        )
    )


def _percent(row: Judged, name: str) -> str:
    loss = row.quality.metrics.get(name)
    return "none" if loss is None else f"{100 * loss.value:.2f} (≤ {100 * loss.high:.2f})"


def _table(rows: list[dict[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(_cell(name, value) for name, value in row.items()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(name: str, value: str) -> str:
    kind = f" class='verdict {value}'" if name == "verdict" else ""
    return f"<td{kind}>{html.escape(value)}</td>"


def _verdict_html(row: Judged) -> str:
    items = "".join(f"<li class='{r.verdict}'>{r.verdict}: {html.escape(r.reason)}</li>" for r in row.gate.results)
    steps = "".join(
        f"<p>{html.escape(str(step))}, then {row.candidate.variant.build}.</p>" for step in row.candidate.variant.steps
    )
    return f"<h3>{row.name}: <span class='{row.gate.verdict}'>{row.gate.verdict}</span></h3>{steps}<ul>{items}</ul>"


def _verdicts_markdown(study: Study, published: Published | None) -> str:
    lines = [f"Rule: {study.rule}.", ""]
    lines.append(
        f"Published **{published.variant}** `{published.digest}`." if published else "**Nothing was published.**"
    )
    lines += ["", *(f"- {name}: {why}" for name, why in study.explain().items())]
    for row in study.judged:
        lines += ["", f"### {row.name}: {row.gate.verdict}", ""]
        lines += [f"- {result.verdict}: {result.reason}" for result in row.gate.results]
    return "\n".join(lines)
