"""How the lessons are built from their sources and executed: `python -m notebooks.scripts.build`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
