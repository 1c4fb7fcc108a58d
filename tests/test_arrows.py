"""Who may import whom: the arrows of docs/design.md, kept by the syntax tree."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Every module imports from layers above its own only, whether at its top or inside a function.
LAYERS = (
    {"config", "stages", "stats", "grid", "hinge", "shapes.scene", "cost", "markup", "blockwise"},
    {"promptsets", "geneval"},
    {"prompts", "plugins", "weights", "method", "evaluator", "table", "shapes", "official"},
    {
        "flow",
        "spec",
        "store",
        "shapes.checker",
        "clip",
        "small",
        "backends.sit_network",
    },
    {"halves", "manifest", "score_tables"},
    {
        "checkpoint",
        "meter",
        "adapters",
        "policy",
        "nets",
        "run.code_snapshot",
        "slurm",
        "run.process_group",
        "shards",
        "small_backends",
        "adamw",
        "analysis",
        "run_state",
    },
    {"average", "results", "gallery", "references", "effects"},
    {"curves", "page"},
    {"plots"},
    {"train", "generate", "sweep", "report", "scoring", "run.provenance", "run.trackers", "backends.pipeline"},
    {
        "jobs",
        "testing",
        "backends.flux",
        "backends.sd3",
        "backends.flux2",
        "backends.sit",
        "rehearsal",
        "doctor",
        "embeddings",
    },
    {"estimate"},
    {"planning"},
    {"fitting"},
    {"run.task"},
    {"run.session"},
    {"run.train_stage", "run.image_stage", "run.score_stage"},
    {"run.worker"},
    {"run", "importers", "compare"},
    {"launch", "run.slurm_job", "authoring", "importing", "capabilities"},
    {"rerun", "gc"},
    {"cli"},
)
APART = ("shapes.build", "official.")  # makes the packaged files; scripts of other environments: not of the harness
METHODS = {"flow", "method", "policy", "nets", "config", "weights"}  # torch, and nothing else of ours
EVALUATORS = {"evaluator", "config", "weights", "clip", "official", "prompts", "shapes", "geneval", "evaluators"}
REPORTS = {"store", "table", "stats", "config", "reports"}
TORCHLESS = {
    "run.process_group",
    "cli",
    "authoring",
    "cost",
    "counted",
    "estimate",
    "planning",
    "fitting",
    "rehearsal",
    "launch",
    "run",
    "run.task",
    "run.session",
    "run.train_stage",
    "run.image_stage",
    "run.score_stage",
    "run.worker",
    "stages",
    "sweep",
    "spec",
    "store",
    "score_tables",
    "manifest",
    "run_state",
    "results",
    "plugins",
    "prompts",
    "config",
    "report",
    "page",
    "gallery",
    "references",
    "effects",
    "analysis",
    "curves",
    "plots",
    "run.code_snapshot",
    "run.provenance",
    "run.trackers",
    "slurm",
    "jobs",
    "small",
    "small_backends",
    "hinge",
    "scoring",
    "importers",
    "importing",
    "compare",
}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node: ast.AST, inside: bool = True) -> Iterator[str]:
    """Modules imported at run time; with ``inside`` also those imported within functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and child.module in ("alignbench", "alignbench.run"):
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield inner if (ROOT / inner.replace(".", "/")).with_suffix(".py").is_file() else child.module
        elif isinstance(child, ast.ImportFrom):
            yield child.module or ""
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        if inside or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, inside)


def ours(path: Path, inside: bool = True) -> set[str]:
    """Our own modules that a file imports, without the leading ``alignbench.``."""
    found = (name for name in imports(tree(path), inside) if name.startswith("alignbench."))
    return {name.removeprefix("alignbench.") for name in found}


def harness() -> dict[str, Path]:
    files = sorted((ROOT / "alignbench").rglob("*.py"))
    dotted = {".".join(path.relative_to(ROOT / "alignbench").with_suffix("").parts): path for path in files}
    named = {name.removesuffix(".__init__"): path for name, path in dotted.items()}
    return {n: p for n, p in named.items() if n not in ("__init__", "backends") and not n.startswith(APART)}


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def test_every_module_has_its_layer():
    """A new module is put somewhere in the order, on purpose."""
    assert harness().keys() == set().union(*LAYERS)


@pytest.mark.parametrize("module", sorted(set().union(*LAYERS)))
def test_the_harness_imports_downwards(module):
    """cli -> launch -> run -> train, generate, store -> method, flow, evaluator, meter, prompts -> config."""
    wrong = [name for name in ours(harness()[module]) if layer(name) >= layer(module)]
    assert not wrong, f"{module} imports {wrong}, which stand beside or above it"


def test_the_harness_knows_no_method_evaluator_or_report_by_name():
    """It finds them through plugins.py, as it finds a stranger's."""
    for module, path in harness().items():
        named = [name for name in ours(path) if name.startswith(("methods", "evaluators", "reports", "sweeps"))]
        assert not named, f"{module} imports {named}"


@pytest.mark.parametrize(
    ("folder", "allowed"), [("methods", METHODS), ("evaluators", EVALUATORS), ("reports", REPORTS)]
)
def test_what_stands_beside_the_harness_imports_little_of_it(folder, allowed):
    """methods: flow, method, policy, weights; evaluators: evaluator, what reads weights; reports: store, tables."""
    for path in sorted((ROOT / folder).glob("*.py")):
        wrong = {name for name in ours(path) if name.partition(".")[0] not in allowed}
        assert not wrong, f"{folder}/{path.name} imports {wrong}"


@pytest.mark.parametrize("folder", ["evaluators", "reports"])
def test_heavy_imports_stand_inside_functions(folder):
    """No evaluator or report imports torch at its top: naming one costs nothing."""
    for path in sorted((ROOT / folder).glob("*.py")):
        heavy = {name.partition(".")[0] for name in imports(tree(path), inside=False)}
        assert not heavy & {"torch", "transformers", "open_clip", "diffusers", "torchvision"}, path


def test_the_command_line_is_light():
    """What help, lists, status and report are made of imports no torch at its top, nor what does."""
    heavy = {"torch", "transformers", "diffusers", "accelerate", "open_clip"}
    beside = {
        "table",
        "markup",
        "text_table",
        "stats",
        "grid",
        "weights",
        "method",
        "evaluator",
        "official",
        "clip",
        "geneval",
        "promptsets",
        "small",
    }
    light = TORCHLESS | beside
    for module in light:
        path = harness()[module]
        assert not heavy & {name.partition(".")[0] for name in imports(tree(path), inside=False)}, module
        assert ours(path, inside=False) <= light, module
