"""The SLURM cluster that all tests of this folder share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cluster import Cluster, running, unsupported_reason


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Yield a private SLURM with SLURM_CONF exported. Where none is possible, fail in CI and skip elsewhere."""
    if reason := unsupported_reason():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with running() as cluster:
        yield cluster
