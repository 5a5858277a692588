"""The commands of a new user: what they took, that they are those of the README, and that the script times them."""

import json
import sys

from data.scripts.measure import new_user
from qlora_helpers.chats import read_file
from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_says_how_long_it_is_to_a_chat_and_that_is_less_than_a_quarter_of_an_hour():
    table = json.loads(new_user.TABLE.read_text(encoding="utf-8"))
    assert [row["command"] for row in table["rows"]] == list(new_user.COMMANDS)
    to_chat = [row for row in table["rows"] if row["command"].split()[0] in new_user.TO_CHAT]
    seconds = sum(row["seconds"] for row in to_chat)
    assert len(to_chat) == len(new_user.TO_CHAT) and seconds < 15 * 60
    assert max(row["busy_cores"] for row in to_chat) < 3, "other work held these commands up: measure them anew"
    said = " ".join(README.split())
    minutes = f"{seconds // 60} min {seconds % 60} s"
    assert f"`fetch`, `data`, `run` and `chat` took {minutes} on two cores with nothing else to do" in said
    file = read_file(ROOT / new_user.FILE, on_bad="drop")
    assert f"The example has {len(file.chats) + len(file.dropped)} rows in everyday English" in said


def test_the_readme_has_these_commands():
    for command in new_user.COMMANDS:
        if command.split()[0] in ("fetch", "run", "chat"):
            assert f"qlora_helpers {command.replace('OUT', 'runs')}\n" in README


def test_a_command_is_timed_alone_and_kept_beside_the_others(tmp_path, monkeypatch):
    """With commands that need no model."""
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"rows": [{"command": "fetch", "seconds": 7}]}), encoding="utf-8")
    monkeypatch.setattr(new_user, "TABLE", table)
    monkeypatch.setattr(new_user, "COMMANDS", ("fetch", "memory --list", "doctor OUT/none"))
    monkeypatch.setattr(sys, "argv", ["new_user", str(tmp_path / "new"), "memory"])
    new_user.main()
    first, second = json.loads(table.read_text(encoding="utf-8"))["rows"]
    assert first == {"command": "fetch", "seconds": 7} and second["command"] == "memory --list"
    assert second["seconds"] >= 0 and second["processor_seconds"] >= 0 and second["busy_cores"] > 0
