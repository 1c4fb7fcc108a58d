"""The cluster that all tests of this folder share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cluster import Cluster, running, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A SLURM of the tests' own, SLURM_CONF exported. Where there can be none CI fails, others are told why."""
    if reason := why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with running() as found:
        yield found
