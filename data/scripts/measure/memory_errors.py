"""How far the memory predictor is off, run by run and group by group.

    python -m data.scripts.measure.memory_errors            # every measured run with its prediction, and the means

Three groups: the runs by which the predictor's few constants were chosen; the third of the same table that a rule set
aside before anything was measured; and runs that were measured after the predictor was finished.
"""

import json
from dataclasses import replace

from data.scripts import ROOT
from data.scripts.measure.memory_plan import settings_of
from qlora_helpers.memory import ModelShape, Prediction, find_gpu, predict

# what is predicted: what was measured
COMPARED = {
    "loaded_bytes": "loaded_bytes",
    "peak_allocated_bytes": "peak_allocated_bytes",
    "peak_reserved_bytes": "peak_reserved_bytes",
    "device_bytes": "device_used_bytes",
}
GB = 10**9


def groups() -> dict[str, list[dict]]:
    """The measured runs of each group."""
    table, fresh = (
        json.loads((ROOT / "data" / "measured" / name).read_text(encoding="utf-8"))["rows"]
        for name in ("memory.json", "memory_fresh.json")
    )
    return {
        "constants chosen by these": [row for row in table if not row["held_out"]],
        "set aside": [row for row in table if row["held_out"]],
        "measured afterwards": fresh,
    }


def predicted(row: dict) -> Prediction:
    """The prediction for a measured run. Rows with a T4's kernels ran on an H200, so they had its workspace."""
    gpu = find_gpu("h200")
    gpu = replace(gpu, compute_capability=(7, 5)) if row.get("t4_kernels") else gpu
    return predict(ModelShape.from_config(row["config"]), settings_of(row), gpu)


def errors(rows: list[dict]) -> dict[str, list[float]]:
    """Signed relative errors of each figure; runs without the measured figure are left out."""
    pairs = [(row, predicted(row)) for row in rows]
    return {
        of: [getattr(found, of) / row[measured] - 1 for row, found in pairs if row[measured]]
        for of, measured in COMPARED.items()
    }


def mean_and_worst(values: list[float]) -> tuple[float, float]:
    """The mean and the largest of the absolute errors."""
    sizes = [abs(value) for value in values]
    return sum(sizes) / len(sizes), max(sizes)


def markdown_table() -> str:
    """The means and the worst cases, for the README."""
    lines = ["| on one NVIDIA H200 | runs | peak allocated | peak reserved | on the card |", "|---|---|---|---|---|"]
    for name, rows in groups().items():
        found = errors(rows)
        cells = []
        for of in list(COMPARED)[1:]:
            cell = "{:.1%}, worst {:.1%}".format(*mean_and_worst(found[of])).replace("%", " %")
            cells.append(cell if len(found[of]) == len(rows) else f"{cell} ({len(found[of])} runs)")
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    for name, rows in groups().items():
        print(f"{name}: measured, and the error of the prediction")
        for row in sorted(rows, key=lambda row: row["label"]):
            found = predicted(row)
            cells = [
                f"{row[measured] / GB:7.2f} GB {getattr(found, of) / row[measured] - 1:+6.1%}"
                if row[measured]
                else " " * 17
                for of, measured in list(COMPARED.items())[1:]
            ]
            print(f"  {row['label']:90}{'  '.join(cells)}")
    print(markdown_table())


if __name__ == "__main__":
    main()
