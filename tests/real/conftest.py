"""Tests that need a real model, which `make test-real` fetches; elsewhere they are skipped, and say so."""

from pathlib import Path

import pytest

from qlora_helpers.models.fetched import fetched_folder

FOLDER = Path(__file__).resolve().parent
NAME = "smollm2-135m"


def pytest_collection_modifyitems(config, items):
    if not config.getoption("real"):
        for item in items:
            if FOLDER in item.path.parents:  # pytest passes the items of all folders
                item.add_marker(pytest.mark.skip(reason=f"needs {NAME} on this disk: make test-real fetches it"))


@pytest.fixture(scope="session")
def folder():
    """The model's folder. With --real, that it is not there is an error, and no reason to skip."""
    return fetched_folder(NAME)
