import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from prefect import flow
from prefect.artifacts import Artifact

from registry.gate import GateLimits, Measurement
from tasks.publish import Published
from tasks.report import render_html, report, result_rows
from tasks.reporting.plots import plot_latency_cdf, plot_pareto, to_svg
from tasks.select import Study, select
from tests.forge import Forge

PUBLISHED = Published(name="tiny", variant="int8-openvino", version="v1", digest="d" * 64)
MARKUP = "<script>alert('x')</script>&\"quote\""


class Page(HTMLParser):
    """Tags with their attributes, and the text a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def strict(study: Study) -> Study:
    """The same study under a gate nobody passes."""
    limits = GateLimits(cosine_mean_pass=1.0, cosine_mean_caution=1.0, max_task_loss=-1.0)
    candidates = [row.candidate for row in study.judged]
    qualities = [row.quality for row in study.judged]
    return study.model_copy(
        update={
            "limits": limits,
            "judged": tuple(select.fn(candidates, qualities, study.speeds, limits, {(): study.teacher})),
        }
    )


def test_report_is_one_file_without_script_or_outside_asset(forge: Forge) -> None:
    page = Page(render_html(forge.study, PUBLISHED))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "image"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("href", "src", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, name)
    assert "@import" not in page.text
    assert not re.search(r"url\((?!#)", render_html(forge.study, PUBLISHED))


def test_report_names_each_of_its_pictures(forge: Forge) -> None:
    labels = [
        attributes["aria-label"] for tag, attributes in Page(render_html(forge.study, None)).tags if tag == "figure"
    ]
    assert labels == ["pareto", "latency_cdf", "calibration"]


def test_report_escapes_every_name(forge: Forge) -> None:
    teacher = forge.study.teacher.model_copy(update={"name": MARKUP, "uri": MARKUP})
    speeds = forge.study.speeds.model_copy(update={"hardware": MARKUP})
    study = forge.study.model_copy(update={"teacher": teacher, "corpus_uri": MARKUP, "speeds": speeds})
    published = PUBLISHED.model_copy(update={"name": MARKUP, "variant": MARKUP})
    page = Page(render_html(study, published))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(MARKUP) == 7  # title, heading, published name and variant, hardware, teacher, corpus


def test_report_shows_every_candidate_with_every_reason(forge: Forge) -> None:
    study = strict(forge.study)
    page = Page(render_html(study, None))
    assert "Nothing was published: no candidate passes the gate." in page.text
    for row in study.judged:
        assert row.gate.verdict == "fail"
        assert row.name in page.text
        for result in row.gate.results:
            assert result.reason in page.text
    assert page.text.count("not measured") == 0


def test_report_says_what_was_published(forge: Forge) -> None:
    text = Page(render_html(forge.study, PUBLISHED)).text
    assert f"Published int8-openvino as tiny {'d' * 64}." in text
    assert forge.study.teacher.digest in text


def test_report_rows_are_fastest_first_and_name_what_was_not_measured(forge: Forge) -> None:
    rows = result_rows(forge.study.judged)
    speeds = [int(row["texts/s"]) for row in rows]
    assert speeds == sorted(speeds, reverse=True)
    judged = forge.study.judged[0]
    bare = judged.quality.model_copy(update={"metrics": {"cosine_mean": Measurement(1.0, 1.0, 1.0)}})
    assert result_rows([judged.model_copy(update={"quality": bare})])[0]["nDCG loss %"] == "none"


@flow(validate_parameters=False)
def report_flow(path: Path, study: Study) -> Path:
    return report(path, study, None)


@pytest.mark.usefixtures("prefect")
def test_report_task_writes_the_page_and_prefect_artifacts(forge: Forge, tmp_path: Path) -> None:
    path = report_flow(tmp_path / "reports" / "run.html", forge.study)
    table, verdicts = Artifact.get(key="optimize-results"), Artifact.get(key="optimize-verdicts")
    assert table is not None
    assert verdicts is not None
    assert json.loads(str(table.data)) == result_rows(forge.study.judged)
    assert all(f"### {row.name}: {row.gate.verdict}" in str(verdicts.data) for row in forge.study.judged)
    # Not byte for byte: the pictures' inner ids are drawn at random.
    assert Page(path.read_text(encoding="utf-8")).text == Page(render_html(forge.study, None)).text


def test_plots_are_svg_that_names_every_system(forge: Forge) -> None:
    for figure in (plot_pareto(forge.study), plot_latency_cdf(forge.study)):
        svg = to_svg(figure)
        assert ET.fromstring(svg).tag.endswith("svg")  # noqa: S314  our own picture
        for name in [row.name for row in forge.study.judged] + ["fp32-torch"]:
            assert f"<!-- {name}" in svg


def test_plots_draw_one_mark_a_candidate(forge: Forge) -> None:
    axes = plot_pareto(forge.study).axes[0]
    marks = [tuple(map(float, collection.get_offsets()[0])) for collection in axes.collections]
    expected = [(r.speed.throughput_per_s, r.quality.metrics["cosine_mean"].value) for r in forge.study.judged]
    np.testing.assert_allclose(marks[:-1], expected)
    lines = plot_latency_cdf(forge.study).axes[0].lines
    assert [line.get_label() for line in lines] == [*(row.name for row in forge.study.judged), "fp32-torch"]
    for line in lines:
        assert float(line.get_ydata()[-1]) == 1
