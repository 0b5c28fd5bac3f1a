"""Latency models with a given line."""

from serving.latency_model import LatencyModel, Run


def make_latency_model(overhead_tokens: float = 4.0, tokens_per_second: float = 1000.0) -> LatencyModel:
    """A model that predicts exactly `(overhead_tokens + tokens) / tokens_per_second`."""
    return LatencyModel([Run(tokens, (overhead_tokens + tokens) / tokens_per_second) for tokens in (10, 1000)])
