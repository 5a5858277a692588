"""The scripts that make the data, measure it, and judge the articles' claims: `make`, `measure` and `claims`.

Run them from the repository's root, for example `python -m data.scripts.measure.comparisons`.
"""

from pathlib import Path

import qlora_helpers  # noqa: F401  first, since it sets torch's threads and the libraries' messages

ROOT = Path(__file__).resolve().parents[2]  # of the repository
DATA = ROOT / "data"
