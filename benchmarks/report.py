"""The newest run of a benchmark as a Markdown table: `python -m benchmarks.report [results/serving.jsonl]`."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS

Row = dict[str, Any]


def newest_run(rows: Sequence[Row]) -> list[Row]:
    """The rows that share the `config.run` of the last one; its commit where a benchmark names no run."""
    if not rows:
        return []
    run = _name_run(rows[-1])
    return [row for row in rows if _name_run(row) == run]


def _name_run(row: Row) -> str:
    return str(row["config"].get("run") or row["commit"])


def render_table(rows: Sequence[Row]) -> str:
    """One line a case and metric, one column a system, and our ratio to each baseline."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    lines = [["case", "metric", *systems, "ratio"]]
    cells: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row["case"], row["metric"], row["system"]].append(row)
    for case, metric in dict.fromkeys((row["case"], row["metric"]) for row in rows):
        found = [cells.get((case, metric, system), []) for system in systems]
        ratios = [f"{row['ratio']:.3g} × {row['baseline']}" for own in found for row in own if "ratio" in row]
        values = [f"{own[-1]['value']:,.4g} {own[-1]['unit']}".strip() if own else "" for own in found]
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS / "serving.jsonl", help="a file of rows")
    path = parser.parse_args(argv).results
    if not path.is_file():
        parser.error(f"there is no file {path}: the benchmarks write theirs to {RESULTS}")
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
