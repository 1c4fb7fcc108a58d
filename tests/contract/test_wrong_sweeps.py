"""Wrong sweep files: whatever is written, the answer is one line that names the file, never a traceback."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_sweep import PLUGIN, SWEEP

from alignbench import weights
from alignbench.config import UserError, flatten, put
from alignbench.experiment.document import read
from alignbench.experiment.plan import draft
from alignbench.plugins import Registry, blamed
from alignbench.rehearsal import tiny_backends
from alignbench.rehearsal.sweep import rehearse

REGISTRY = Registry([PLUGIN])
START = SWEEP | {
    "overrides": [{"match": {"method": "last"}, "set": {"training.batch": 4, "method.steps": 3}, "reason": "to see"}],
    "slurm": {"time": "12:00:00", "mem": "16G", "stages": {"train": {"nodes": 2}}, "methods": {"last": {"time": 60}}},
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3.5, 1e30, 10**30, -(2**70), float("inf"), float("nan")),
    *("", " ", "a\n", "a/b", "../a", "\u0430", "12:00", "nul\0", "\ud800", "$x", "a" * 300, "1e-5", "shapes/tset"),
    *([], [1], ["a"], [[1]], [None], {}, {"name": ["last"]}, {"a": 1}, {"name": "last", "x": 1}, [{"name": {}}]),
)
TEXTS = (
    "[",
    "]",
    "{",
    "}",
    ":",
    "\t",
    "\0",
    "&a ",
    "*a ",
    "!!set ",
    "<<: ",
    "- ",
    "? ",
    "'",
    '"',
    "|",
    "\ufeff",
    "\r",
    "%",
)
HEADER, EXTRAS = (
    "extends: &e",
    ("extends: [tiny.yaml]", "extends: {a: b}", "extends: 3", "overrides+: []", "1: 2", "~: 1"),
)


def structures(rng: random.Random, count: int) -> Iterator[str]:
    """Yield sweeps in which one setting has another value, stands elsewhere, or has another name, or is left out."""
    paths = [path for path, _ in flatten(START)] + ["base", "cases", "cases[0]", "overrides[0]", "grid", "evaluation"]
    paths += ["base.training", "base.backend", "base.reward", "evaluation.protocol", "evaluation.evaluators", "slurm"]
    for _ in range(count):
        path, value = rng.choice(paths), copy.deepcopy(rng.choice(VALUES))
        data = copy.deepcopy(START)
        kind = rng.randrange(4)
        above, _, name = path.rpartition(".")
        if kind == 0:
            data = put(data, f"{above}.{name}x".lstrip("."), value, "") if "[" not in name else data
        elif kind == 1:
            data = put(data, path, START[rng.choice(sorted(START))], "")
        else:
            data = put(data, path, value, "")
        yield json.dumps(data, allow_nan=True).replace("Infinity", ".inf").replace("NaN", ".nan")


def spellings(rng: random.Random, count: int) -> Iterator[str]:
    """Yield sweeps whose text has characters too many, too few, or twice."""
    text = yaml.safe_dump(START, sort_keys=False)
    for _ in range(count):
        at, to = sorted(rng.randrange(len(text)) for _ in range(2))
        yield rng.choice(
            [
                text[:at] + rng.choice(TEXTS) + text[at:],
                text[:at] + text[to:],
                text[:to] + text[at:],
                text[:at] + rng.choice(TEXTS) * 3000,
                f"{rng.choice(EXTRAS)}\n{text}",
            ]
        )


def said(text: str, rehearsal: bool) -> str:
    """Return the error about a sweep; "" if it is accepted."""
    Path("tiny.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        document = read("tiny.yaml")
        draft(rehearse(document, Path("store")) if rehearsal else document, REGISTRY)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("mutations", [structures, spellings])
@pytest.mark.parametrize(
    ("count", "rehearsal"),
    [(60, False), pytest.param(1000, False, marks=pytest.mark.slow), pytest.param(500, True, marks=pytest.mark.slow)],
)
def test_a_wrong_sweep_is_one_line(mutations, count, rehearsal, tmp_path, monkeypatch):
    """Wrong sweeps, drawn with a seed, are each accepted or refused by a UserError that begins with the file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tiny_backends, "backend", lambda family, folder: {"model": "shapes"})
    errors = [said(text, rehearsal) for text in mutations(random.Random(count), count)]
    assert sum(map(bool, errors)) > count / 2
    assert [error for error in errors if error and not re.match(r"tiny\.yaml(:\d+)?: ", error)] == []


SOURCES = {  # what a plug-in does: (its code, what is said)
    "exits": ("sys.exit(3)", r"mine.py:3: cannot be imported: SystemExit: 3"),
    "looks up what is not there": ("{}['a']", r"mine.py:3: cannot be imported: KeyError: 'a'"),
    "calls itself": ("def f(): f()\nf()", r"mine.py:3: cannot be imported: RecursionError"),
    "has a null character": ("a\0b", r"mine.py:1: not valid Python"),
    "has no end": ("(" * 5000, r"mine.py:\d+: not valid Python"),
    "exits when made": ("    def __post_init__(self): sys.exit()", r"x.yaml: method: \S+mine.py:6: SystemExit"),
    "fails when asked for files": (
        "    def files(self): return {}['f']",
        r"x.yaml: \S+mine.py:6: KeyError: 'f'",
    ),
}


@pytest.mark.parametrize("what", SOURCES)
def test_a_plugin_that_fails_is_one_line(tmp_path, what):
    """Whatever its code raises, when imported, made or asked, is an error with its file and line."""
    body, line = SOURCES[what]
    imports, method = ("", body) if body.startswith(" ") else (body, "")
    source = f"from alignbench import AlignMethod\nimport sys\n{imports}\nclass M(AlignMethod):\n    name = 'mine'\n"
    (tmp_path / "mine.py").write_text(f"{source}{method}\n")

    def use() -> None:
        made = Registry([str(tmp_path / "mine.py")]).make("method", {"name": "mine"}, "x.yaml: method")
        with blamed(made.files, "x.yaml"):
            made.files()

    with pytest.raises(UserError, match=line):
        use()


@pytest.mark.parametrize("header", [b"[1]", b'{"a": 1}', b'{"a": {"data_offsets": []}}', b"3", b"[" * 9999, b"{'a'}"])
def test_a_safetensors_file_with_another_header_is_named(tmp_path, header):
    """A header that is not a table of tensors is refused with the file and the setting."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match=r"^method.weights: \S+a.safetensors cannot be read: "):
        weights.check([path], "method.weights")
