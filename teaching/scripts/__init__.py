"""What an instructor shows and hands out, made from the built lessons: `python -m teaching.scripts.build`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
