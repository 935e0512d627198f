"""Fixtures that several test files share."""

import os
from typing import Any

import pytest

# With `pytest -n` every worker has a core: two pools of threads on it would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Small random models in every layout (`tests.tiny.TinyFiles`). Treat the files as read-only."""
    from tests import tiny

    return tiny.build(tmp_path_factory.mktemp("tiny"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run it with pytest --slow"))
