"""Processes that start with the libraries already imported."""

import sys

import pytest

from notebooks.scripts import forking


def tell(told) -> None:
    import tqdm.auto

    told.send(({"trl", "bitsandbytes", "datasets"} <= sys.modules.keys(), tqdm.auto.tqdm.__mro__[1].__name__))


@pytest.mark.skipif(not forking.AVAILABLE, reason="no fork on Windows: each process does its own imports")
def test_a_process_has_the_libraries_as_a_notebook_would_import_them():
    tells, told = forking.context().Pipe(duplex=False)
    process = forking.start(tell, told)
    assert tells.recv() == (True, "tqdm_notebook")
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(("gear", "forked"), [("cpu", forking.AVAILABLE), ("t4", False), ("ampere", False)])
def test_a_process_that_uses_a_gpu_is_not_forked(gear, forked, monkeypatch):
    """Its CUDA would be that of the server, which the libraries have touched when they were imported."""
    monkeypatch.setenv("QLORA_GEAR", gear)
    assert (forking.context().get_start_method() == "forkserver") is forked
