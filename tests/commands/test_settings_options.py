"""The command line's options are the fields of `Settings`."""

import argparse
import re

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.commands.run_settings import VARIED
from qlora_helpers.commands.settings_options import add_settings, given, option_of
from qlora_helpers.settings import MEMORY_SETTINGS, Settings


def test_the_options_are_the_fields_of_settings_with_their_texts(capsys):
    for command, names in (("run", VARIED), ("memory", MEMORY_SETTINGS)):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert all(re.search(rf"{option_of(name)}[ ,]", text) for name in names)
        assert "LoRA's output is scaled by alpha / rank" in text or command == "memory"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--epochs", "1.5"], Settings(epochs=1.5)),
        (["--validation", "0.1"], Settings(validation=0.1)),
        (["--validation", "my chats.csv"], Settings(validation="my chats.csv")),
        (["--validation", "./0.1"], Settings(validation="./0.1")),
        (["--validation", "none"], Settings()),
        (
            ["--validation", ".2", "--eval-steps", "5", "--patience", "3"],
            Settings(validation=0.2, eval_steps=5, patience=3),
        ),
    ],
)
def test_what_a_run_is_validated_on_and_how_long_it_is_can_be_typed(words, wanted):
    parser = argparse.ArgumentParser()
    add_settings(parser, ("steps", "epochs", "validation", "eval_steps", "patience"), Settings())
    assert Settings(**given(parser.parse_args(words))) == wanted


def test_a_share_of_one_is_refused_with_what_is_allowed():
    parser = argparse.ArgumentParser()
    add_settings(parser, ["validation"], Settings())
    with pytest.raises(
        ValueError, match="validation=1: must be a share of the chats, more than 0 and less than 1, or the path"
    ):
        Settings(**given(parser.parse_args(["--validation", "1"])))
