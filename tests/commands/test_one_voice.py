"""Of several processes the first speaks; another only where a fault is its own."""

import pytest
from torch.distributed import TCPStore

from qlora_helpers.commands.one_voice import Voice, one_voice
from qlora_helpers.launch import Launch
from tests.support.launched import start


@pytest.fixture
def store(monkeypatch):
    """A launcher's store."""
    found = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found.port))
    return found


def of(rank: int) -> Voice:
    return Voice(Launch(2, rank, rank))


def test_a_process_alone_speaks(capsys):
    Voice().say("error: no")
    assert capsys.readouterr().err == "error: no\n"


def test_the_same_fault_is_said_once(store, capsys):
    of(0).say("error: no")
    of(1).say("error: no")
    assert capsys.readouterr().err == "error: no\n"


def test_another_fault_is_said_with_the_process_s_number(store, capsys):
    of(0).say("error: no")
    of(1).say("error: out of memory")
    assert capsys.readouterr().err == "error: no\nprocess 1 of 2: error: out of memory\n"


def test_what_breaks_because_another_process_failed_is_not_said(store, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RuntimeError, match="connection"), one_voice():
        raise RuntimeError("connection closed by peer")
    of(1).tell("error: out of memory")
    with one_voice() as voice:
        raise RuntimeError("connection closed by peer")
    assert voice.code == 1


def test_only_the_first_process_prints(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with one_voice():
            print(f"from {rank}")
    assert capsys.readouterr().out == "from 0\n"


@pytest.mark.everything
@pytest.mark.parametrize(
    ("rank", "said"), [(1, "process 1 of 2: error: no model for 1"), (-1, "error: no model for -1")]
)
def test_a_fault_in_one_process_or_in_all_ends_the_command_with_one_message(rank, said, tmp_path):
    code = (
        "import sys; from tests.support.launched import failing; from qlora_helpers.__main__ import main; "
        f"failing({rank}); sys.exit(main(['run', '--steps', '2', '--output', r'{tmp_path / 'run'}']))"
    )
    script = tmp_path / "failing.py"
    script.write_text(code, encoding="utf-8")
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    out, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert [line for line in err.splitlines() if "error: " in line and "exitcode" not in line] == [said], err
    assert out.count("Loading the libraries") == 1
    assert "Traceback" not in err.split("torch/distributed")[0]
    assert not (tmp_path / "run" / "run.json").exists()
