"""A small table to train on, and runs that end before the model is loaded."""

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.paths import data_path


@pytest.fixture
def few(tmp_path):
    """A table of 12 rows."""
    rows = data_path("examples", "people.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    path = tmp_path / "few.csv"
    path.write_text("".join(rows[:13]), encoding="utf-8")
    return path


@pytest.fixture
def up_to_loading(tmp_path, capsys, monkeypatch):
    """Standard output of a run that is ended where it would load the model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qlora_helpers.models.loading.load_model", None)

    def run(*options):
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            main(["run", "--output", "out", *map(str, options)])
        return capsys.readouterr().out

    return run
