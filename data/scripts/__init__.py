"""What made the data, measured it, and judges the articles' claims: `make`, `measure` and `claims`.

Each is run from the repository's root, such as `python -m data.scripts.measure.quality`.
"""

from pathlib import Path

import qlora_helpers  # noqa: F401  first, since torch's threads and the libraries' messages are set by it

ROOT = Path(__file__).resolve().parents[2]  # of the repository
DATA = ROOT / "data"
