"""The tests. Each room of the package has its own here; `support` has what several of them use."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
