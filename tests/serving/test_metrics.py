"""What the worker counts, and under which labels."""

import pytest

from serving.metrics import Metrics


@pytest.mark.parametrize(
    ("padded_tokens", "size"),
    [(1, "64"), (64, "64"), (65, "256"), (1024, "1024"), (16_384, "16384"), (16_385, "+Inf"), (10**6, "+Inf")],
)
def test_engine_runs_are_counted_by_precision_and_size(padded_tokens: int, size: str) -> None:
    metrics = Metrics()
    metrics.for_model("tiny", "1", "int8").count_engine_run(0.25, padded_tokens)
    found = {
        sample.labels["tokens"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "akidb_engine_seconds_sum" and sample.labels["precision"] == "int8"
    }
    assert {name: value for name, value in found.items() if value} == {size: 0.25}
    assert list(found) == ["64", "256", "1024", "4096", "16384", "+Inf"]


def test_answers_are_counted_alike_whoever_gave_them() -> None:
    own, told = Metrics(), Metrics()
    model = own.for_model("tiny", "1", "int8")
    for seconds in (0.001, 0.002):
        model.count_answer(seconds)
    told.count_answers("tiny", "1", (0.001, 0.002))
    for name, labels in (
        ("akidb_embed_requests_total", {"status": "200"}),
        ("akidb_embed_latency_seconds_count", {}),
        ("akidb_embed_latency_seconds_sum", {}),
    ):
        values = [
            each.registry.get_sample_value(name, {"model": "tiny", "model_version": "1"} | labels)
            for each in (own, told)
        ]
        assert values[0] == values[1] > 0
