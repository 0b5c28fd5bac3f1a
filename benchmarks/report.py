"""The newest run of a benchmark as a Markdown table: `python -m benchmarks.report [results/serving.jsonl]`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS

Row = dict[str, Any]


def newest_run(rows: Sequence[Row]) -> list[Row]:
    """The rows that share the `config.run` of the last one."""
    if not rows:
        return []
    run = rows[-1]["config"]["run"]
    return [row for row in rows if row["config"].get("run") == run]


def render_table(rows: Sequence[Row]) -> str:
    """One line a case and metric, one column a system, and our ratio to the baseline."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    lines = [["case", "metric", *systems, "ratio"]]
    cells = {(row["case"], row["metric"], row["system"]): row for row in rows}
    for case, metric in dict.fromkeys((row["case"], row["metric"]) for row in rows):
        found = [cells.get((case, metric, system)) for system in systems]
        ratios = [f"{row['ratio']:.3g} × {row['baseline']}" for row in found if row and "ratio" in row]
        values = [f"{row['value']:,.4g} {row['unit']}".strip() if row else "" for row in found]
        lines.append([case, metric, *values, ", ".join(ratios)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *body = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (head, rule, *body))


def read_rows(path: Path) -> list[Row]:
    """Every row of a results file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(argv: Sequence[str]) -> int:
    """Print the table of the newest run. Returns the exit status."""
    path = Path(argv[0]) if argv else RESULTS / "serving.jsonl"
    rows = newest_run(read_rows(path))
    if not rows:
        print(f"error: {path} has no rows", file=sys.stderr)
        return 1
    last = rows[-1]
    print(f"{last['hardware']}; commit {last['commit']}; {last['date']}\n")
    print(render_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
