"""The figures of a lesson, drawn by the lesson's own cells, and what is wrong with them.

    python -m tests.notebooks.lesson_figures 02 [--save FOLDER]

runs the solved lesson in this process, and prints one line per figure with its faults (`tests/support/figure_faults.py`).
With --save it also keeps each figure as it is and on a dark page, to look at.
"""

import argparse
import sys
from pathlib import Path

import jupytext
from matplotlib.figure import Figure

from notebooks.scripts import build
from notebooks.scripts.running import code_cells, has_tag
from qlora_helpers.course import plots
from tests.support.figure_faults import faults_of


def figures_of(name: str) -> list[Figure]:
    """All figures that a lesson shows while its code runs, with the solutions of its exercises; a slider, as it first stands."""
    from IPython.core.interactiveshell import InteractiveShell

    shown: list[Figure] = []
    original = plots._as_html  # through which every figure goes, that of a running training, too

    def noting(fig: Figure, *args: str):
        shown.append(fig)
        return original(fig, *args)

    plots._as_html = noting
    shell = InteractiveShell.instance()
    try:
        for cell in code_cells(jupytext.read(build.SOURCES / f"{name}.py")):
            if not has_tag(cell, "exercise"):
                done = shell.run_cell(cell.source, silent=True)
                done.raise_error()
    finally:
        plots._as_html = original
    return shown


def _title(fig: Figure) -> str:
    return fig.get_suptitle() or next((ax.get_title(loc="left") for ax in fig.axes), "") or "without a title"


def _save(fig: Figure, path: Path) -> None:
    from PIL import Image

    fig.savefig(path)
    card = Image.open(path)
    page = Image.new("RGB", (card.width + 60, card.height + 60), "#111111")
    page.paste(card, (30, 30))
    page.save(path.with_stem(f"{path.stem}-dark"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lesson", help="its number, such as 02")
    parser.add_argument("--save", type=Path, help="a folder for the figures")
    given = parser.parse_args()
    (name,) = [name for name in build.lessons() if name.startswith(given.lesson)]
    bad, number, last = 0, 0, None
    for fig in figures_of(name):
        number += _title(fig) != last  # a live plot is one figure, drawn again and again
        last = _title(fig)
        faults = faults_of(fig)
        bad += bool(faults)
        print(f"figure {int(name[:2])}.{number}, {_title(fig)}: {'; '.join(faults) or 'fine'}")
        if given.save:
            given.save.mkdir(parents=True, exist_ok=True)
            _save(fig, given.save / f"{name[:2]}-{number}.png")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
