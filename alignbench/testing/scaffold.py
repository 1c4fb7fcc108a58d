"""Commands for authors of methods: write a first file, and check promise by promise what training relies on."""

from __future__ import annotations

import importlib.util
import inspect
import keyword
import re
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignbench.config import UserError, did_you_mean, parse_assignment
from alignbench.plugins import Registry

LONGEST = 40  # letters of a name, so that lines with it stay short
METHOD = '''\
"""CLASS: the idea in one sentence (authors, title, arXiv id).

Write it in the order and letters of the paper. Departures, each with its consequence:
1. None yet: this is DRaFT-K (arXiv 2309.17400), to be replaced by your own method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from alignbench.flow import integrate
from alignbench.method import Loss, Pathwise, require, reward_loss

if TYPE_CHECKING:
    from alignbench.evaluator import Reward
    from alignbench.flow import Batch, Flow


class CLASS(Pathwise):
    """The gradient flows through the last ``k`` steps of the sampler, exactly."""

    name: ClassVar[str] = "NAME"
    k: int = 1  # steps with gradient

    def check(self, batch: int, differentiable: bool) -> None:
        super().check(batch, differentiable)
        what = f"{self.k} of {self.steps} sampler steps"
        choose = f"choose 1 to {self.steps}"
        require(1 <= self.k <= self.steps, "method.k", what, choose)

    def loss(self, flow: Flow, reward: Reward, batch: Batch) -> Loss:
        t, c = flow.sigmas(self.steps), batch.cond
        start = self.steps - self.k
        x = integrate(flow, batch.noise, t[: start + 1], c)  # no gradient
        x_0 = integrate(flow, x, t[start:], c, grad=True)
        return reward_loss(flow, reward, batch, x_0)
'''
TEST = '''\
"""CLASS keeps its promises. Add tests of closed forms and special cases."""

from alignbench.testing import MethodContract

from NAME import CLASS


class TestCLASS(MethodContract):
    method = CLASS(steps=5)
'''


def new_method(name: str, folder: Path) -> list[Path]:
    """Write ``NAME.py`` and ``test_NAME.py``, a working method and its test, into ``folder``. Return their paths.

    Raise UserError, and write nothing, if the name is not an identifier or is taken, or if a file exists.
    """
    cls = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    _check_name(name, cls)
    files = {f"{name}.py": METHOD, f"test_{name}.py": TEST}
    for file in files:
        if (folder / file).exists():
            raise UserError(f"{folder / file}: already exists; choose another name, or remove it")
    if importlib.util.find_spec(name) is not None:
        raise UserError(f"NAME: Python already has a module '{name}'; choose another name")
    for file, text in files.items():
        try:
            (folder / file).write_text(text.replace("CLASS", cls).replace("NAME", name), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folder / file}: cannot be written: {error.strerror}; go to another folder") from None
    return [folder / file for file in files]


def _check_name(name: str, cls: str) -> None:
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or keyword.iskeyword(name) or len(name) > LONGEST:
        what = f"'{name}' cannot name a file and a class"
        raise UserError(f"NAME: {what}; choose at most {LONGEST} letters, digits and underscores, as in my_method")
    known = Registry()
    if name in known.names("method"):
        raise UserError(
            f"NAME: the method '{name}' already exists in {known.entry('method', name, '').path}; choose another name"
        )
    if cls in re.findall(r"\w+", METHOD.replace("CLASS", "")) or keyword.iskeyword(cls):
        raise UserError(f"NAME: the class would be called {cls}, which is already in use; choose another name")


class Verdict(NamedTuple):
    """The result for one promise."""

    promise: str  # as a sentence
    reason: str = ""  # why it is broken, as a sentence; empty if it is kept
    details: str = ""  # the traceback

    def __str__(self) -> str:
        """Return the line that ``check-method`` prints."""
        return f"FAILED {self.promise}: {self.reason}" if self.reason else f"ok     {self.promise}"


def check_methods(path: str, assignments: Sequence[str] = ()) -> Iterator[tuple[str, Iterator[Verdict]]]:
    """Yield the name of every method in the plug-in file ``path``, with an iterator of its verdicts.

    ``assignments``: settings, such as ``steps=5``. Raise UserError if the file has no method, or no method the setting.
    """
    registry, own = Registry([path]), Path(path).resolve()
    names = [entry.name for entry in registry.entries.values() if entry.kind == "method" and entry.path == own]
    if not names:
        raise UserError(f"{path}: has no method: no class derives from AlignMethod and sets name = '...'")
    settings = dict(parse_assignment(assignment) for assignment in assignments)
    fields = {name: registry.get("method", name, path).__struct_fields__ for name in names}
    known = sorted(set().union(*fields.values()))
    for odd in settings.keys() - set(known):
        raise UserError(f"--settings {odd}: no method of {path} has it{did_you_mean(odd, known, 'settings')}")
    made = [_made(registry, name, {k: v for k, v in settings.items() if k in fields[name]}) for name in names]
    for method in made:  # only now: nothing is run if the request is wrong
        yield method.name, _verdicts(method)


def _made(registry: Registry, name: str, settings: dict[str, Any]) -> Any:
    try:
        return registry.make("method", {"name": name, **settings}, name)
    except UserError as error:
        raise UserError(f"{error}; set it with --settings 'name=value'") from None


def _verdicts(method: Any) -> Iterator[Verdict]:
    if not method.trains:
        yield Verdict("It trains nothing, so nothing else is promised")
        return
    from alignbench.testing import MethodContract

    contract = MethodContract()
    contract.method = method
    for name in vars(MethodContract):
        if name.startswith("test_"):
            yield _verdict(getattr(contract, name))


def _verdict(test: Any) -> Verdict:
    promise = re.split(r"\.\s", inspect.getdoc(test) or test.__name__)[0].rstrip(".").replace("``", "")
    with tempfile.TemporaryDirectory() as folder:
        try:
            test(**({"tmp_path": Path(folder)} if "tmp_path" in inspect.signature(test).parameters else {}))
        except Exception as error:  # whatever the author's code raises
            said = " ".join(str(error).split())[:300]
            kind = "" if isinstance(error, AssertionError | UserError) and said else type(error).__name__
            return Verdict(promise, ": ".join(filter(None, [kind, said])), f"\n{traceback.format_exc()}")
    return Verdict(promise)
