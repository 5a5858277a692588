"""The command line's options are the fields of `Settings`."""

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.commands.run import VARIED
from qlora_helpers.commands.settings_options import option_of
from qlora_helpers.settings import MEMORY_SETTINGS


def test_the_options_are_the_fields_of_settings_with_their_texts(capsys):
    for command, names in (("run", VARIED), ("memory", MEMORY_SETTINGS)):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert all(f"{option_of(name)} " in text for name in names)
        assert "LoRA's output is scaled by alpha / rank" in text or command == "memory"
