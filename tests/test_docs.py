"""README, docs and the headers of sweeps say what is true: commands parse, paths exist, numbers are computed."""

from __future__ import annotations

import ast
import csv
import itertools
import json
import re
import shlex
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from alignbench.cli.main import GROUPS, cli, main

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
TOPS = ("alignbench", "methods", "evaluators", "sweeps", "reports", "docs", "tests", "benchmarks", ".github")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
COST = r"about: (\S+) H100-hours of training[^,]*, (\S+) of evaluation"


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def header(path: Path) -> str:
    """Return the comment at the top of a sweep, without its marks."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text(path).splitlines())
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def commands() -> list[tuple[str, str]]:
    """Return (page, command) for each command line that is shown: in blocks, inline, and in the headers of sweeps."""
    found = []
    for path in [*PAGES, *SWEEPS]:
        page = header(path) if path.suffix == ".yaml" else text(path)
        blocks = [body for language, body in BLOCK.findall(page) if language in ("", "console")]
        lines = [*"\n".join([*blocks, *(page.splitlines() if path in SWEEPS else ())]).splitlines()]
        lines += INLINE.findall(BLOCK.sub("", page))
        for part in itertools.chain.from_iterable(re.split(r" && | \| ", line) for line in lines):
            if (said := part.strip().removeprefix("$ ")).startswith("alignbench "):
                found.append((path.name, re.sub(r"  +|[\[\]]", " ", said.partition(" #")[0]).strip()))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_parses(page, command):
    """Verb, options and their values are those of the command line; capitals stand for names."""
    name, *words = shlex.split(command)[1:]
    verb = cli.commands.get(name)
    if verb and not words:  # a mention
        return
    try:
        verb.make_context(name, words) if verb else cli.make_context("alignbench", [name, *words])
    except click.exceptions.Exit:
        pass  # --help, --completion
    except click.ClickException as error:
        pytest.fail(f"{page}: {command}: {error.format_message()}")


@pytest.mark.parametrize("command", sorted({said for _, said in commands() if re.match(r"alignbench ls\b", said)}))
def test_every_list_that_is_shown_is_printed(command, capsys):
    """``alignbench ls`` and its kinds end with 0 and print something."""
    assert main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out


def test_every_sweep_that_is_named_exists():
    """The word after ``sweep``, ``plan``, ``report``, ... is a packaged sweep, a file of the page, or capitals."""
    names = {path.stem for path in SWEEPS} | {f"sweeps/{path.name}" for path in SWEEPS}
    verbs = {"sweep", "plan", "fit", "validate", "report", "status", "retry", "cancel"}
    for page, command in commands():
        words = shlex.split(command)[1:]
        if words[0] in verbs and len(words) > 1 and not words[1].startswith("-") and not words[1].isupper():
            assert words[1] in names | {"mine", "my_sweep.yaml"}, f"{page}: {command}"


def shown_outputs() -> list[tuple[str, list[str]]]:
    """Return (command, lines of output) for every block that shows a command with its output."""
    blocks = [body for path in PAGES for language, body in BLOCK.findall(text(path)) if language == "console"]
    split = (block.removeprefix("$ ").splitlines() for block in blocks)
    return [(lines[0], [line for line in lines[1:] if line.strip() != "..."]) for lines in split]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "lines"), shown_outputs())
def test_outputs_that_are_shown_are_printed(command, lines, capsys, monkeypatch, tmp_path):
    """On a machine without weights, the output has the same words in the same order, whatever the spacing and rules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    main(shlex.split(command)[1:])
    printed = plain(capsys.readouterr().out)
    for line in lines:
        assert plain(line.removesuffix("...")) in printed


def plain(table: str) -> str:
    return " ".join(re.sub(r"[│┃|─━═┌┐└┘├┤┬┴┼╭╮╰╯]", " ", table).split())


def examples(page: str) -> dict[str, str]:
    """Return the Python blocks of a page that name their file in the first line."""
    return dict(re.findall(r"```python\n# (\S+)\n(.*?)```", text(DOCS / page), re.DOTALL))


def test_every_python_block_names_its_file():
    """Each block of Python names its file, so that the next test runs it; README's have a test of their own."""
    count = sum(language == "python" for path in DOCS.glob("*.md") for language, _ in BLOCK.findall(text(path)))
    assert count == len(examples("adding-a-method.md")) + len(examples("adding-an-evaluator.md")) == 4


@pytest.mark.slow
@pytest.mark.parametrize("page", ["adding-a-method.md", "adding-an-evaluator.md"])
def test_examples_pass_their_contracts(page, tmp_path):
    """The files of a page, written into an empty folder, pass with pytest alone."""
    for name, source in examples(page).items():
        (tmp_path / name).write_text(source, encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_and_path_exists(path):
    """Relative links from the page, and paths in backticks from the root; * is any name."""
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text(path))):
        if not re.match(r"https?:|#", link):
            assert (path.parent / link.partition("#")[0]).exists(), link
    own = (line for line in BLOCK.sub("", text(path)).splitlines() if "https://github.com" not in line)  # not others'
    for word in INLINE.findall("\n".join(own)):
        if re.fullmatch(rf"({'|'.join(map(re.escape, TOPS))})/[\w./*-]+", word):
            assert list(ROOT.glob(word.rstrip("/"))), word


def test_every_page_is_in_the_index_and_in_the_navigation():
    """docs/*.md, the links of docs/index.md and ``nav`` in mkdocs.yml are the same set."""
    pages = {path.name for path in DOCS.glob("*.md")}
    linked = set(re.findall(r"^\| \[[^]]+\]\((\S+\.md)\)", text(DOCS / "index.md"), re.MULTILINE))
    assert linked | {"index.md"} == pages
    assert set(re.findall(r"[\w-]+\.md", json.dumps(yaml.safe_load(text(ROOT / "mkdocs.yml"))["nav"]))) == pages


def test_three_places_run_the_same_checks():
    """Hooks before a commit run the commands of ``make lint``; the workflow runs the make targets of ``.ci/run``."""
    hooks = yaml.safe_load(text(ROOT / ".pre-commit-config.yaml"))["repos"][0]["hooks"]
    lint = re.search(r"(?m)^lint:.*\n((?:\t.*\n)+)", text(ROOT / "Makefile"))
    assert lint
    assert [hook["entry"] for hook in hooks] == re.findall(r"\$\(BIN\)/(.*)", lint[1])
    jobs = yaml.safe_load(text(ROOT / ".github" / "workflows" / "ci.yml"))["jobs"]
    targets = jobs["check"]["strategy"]["matrix"]["target"]
    assert sorted(targets) == sorted(set(re.findall(r"make ([\w-]+)", text(ROOT / ".ci" / "run"))))


# -- the tree ---------------------------------------------------------------------------------------------------------


def packages() -> set[str]:
    return {path.parent.name for path in (ROOT / "alignbench").glob("*/__init__.py")}


def contract() -> set[str]:
    """Return the modules that a plug-in imports: those in the root folder, and two packages that were modules."""
    return {path.stem for path in (ROOT / "alignbench").glob("*.py")} - {"__init__"} | {"prompts", "testing"}


def test_the_api_reference_is_the_contract():
    """Every module of the root folder has its section, and nothing else."""
    assert set(re.findall(r"(?m)^::: alignbench\.(\w+)", text(DOCS / "api.md"))) == contract()


def listed() -> list[str]:
    """Return the packages in the order of the table in docs/design.md."""
    return re.findall(r"(?m)^\| `(\w+)` \|", text(DOCS / "design.md").partition("## Where is what")[2])


def test_every_package_has_its_line():
    """docs/design.md and README's map list every package; README names each module of the contract."""
    assert sorted(listed()) == sorted(packages())
    tree = text(ROOT / "README.md").partition("## How it is built")[2]
    assert set(re.findall(r"(?m)^  (\w+)/ ", tree)) == packages() - {"prompts", "testing"}
    head = tree.partition("alignbench/ ")[2].partition("  shapes/")[0]
    assert contract() <= set(re.findall(r"\w+", head))


def test_packages_import_downwards_in_the_order_of_the_table():
    """docs/design.md: a package imports from packages further down only."""
    order = {name: place for place, name in enumerate(listed())}
    for name, place in order.items():
        for path in (ROOT / "alignbench" / name).rglob("*.py"):
            for other in imported(ast.parse(text(path))) & order.keys() - {name}:
                assert order[other] > place, f"{path.relative_to(ROOT)} imports {other}"


def imported(tree: ast.Module) -> set[str]:
    """Return the first part below ``alignbench`` of every import that runs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    nodes = list(ast.walk(tree))
    froms = [
        node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alignbench")
    ]
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names = [f"{node.module}.{alias.name}" for node in froms for alias in node.names] + plain
    return {name.split(".")[1] for name in names if name.startswith("alignbench.")}


def test_readme_shows_every_verb():
    """README shows the five main verbs in its first block, all others in the second."""
    shown = {command.split()[1] for page, command in commands() if page == "README.md"}
    assert {verb.name for group in GROUPS.values() for verb in group} <= shown


def lines(path: str) -> int:
    return len(text(ROOT / path).splitlines())


def test_line_counts():
    """design.md has the range and median of methods' lines; README and design.md the reading order's, to a hundred."""
    counts = sorted(len(text(path).splitlines()) for path in (ROOT / "methods").glob("*.py") if path.stem != "__init__")
    said = f"A method file has {counts[0]} to {counts[-1]} lines (median {statistics.median(counts):.0f})"
    assert said in text(DOCS / "design.md")
    order = ["alignbench/flow.py", "alignbench/method.py", "methods/leapalign.py", "alignbench/training/loop.py"]
    total = f"about {round(sum(map(lines, order)), -2):,} lines"
    for page in (ROOT / "README.md", DOCS / "design.md"):
        assert all(f"`{path}`" in text(page) for path in order)
        assert total in text(page)
    assert max(map(lines, order[:3])) < 300


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_readme_has_the_hours_of_the_sweeps():
    """README has the hours of each sweep's header; a slow test compares the headers with `alignbench plan`."""
    rows = re.findall(r"(?m)^\| (`[^|]+) \|[^|]+\| ([\d.]+ \+ [^|]+) \|$", text(ROOT / "README.md"))
    assert len(rows) > 10
    told = {}
    for names, hours in rows:
        words = INLINE.findall(names)
        each = [hours.removesuffix(" each")] * len(words) if hours.endswith("each") else hours.split(", ")
        told |= dict(zip(words, each, strict=True))
    found = {path.stem: re.search(COST, header(path).replace("\n", " ")) for path in SWEEPS}
    assert told == {name: f"{cost[1]} + {cost[2]}" for name, cost in found.items() if cost}


@pytest.mark.parametrize("name", ["quickstart", "shapes", "shapes_methods"])
def test_durations_are_the_same_everywhere(name):
    """README and the sweep's header give the same duration, in the same words."""
    said = re.search(r"(seven minutes|a quarter of an hour|about an hour|about ten minutes)", header(find(name)), re.I)
    assert said
    assert said[1].lower() in text(ROOT / "README.md").lower()


def find(name: str) -> Path:
    return ROOT / "sweeps" / f"{name}.yaml"


def table(name: str) -> dict[tuple[str, str], dict[str, str]]:
    """Return the rows of a committed report by (method, metric)."""
    with (ROOT / "reports" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return {(row["method"], row["metric"]): row for row in csv.DictReader(file)}


def test_readme_says_what_the_report_of_five_seeds_says():
    """Gains in GenEval, lenient and strict, with LeapAlign's intervals; all strict gains lie in the range named."""
    rows, page = table("shapes"), text(ROOT / "README.md")
    for method in ("DRTune", "ReFL", "DRaFT-LV", "DanceGRPO"):
        assert f"{method} by {float(rows[method, 'geneval']['change']):.3f}" in page
    for metric, before in (("geneval", "LeapAlign by "), ("geneval_strict", "strict gain, ")):
        mean, low, high = (float(rows["LeapAlign", metric][key]) for key in ("change", "change_lo", "change_hi"))
        assert f"{before}{mean:.3f} [{low:.3f}, {high:.3f}]" in page
    strict = [float(row["change"]) for (_, metric), row in rows.items() if metric == "geneval_strict" and row["change"]]
    assert f"the strict check by {min(strict):.2f} to {max(strict):.2f}" in page
    widths = {key[0]: float(r["change_hi"]) - float(r["change_lo"]) for key, r in rows.items() if r["change_lo"]}
    assert max(widths, key=widths.__getitem__) == "LeapAlign"


def test_readme_says_what_the_report_of_all_methods_says():
    """The number of trained rows, all of whose intervals exclude zero, and of those that Holm's correction leaves."""
    rows = [row for (_, metric), row in table("shapes_methods").items() if metric == "hpsv2.1" and row["change"]]
    left = sum(float(row["p_holm"]) < 0.05 for row in rows)
    assert all(float(row["change_lo"]) > 0 for row in rows)
    page = text(ROOT / "README.md")
    assert f"All {len(rows)} rows raise the reward" in page
    assert f"for {left} of them also after Holm's correction" in page


def test_readme_has_the_sizes_of_the_shapes_world():
    """Megabytes of each folder, and the number of prompts of each list."""
    assets, page = ROOT / "alignbench" / "shapes" / "assets", text(ROOT / "README.md")
    for part in ("model", "hpsv2", "pickscore"):
        size = sum(path.stat().st_size for path in (assets / part).rglob("*") if path.is_file())
        row = next(line for line in page.splitlines() if f"assets/{part}`" in line)
        assert float(row.split("|")[-2].split()[0]) == pytest.approx(size / 1e6, abs=0.15)
    train, val, test = (lines(f"alignbench/shapes/assets/prompts/{split}.jsonl") for split in ("train", "val", "test"))
    assert f"{train} training, {val} validation and {test} test prompts" in page


def measured(name: str) -> list[dict[str, Any]]:
    return json.loads(text(ROOT / "benchmarks" / "results" / f"{name}.json"))["rows"]


def test_readme_has_the_figures_of_the_gpu():
    """Images a second of evaluators and their packages; seconds, gigabytes and samples of LeapAlign."""
    page = text(ROOT / "README.md")
    speed = {(row["evaluator"], row["calls"]): row for row in measured("evaluators-real-gpu")}
    hps = [speed["hpsv2", f"per {unit}, as it is"] for unit in ("prompt", "image")]
    assert f"HPSv2.1 scores {hps[0]['alignbench']:.0f} images a second" in page
    assert f"{hps[0]['images_per_second']:.1f} (one call per prompt) or {hps[1]['images_per_second']:.1f} (one" in page
    reward = [speed["imagereward", f"per {unit}"] for unit in ("prompt", "image")]
    theirs = statistics.mean(row["images_per_second"] for row in reward)
    assert f"ImageReward scores {reward[0]['alignbench']:.0f}, its package {theirs:.0f}" in page
    card = {row["what"]: row for row in measured("gpu-h200")}
    one, fast = card["LeapAlign, 720 px, batch 1"], card["LeapAlign, 720 px, batch 1, compiled"]
    assert f"takes {one['value']:.1f} s and {one['peak_GB']:.0f} GB for a batch of one ({fast['value']:.1f} s" in page
    assert f"and {card['largest batch tried that fits, LeapAlign, 720 px']['value']} samples at once fit" in page


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    """Each piece of a message between the names and numbers that vary stands in a string of the source."""
    folders = [ROOT / name for name in ("alignbench", "methods", "evaluators")]
    source = "\n".join(strings(path) for folder in folders for path in folder.rglob("*.py"))
    messages = re.findall(r"(?m)^\| (?:status `stale`, )?`([^`]*)` ?\|", text(DOCS / "troubleshooting.md"))
    assert len(messages) > 20
    for message in messages:
        for piece in filter(lambda piece: len(piece) > 5, re.split(r"…|'", message)):
            assert piece.strip(" ;:.") in source, f"{message}: {piece}"


def strings(path: Path) -> str:
    """Return every string of a module; … stands for what is filled in."""
    tree = ast.parse(text(path))
    joined = (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr))
    whole = ["".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values) for node in joined]
    return "\n".join(
        whole + [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    )
