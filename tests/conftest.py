"""Fixtures that several test files share."""

from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Small random models in every layout (`tests.tiny.TinyFiles`). Treat the files as read-only."""
    from tests import tiny

    return tiny.build(tmp_path_factory.mktemp("tiny"))
