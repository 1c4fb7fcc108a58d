"""The tiny sweep, made once for all tests that only look at it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.tiny_sweep import debug_sweep, sweep_file


@pytest.fixture(scope="session")
def swept(tmp_path_factory) -> Path:
    """A folder with the tiny sweep's file and its finished store."""
    folder = tmp_path_factory.mktemp("swept")
    assert debug_sweep(sweep_file(folder), folder / "store") == 0
    return folder


@pytest.fixture
def copy(swept, tmp_path) -> Path:
    """Return a copy of that folder, for tests that change it."""
    shutil.copytree(swept / "store", tmp_path / "store")
    return tmp_path
