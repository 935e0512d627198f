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
