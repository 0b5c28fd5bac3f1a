"""Tiny bundles with the reports that `optimize` puts into them, published to a registry, for tests of promotion."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from registry.client import push
from registry.manifest import MANIFEST_NAME, payload_checksum, read_manifest, scan_files, write_manifest
from registry.store import Store
from tests.bundles import make_bundle

QUALITY = {
    "nonfinite": 0.0,
    "cosine_mean": 0.999,
    "engine_cosine_mean": 0.9999,
    "ndcg_at_10_loss": 0.001,
    "recall_at_10_loss": 0.002,
}
BESIDE_CHAMPION = {
    "latency_ratio_vs_champion": 0.8,
    "p95_ratio_vs_champion": 0.8,
    "throughput_ratio_vs_champion": 1.2,
    "memory_ratio_vs_champion": 0.9,
    "ndcg_at_10_loss_vs_champion": 0.0,
    "recall_at_10_loss_vs_champion": 0.0,
}


def publish_bundle(
    store: Store,
    folder: Path,
    seed: int = 0,
    quality: Mapping[str, float | None] = QUALITY,
    ratios: Mapping[str, float] = BESIDE_CHAMPION,
    champion: str | None = None,
    is_opposite: bool = False,
) -> str:
    """Write a bundle whose reports say this, measured beside `champion`, push it, and return its digest.

    Of one that `is_opposite` the golden set holds the negative of what it embeds: no worker can prove it.
    """
    make_bundle(folder, seed=seed)
    if is_opposite:
        turn_golden_round(folder)
    (folder / "reports").mkdir()
    metrics = {name: {"value": value, "low": value, "high": value} for name, value in quality.items()}
    results = [{"metric": name, "value": value, "low": value, "high": value} for name, value in ratios.items()]
    _write(folder / "reports" / "quality.json", {"metrics": metrics, "num_texts": 1, "num_queries": 1})
    _write(folder / "reports" / "gate.json", {"verdict": "pass", "reason": "", "results": results if champion else []})
    manifest = read_manifest(folder)
    (folder / MANIFEST_NAME).unlink()
    files = scan_files(folder)
    lineage = manifest.lineage.model_copy(update={"parents": {"champion": champion} if champion else {}})
    update = {"files": files, "checksum": payload_checksum(files), "lineage": lineage}
    write_manifest(folder, manifest.model_copy(update=update))
    return push(folder, store)


def turn_golden_round(folder: Path) -> None:
    """Negate the golden embeddings; the manifest is left as it was."""
    with np.load(folder / "golden.npz", allow_pickle=False) as golden:
        arrays = {name: golden[name] for name in golden.files}
    np.savez(folder / "golden.npz", **{**arrays, "embeddings": -arrays["embeddings"]})


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document))
