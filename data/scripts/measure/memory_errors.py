"""How far the memory predictor is off, run by run and group by group.

    python -m data.scripts.measure.memory_errors            # every measured run with its prediction, and the means
    python -m data.scripts.measure.memory_errors --record   # let the installed libraries predict all runs; minutes

Eight families have layers that are written out. Of their runs there are three groups: those by which the predictor's few
constants were chosen; the third of the same table that a rule set aside before anything was measured; and runs that were
measured after the predictor was finished. For any other family the libraries themselves run a step without values. That
has no constants; but half of the runs were looked at while it was made, and the other half were set aside.

What the libraries say depends on their version: a family whose code has changed takes other memory. So `--record` keeps
the predictions with the versions that made them, in data/measured/predicted_families.json, one entry for each version of
transformers. The table holds against the measured runs what the transformers of the measurement said, and lists the runs
of which the newest recorded one says something else. To record with another version, put it first in PYTHONPATH.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from data.scripts import ROOT
from data.scripts.measure.memory_plan import settings_of
from qlora_helpers.memory import ModelShape, Prediction, find_gpu, predict
from qlora_helpers.memory.any_shape import AnyShape
from qlora_helpers.memory.gpus import GPU

MEASURED = ROOT / "data" / "measured"
RECORDED = MEASURED / "predicted_families.json"
# what is predicted: what was measured
COMPARED = {
    "loaded_bytes": "loaded_bytes",
    "peak_allocated_bytes": "peak_allocated_bytes",
    "peak_reserved_bytes": "peak_reserved_bytes",
    "device_bytes": "device_used_bytes",
    "evaluation_bytes": "evaluation_peak_bytes",
}
IN_TABLE = ("peak_allocated_bytes", "peak_reserved_bytes", "device_bytes")
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes")
SAME = 0.002  # two versions say the same of a run if no figure differs by more
GB = 10**9
Pairs = list[tuple[dict, dict]]  # a measured run, and the predicted figures by the names of COMPARED


def table_of(name: str) -> dict:
    """A table of measured runs."""
    return json.loads((MEASURED / name).read_text(encoding="utf-8"))


def groups() -> dict[str, list[dict]]:
    """The measured runs of the eight families, by group."""
    table, fresh = (table_of(name)["rows"] for name in ("memory.json", "memory_fresh.json"))
    return {
        "constants chosen by these": [row for row in table if not row["held_out"]],
        "set aside": [row for row in table if row["held_out"]],
        "measured afterwards": fresh,
    }


def groups_of_other_families() -> dict[str, list[dict]]:
    """The measured runs of all other families, by group."""
    return {
        "looked at while it was made": table_of("memory_families.json")["rows"],
        "set aside": table_of("memory_families_held_out.json")["rows"],
    }


def gpu_of(row: dict) -> GPU:
    """The card of a measured run. Rows with a T4's kernels ran on an H200, so they had its workspace."""
    gpu = find_gpu("h200")
    return replace(gpu, compute_capability=(7, 5)) if row.get("t4_kernels") else gpu


def predicted(row: dict) -> Prediction:
    """The prediction for a measured run of the eight families."""
    return predict(ModelShape.from_config(row["config"]), settings_of(row), gpu_of(row))


def figures(prediction: Prediction) -> dict[str, int | None]:
    """The predicted figures, by the names of COMPARED; of an evaluation if there is one."""
    return {of: getattr(prediction, of, None) for of in COMPARED} | {
        "evaluation_bytes": prediction.phases.get("evaluation")
    }


def by_the_libraries(row: dict) -> dict[str, int | None]:
    """What the installed libraries say about a measured run of any family.

    Raises:
        ValueError: they cannot run such a step without values.
    """
    shape, settings, gpu = AnyShape.from_config(_config(row), row["model"]), settings_of(row), gpu_of(row)
    training = replace(settings, eval_batch_size=None)  # the measured peaks are those before the evaluation
    found = figures(predict(shape, training, gpu))
    if settings.eval_batch_size:
        found["evaluation_bytes"] = predict(shape, settings, gpu).phases["evaluation"]
    return found


def _config(row: dict) -> dict:
    if "source" in row:
        return row["config"]
    # rows of the eight families leave their class's defaults out; some Llamas ran beyond the 2,048 positions of theirs, which
    # takes no other memory
    config = ModelShape.from_config(row["config"]).as_config()
    longer = config["model_type"] == "llama" and row["max_length"] > 2048
    return config | ({"max_position_embeddings": row["max_length"]} if longer else {})


def recorded() -> dict[str, dict]:
    """The recorded predictions of the libraries: for each version of transformers, oldest first, `versions` and `rows`."""
    found = json.loads(RECORDED.read_text(encoding="utf-8"))
    return dict(sorted(found.items(), key=lambda entry: [int(part) for part in entry[0].split(".")]))


def measured_with() -> str:
    """The version of transformers that the other families' runs were measured with."""
    return table_of("memory_families.json")["versions"]["transformers"]


def pairs_of(rows: Iterable[dict], version: str | None = None) -> Pairs:
    """Measured runs with what was predicted for them.

    Args:
        rows: measured runs.
        version: of transformers, whose recorded predictions are taken, without the runs that it cannot make; None for the
            layers that are written out.
    """
    if version is None:
        return [(row, figures(predicted(row))) for row in rows]
    said = recorded()[version]["rows"]
    return [(row, said[row["label"]]) for row in rows if "error" not in said[row["label"]]]


def errors(pairs: Pairs) -> dict[str, list[float]]:
    """Signed relative errors of each figure; runs without the measured figure are left out."""
    return {
        of: [found[of] / row[measured] - 1 for row, found in pairs if row.get(measured)]
        for of, measured in COMPARED.items()
    }


def mean_and_worst(values: list[float]) -> tuple[float, float]:
    """The mean and the largest of the absolute errors."""
    sizes = [abs(value) for value in values]
    return sum(sizes) / len(sizes), max(sizes)


def changed() -> dict[str, float]:
    """The runs about which the newest recorded transformers says something else than that of the measurement.

    With the largest ratio of a figure, less 1.
    """
    said = recorded()
    old, new = said[measured_with()]["rows"], list(said.values())[-1]["rows"]
    found = {}
    for label, before in old.items():
        after = new[label]
        if "error" not in before and "error" not in after:
            found[label] = max((after[of] / before[of] - 1 for of in before), key=abs)
    return {label: by for label, by in found.items() if abs(by) > SAME}


def _line(name: str, runs: int, pairs: Pairs) -> str:
    found, cells = errors(pairs), []
    for of in IN_TABLE:
        cell = "{:.1%}, worst {:.1%}".format(*mean_and_worst(found[of])).replace("%", " %")
        cells.append(cell if len(found[of]) == runs else f"{cell} ({len(found[of])} runs)")
    return f"| {name} | {runs} | {' | '.join(cells)} |"


def markdown_table() -> str:
    """The means and the worst cases, for the README."""
    lines = ["| on one NVIDIA H200 | runs | peak allocated | peak reserved | on the card |", "|---|---|---|---|---|"]
    eight, version = groups(), measured_with()
    lines += [_line(name, len(rows), pairs_of(rows)) for name, rows in eight.items()]
    together = [row for rows in eight.values() for row in rows]
    lines.append(_line("all of these, by the libraries", len(together), pairs_of(together, version)))
    for name, rows in groups_of_other_families().items():
        families = len({row["config"]["model_type"] for row in rows})
        lines.append(_line(f"{families} other families, {name}", len(rows), pairs_of(rows, version)))
    return "\n".join([*lines, "", _about_versions(version)])


def _about_versions(version: str) -> str:
    newest, other = list(recorded())[-1], changed()
    said = f"Measured with transformers {version}; the last three lines are what the libraries said with it."
    failed = [label for label, found in recorded()[version]["rows"].items() if "error" in found]
    if failed:
        said += f" They could not run {len(failed)} of these runs without values."
    if not other:
        return said
    models = {}
    for label, by in other.items():
        models.setdefault(label.partition(" ")[0], []).append(by)
    listed = ", ".join(
        f"{name} ({max(found, key=abs):+.1%})".replace("%", " %") for name, found in sorted(models.items())
    )
    return f"{said} A newer one has other code for some models: with {newest} a figure of these differs, by at most: {listed}."


def record(words: Sequence[str] = ()) -> None:
    """Let the installed libraries predict measured runs, and keep what they say.

    Args:
        words: only runs with one of these in their label; what was recorded of the others stays. All without.
    """
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    rows = [row for group in (groups(), groups_of_other_families()) for part in group.values() for row in part]
    said = {}
    for row in rows:
        if words and not any(word in row["label"] for word in words):
            continue
        try:
            said[row["label"]] = {of: size for of, size in by_the_libraries(row).items() if size is not None}
        except ValueError as error:
            said[row["label"]] = {"error": str(error)}
        print(row["label"], said[row["label"]].get("error", ""), flush=True)
    kept = recorded() if RECORDED.exists() else {}
    if words:
        said = kept.get(versions["transformers"], {"rows": {}})["rows"] | said
    in_order = {row["label"]: said[row["label"]] for row in rows if row["label"] in said}
    kept[versions["transformers"]] = {"versions": versions, "rows": in_order}
    RECORDED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _show(name: str, pairs: Pairs) -> None:
    print(f"{name}: measured, and the error of the prediction: {', '.join(COMPARED)}")
    for row, found in sorted(pairs, key=lambda pair: pair[0]["label"]):
        cells = [
            f"{row[measured] / GB:7.2f} GB {found[of] / row[measured] - 1:+6.1%}" if row.get(measured) else " " * 17
            for of, measured in COMPARED.items()
        ]
        print(f"  {row['label']:105}{'  '.join(cells).rstrip()}")
    for of, sizes in errors(pairs).items():
        if sizes:
            print("  {}, {} runs: {:.2%} on average, {:.1%} at worst".format(of, len(sizes), *mean_and_worst(sizes)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--record",
        nargs="*",
        metavar="WORD",
        help="let the installed libraries predict all runs, or those with a WORD in their label, and keep it",
    )
    words = parser.parse_args().record
    if words is not None:
        record(words)
        return
    for name, rows in groups().items():
        _show(name, pairs_of(rows))
        for version in recorded():
            _show(f"{name}, by the libraries with transformers {version}", pairs_of(rows, version))
    for name, rows in groups_of_other_families().items():
        for version in recorded():
            _show(f"other families, {name}, with transformers {version}", pairs_of(rows, version))
    print(markdown_table())


if __name__ == "__main__":
    main()
