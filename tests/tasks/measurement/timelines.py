"""Timelines to summarise: one recorded on an H100, and made-up ones."""

from collections.abc import Iterable
from pathlib import Path

from serving.engines.bert import BertConfig
from tasks.measurement.trace import Span

# Three runs of MiniLM in float16, 1,024 texts of 128 tokens, from host memory to host memory.
H100_MINILM = Path(__file__).with_name("h100_minilm_1024x128.json")
MINILM = BertConfig(30_522, 512, 384, 6, 12, 1536, 1e-12, "mean", True)


def lay_out(names: Iterable[str]) -> list[Span]:
    """One behind the other, ten microseconds each."""
    return [Span(name, 10.0 * number, 10.0 * number + 10) for number, name in enumerate(names)]
