"""SLURM's own spellings of time and memory mean here what they mean there, in quotes and without."""

from __future__ import annotations

import math
from typing import Any

import pytest

from alignbench.config import UserError, decode, parse_yaml
from alignbench.experiment.resources import Resources, Slurm


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("1:30", 90), ("90:00", 5400), ("12:00:00", 43_200), ("120:00:00", 432_000), ("7-00", 604_800),
        ("0-12", 43_200), ("2-00:00:00", 172_800), ("1-12:30", 131_400), ("100-00", 8_640_000), ("0", math.inf),
        ("UNLIMITED", math.inf), ("infinite", math.inf), ("~", math.inf),
    ],
)  # fmt: skip
def test_times_are_those_of_slurm(text: str, seconds: float) -> None:
    """minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]; handed on as written."""
    for written in {text, f"'{text}'"} - {"'~'"}:
        resources = decode(Resources, parse_yaml(f"time: {written}", "c.yaml"), "c.yaml: ")
        assert resources.seconds == seconds
        assert resources.options().get("time") == (None if text == "~" else text)


@pytest.mark.parametrize("text", ["0", "16G", "16000M", "16000", "1t", "512GB"])
def test_memory_is_as_slurm_reads_it(text: str) -> None:
    """0 is all memory of a node, a bare number megabytes; handed on as written."""
    for written in (text, f"'{text}'"):
        resources = decode(Resources, parse_yaml(f"mem: {written}", "c.yaml"), "c.yaml: ")
        assert resources.options()["mem"] == text
        with pytest.raises(UserError, match=r"additional.mem-per-cpu: the setting mem says it, too"):
            decode(Resources, {"mem": resources.mem, "additional": {"mem-per-cpu": "2G"}}, "c.yaml: ")


@pytest.mark.parametrize(
    ("name", "value", "form"),
    [
        *(("time", value, "choose minutes, minutes:seconds") for value in ("12h", "1:2:3:4", "7-", 1.5, -1, True, [1])),
        *(("time", value, "choose minutes, minutes:seconds") for value in ("12:00:00\n", "-5", "", "\u0663")),
        *(("mem", value, "choose megabytes, a number with K, M, G or T") for value in ("1.5G", "16 G", "lots", -1, "")),
    ],
)
def test_other_forms_are_refused_with_those_that_exist(name: str, value: Any, form: str) -> None:
    """A form that SLURM does not know is refused when the file is read, not by sbatch."""
    with pytest.raises(UserError, match=f"^c.yaml: {name}: .*{form}"):
        decode(Resources, {name: value}, "c.yaml: ")


def test_a_stage_that_there_is_not_is_answered_with_those_that_there_are() -> None:
    """The keys of ``stages`` are listed, as the values of a setting are."""
    with pytest.raises(UserError, match=r"stages: invalid enum value 'training'; choose one of train, generate, score"):
        decode(Slurm, {"stages": {"training": {}}}, "x.yaml: slurm")
