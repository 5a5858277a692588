"""Data files as people have them, in the words of the shipped model: a CSV table, Alpaca, and ShareGPT with faults.

    python -m data.scripts.make.example_files [FOLDER]

The questions are the first of the training chats; each file has others. The last file has four rows that cannot be used.
"""

import csv
import io
import json
import sys
from pathlib import Path

from data.scripts import DATA
from qlora_helpers.chats import read_chats

ROWS = 60  # in the table and in the Alpaca file
SHAREGPT_ROWS = 20


def made() -> dict[str, str]:
    """The text of each file, by its name."""
    chats = read_chats(DATA / "chats" / "train.jsonl")
    pairs = [(chat[-2]["content"], chat[-1]["content"]) for chat in chats[: 2 * ROWS + SHAREGPT_ROWS]]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("question", "answer"), *pairs[:ROWS]])
    alpaca = [{"instruction": asked, "input": "", "output": said} for asked, said in pairs[ROWS : 2 * ROWS]]
    conversations = [
        [{"from": "human", "value": asked}, {"from": "gpt", "value": said}] for asked, said in pairs[2 * ROWS :]
    ]
    _spoil(conversations)
    lines = [json.dumps({"conversations": turns}) + "\n" for turns in conversations]
    return {
        "people.csv": table.getvalue(),
        "people_alpaca.json": json.dumps(alpaca, indent=1) + "\n",
        "people_sharegpt.jsonl": "".join(lines),
    }


def _spoil(conversations: list[list[dict[str, str]]]) -> None:
    """Put in faults that chat logs really have."""
    conversations[4][1]["value"] = ""
    conversations[9].insert(0, {"from": "gpt", "value": "Hello."})
    conversations[13].append({"from": "human", "value": "Thanks."})
    conversations[17][1]["from"] = "function_call"


def main(folder: Path = DATA / "examples") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in made().items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
