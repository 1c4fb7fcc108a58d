"""The command line is light, and answers bad input with one clear line before a model is loaded or a file written."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
from support.tiny_sweep import PLUGIN, SWEEP, alignbench, sweep_file

from alignbench.cli import main
from alignbench.cli.main import GROUPS, cli
from alignbench.plugins import Registry
from alignbench.prompts import load_prompts

EMPTY_LINE = "a photo of a circle\n\na photo of a square\n"


def case(**method: Any) -> dict[str, Any]:
    return {"cases": [SWEEP["cases"][0], {"label": "Mine", "method": method}]}


def base(**parts: Any) -> dict[str, Any]:
    return {"base": parts}


def prompts(file: str) -> dict[str, Any]:
    return {"evaluation": {"protocol": {"prompts": file}, "evaluators": [{"name": "bright"}]}}


def override(**parts: Any) -> dict[str, Any]:
    return {"overrides": [{"match": {"method": "last"}, **parts}]}


BAD = {  # what is wrong: (changes to the sweep, the line)
    "a misspelt key": (
        case(name="leapalign", alhpa=0.3),
        r"tiny.yaml: cases\[1\].method.alhpa: leapalign has no such setting; did you mean 'alpha'\? \(settings: steps,",
    ),
    "a misspelt key of training": (
        base(training={"optimizer": {"learning_rate": 1}}),
        r"tiny.yaml: base.training.optimizer.learning_rate: optimizer has no such setting .*lr",
    ),
    "a misspelt section": ({"evalution": {}}, "tiny.yaml: evalution: sweep has no such .* did you mean 'evaluation'"),
    "an unknown method": (
        case(name="leapaling"),
        r"tiny.yaml: cases\[1\].method.name: there is no method 'leapaling'; did you mean 'leapalign'\? \(methods: ",
    ),
    "a method without a name": (case(alpha=0.3), r"cases\[1\].method: expected settings with a 'name' \(methods: "),
    "an unknown evaluator": (
        {"evaluation": {"evaluators": [{"name": "hpsv4"}]}},
        r"evaluation.evaluators\[0\].name: there is no evaluator 'hpsv4'; did you mean 'hpsv3'",
    ),
    "an unknown backend": (base(backend={"name": "flx"}), "base.backend.name: there is no backend 'flx'; did you mean"),
    "a float for an integer": (
        base(training={"batch": 2.5}),
        r"tiny.yaml: base.training.batch: expected a whole number, got float \(2.5\)",
    ),
    "a float for a method's integer": (
        case(name="last", steps=2.0),
        r"method.steps: expected a whole number, got float",
    ),
    "text for a number": (base(training={"batch": "8"}), r"batch: expected a whole number, got text \('8'\)"),
    "an impossible batch": (base(training={"batch": 0}), r"base.training.batch: expected a whole number >= 1 \(0\)"),
    "two budgets": (
        base(training={"budget": {"images": 8, "nfe": 100}}),
        "budget: set exactly one of images, nfe, gpu_seconds, updates; got images and nfe",
    ),
    "no budget": (base(training={"budget": {"images": None}}), "set exactly one of .*; got none"),
    "a model that is not there": (
        base(backend={"model": "nowhere/at/all"}),
        "there is no file or folder 'nowhere/at/all'",
    ),
    "weights that are not there": (
        {"evaluation": {"evaluators": [{"name": "hpsv2", "weights": "./none.pt"}]}},
        r"evaluation.evaluators\[0\]: hpsv2.weights: there is no file or folder './none.pt'",
    ),
    "weights that cannot be read": (
        {"evaluation": {"evaluators": [{"name": "hpsv2", "weights": "broken.pt"}]}},
        r"hpsv2.weights: broken.pt cannot be read: not a torch.save",
    ),
    "an unequal batch": (
        override(set={"training.batch": 4}),
        r"tiny.yaml: overrides\[0\]: training.batch would be unequal between rows; say why with 'reason: ...'",
    ),
    "an unequal budget": (
        override(set={"training.budget.images": 4}, reason="  "),
        r"overrides\[0\]: training.budget.images would be unequal between rows; say why",
    ),
    "a batch in a case": (
        {"cases": [{"label": "Mine", "method": {"name": "last"}, "training": {"batch": 4}}]},
        r"cases\[0\].training: rows would be unequal; .* under 'overrides' with a reason",
    ),
    "an exception without a reason": (
        override(set={"training.optimizer.lr": 0.1}),
        r"overrides\[0\]: an exception needs a reason",
    ),
    "a misspelt override": (
        override(set={"training.bacth": 4}, reason="why not"),
        r"overrides\[0\].set: training.bacth: training has no such setting; did you mean 'batch'",
    ),
    "an override that matches no run": (
        {"overrides": [{"match": {"method": "lats"}, "set": {"training.batch": 4}, "reason": "x"}]},
        r"overrides\[0\].match.method: there is no 'lats'; did you mean 'last'",
    ),
    "a misspelt grid": ({"grid": {"training.sede": [0]}}, "grid: training.sede: training has no such .* 'seed'"),
    "two rows of one name": (
        {"cases": [{"label": "A", "method": {"name": "last"}}, {"label": "A", "method": {"name": "stopped"}}]},
        r"cases\[0\] 'A' and cases\[1\] 'A' read alike, .*; give each case its own label",
    ),
    "an untrained and a trained row of one name": (
        {"cases": [{"label": "A", "method": {"name": "base"}}, {"label": "A", "method": {"name": "last"}}]},
        r"cases\[0\] 'A' and cases\[1\] 'A' read alike",
    ),
    "two rows whose names look alike": (
        {
            "cases": [
                {"label": "A B", "method": {"name": "last"}},
                {"label": "a\u200b \u00a0B ", "method": {"name": "base"}},
            ]
        },
        r"cases\[0\] 'A B' and cases\[1\] .* read alike",
    ),
    "a row named like another's run": (
        {"cases": [{"label": "A", "method": {"name": "last"}}, {"label": "A, seed 1", "method": {"name": "base"}}]},
        r"cases\[0\] 'A' and cases\[1\] 'A, seed 1' read alike",
    ),
    "a seed twice": ({"grid": {"training.seed": [0, 0]}}, "two runs are called 'Last, seed 0'"),
    "a size that does not fit": (
        {"evaluation": {"protocol": {"size": 33}}},
        r"protocol.size: 33 pixels are not a multiple",
    ),
    "last weights without an average": (
        base(training={"optimizer": {"ema": None}}),
        "evaluation.protocol.weights: 'ema', but Last keeps no average",
    ),
    "a reward without gradient": (
        base(reward={"evaluator": {"name": "geneval", "detector": "shapes"}}) | case(name="refl"),
        "Mine: reward: refl needs the gradient of the reward",
    ),
    "prompts that are not there": (
        prompts("none.txt"),
        r"tiny.yaml: evaluation.protocol.prompts: 'none.txt': cannot be read: No such file",
    ),
    "prompts with an empty line": (
        prompts("empty_line.txt"),
        r"empty_line.txt:2: the prompt is empty; remove the line",
    ),
    "prompts with a pipe": (
        prompts("pipe.txt"),
        r"pipe.txt: prompt 2: the model's text encoder has no token for '\|' in 'a red \| circle'",
    ),
    "prompts with an emoji": (
        prompts("emoji.txt"),
        r"emoji.txt: prompt 1: the model's text encoder has no token for '🔴'",
    ),
    "prompts in two columns": (
        prompts("two.csv"),
        r"prompts: two.csv:1: prompts may be in 'prompt' or 'text'",
    ),
    "prompts that are not UTF-8": (prompts("latin.txt"), "latin.txt: not UTF-8 text"),
    "prompts that geneval cannot check": (
        {"evaluation": {"protocol": {"prompts": "fine.txt"}}},
        r"evaluation.evaluators\[1\]: geneval: prompt .* has no GenEval metadata",
    ),
}
FILES = {
    "empty_line.txt": EMPTY_LINE.encode(),
    "pipe.txt": b"a photo of a circle\na red | circle\n",
    "emoji.txt": "a photo of a 🔴\n".encode(),
    "two.csv": b"prompt,text\na photo of a circle,a circle\n",
    "latin.txt": "a photo of a caf\xe9".encode("latin-1"),
    "fine.txt": b"a photo of a circle\n",
    "broken.pt": b"these are no weights",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a folder with the bad files as working directory. Loading a model fails the test."""
    from alignbench.backends.flux import Flux

    def load(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Flux, "load", load)
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def refused(capsys, store: Path, *words: str, plugin: bool = True) -> str:
    """Assert that a command fails with one line and writes nothing, and return that line."""
    code = alignbench(*words, store=store, plugin=plugin)
    output = capsys.readouterr()
    assert code == 1
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("alignbench: ")
    assert not store.is_dir()
    return output.err


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(what, folder, capsys):
    """Each mistake in a sweep file gives exit code 1 and one line with its place; no store is made, no model loaded."""
    changes, line = BAD[what]
    sweep_file(folder, changes)
    assert re.search(line, refused(capsys, folder / "store", "sweep", "tiny.yaml"))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["training.bacth=3"], "command line: training.bacth: training has no such setting; did you mean 'batch'"),
        (
            ["trainning.batch=3"],
            "command line: trainning.batch: there is no setting 'trainning'; did you mean 'training'",
        ),
        (["method.alhpa=3"], "command line: method.alhpa: no method of this sweep has it"),
        (["training.batch=2.5"], r"command line: training.batch: expected a whole number, got float \(2.5\)"),
        (["cases[9].label=x"], r"command line: cases\[9\].label: there is no item \[9\]"),
        (["batch"], "command line: name one sweep, got tiny.yaml, batch"),
        (["--only", "method=lst"], r"--only method=lst: matches no run \(rows: Base, Last\)$"),
        (["--only", "method=last", "training.batch=3"], r"matches no run .*; settings to change go before --only$"),
        (["--launcher", "locl"], "there is no launcher 'locl'; did you mean 'local'"),
        (["--limit", "0"], "'0' is not a whole number of 1 or more"),
        (["-j", "two"], "'two' is not a whole number"),
        (["--seeds", "a"], "grid: training.seed: expected a whole number, got text"),
        (
            ["--sotre", "x"],
            r"there is no option '--sotre'; did you mean '--store'\? \(see `alignbench sweep --help`\)$",
        ),
        (["--store", "--limit", "2"], "--store: its value DIR is missing"),
        (["-j"], "-j: its value N is missing"),
        (["--limit=2=3"], "--limit: '2=3' is not a whole number"),
        (["--plugin", "none.py"], "none.py: cannot be read: No such file"),
        (["--plugin", "fine.txt"], "fine.txt:1: not valid Python"),
    ],
)
def test_a_mistake_on_the_command_line(words, line, folder, capsys):
    """The same holds for options and a.b=c."""
    sweep_file(folder)
    assert re.search(line, refused(capsys, folder / "store", "sweep", "tiny.yaml", *words))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("schema: 1\nname: x\nname: y\n", r"tiny.yaml:3: the key 'name' is already set on line 2"),
        ("schema: 1\n  name: x\n", r"tiny.yaml:2: "),
        ("schema: 2\nname: x\n", r"tiny.yaml: "),
        ("", "tiny.yaml: expected settings"),
    ],
)
def test_a_file_that_is_not_a_sweep(text, line, folder, capsys):
    """YAML mistakes are reported with their line number."""
    (folder / "tiny.yaml").write_text(text)
    assert re.search(line, refused(capsys, folder / "store", "sweep", "tiny.yaml"))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("x = 1\n", "no class in it derives from AlignMethod, Evaluator or PipelineBackend and sets"),
        (
            "import nowhere_at_all\nfrom alignbench import AlignMethod\nclass M(AlignMethod):\n    name = 'last'\n",
            "nowhere",
        ),
        ("from alignbench import AlignMethod\nclass M(AlignMethod):\n    name = 'refl'\n", "'refl' already exists in"),
    ],
)
def test_a_plugin_that_is_broken(source, line, folder, capsys):
    """The error names the file if it has no class, its import fails, or a name is taken."""
    (folder / "mine.py").write_text(source)
    sweep_file(folder, {"base": {"reward": {"evaluator": {"name": "hpsv2", "weights": "shapes"}}}})
    words = ["sweep", "tiny.yaml", "--plugin", "mine.py"]
    said = refused(capsys, folder / "store", *words, plugin=False)
    assert "mine.py:" in said
    assert line in said


@pytest.mark.parametrize("verb", ["sweep", "plan", "validate", "status", "report"])
def test_a_store_that_cannot_be_used(verb, folder, capsys):
    """A file in place of the store gives one line, whatever the verb, and stays as it was."""
    sweep_file(folder)
    (folder / "store").write_text("mine")
    words = ["tiny.yaml"] if verb in ("status", "report") else ["tiny.yaml", "--plugin", PLUGIN]
    said = refused(capsys, folder / "store", verb, *words, plugin=False)
    assert "cannot be used, it is a file; name a folder" in said
    assert (folder / "store").read_text() == "mine"


def test_plan_and_validate_write_nothing(folder, capsys):
    """They show what would be done and leave no trace."""
    sweep_file(folder)
    assert alignbench("validate", "tiny.yaml", store=folder / "store") == 0
    assert "fine; 3 runs, 4 prompts, scored by bright, geneval" in capsys.readouterr().out
    assert alignbench("plan", "tiny.yaml", "--only", "method=last", store=folder / "store") == 0
    out = capsys.readouterr().out
    assert re.search(r"Last, seed 0 +planned +8 +1 \+ 1 ", out)
    assert "2 runs: 2 to train, 2 image sets to make, 4 scores to compute" in out
    assert not (folder / "store").exists()


def test_ls_shows_what_can_be_named(capsys):
    """It lists built-ins and plug-ins, each with the first line of its docstring."""
    assert alignbench("ls") == 0
    out = capsys.readouterr().out
    for word in ("leapalign", "dancegrpo", "geneval", "flux", "shapes/test", "quickstart", "bright", "The mean of all"):
        assert word in out
    assert alignbench("ls", "methods") == 0
    out = capsys.readouterr().out
    assert "flux" not in out
    assert re.search(r"(?m)^  leapalign +LeapAlign \(arXiv 2604.15311, CVPR 2026\): Gradient through leaps", out)


@pytest.mark.slow
def test_every_built_in_method_has_its_full_name_and_its_paper():
    """Each class has both, and the docstring of the method's file names the paper."""
    entries = [entry for entry in Registry().entries.values() if entry.kind == "method"]
    assert len(entries) == 17
    for entry in entries:
        assert entry.title
        assert entry.title in entry.about
        head = (ast.get_docstring(ast.parse(entry.path.read_text())) or "").partition("epartures")[0]
        assert all(paper in head for paper in re.findall(r"arXiv \S+\b", entry.paper))
    assert {entry.name for entry in entries if not entry.paper} == {"base", "bptt", "checkpoint"}


def test_the_light_verbs_import_no_torch(tmp_path):
    """help, ls and status run without torch, transformers or diffusers; for report, see test_report.py."""
    code = (
        "import sys; from alignbench.cli import main; main(['--help'])\n"
        f"main(['ls', '--plugin', {PLUGIN!r}]); main(['status', '--store', {str(tmp_path)!r}])\n"
        f"main(['report', 'quickstart', '--store', {str(tmp_path)!r}])\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'accelerate', 'open_clip'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: alignbench" in done.stdout


def test_help_is_fast():
    """It takes less than 0.3 s of processor time, including the start of the interpreter."""
    code = "import resource, subprocess, sys; subprocess.run([sys.executable, '-m', 'alignbench.cli', '--help']);"
    code += "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)]
    assert min(float(out.splitlines()[-1]) for out in runs) < 0.3


@pytest.mark.parametrize("verb", cli.commands)
def test_every_verb_has_help(verb, capsys):
    """`alignbench VERB --help` exits with 0, says what the verb does, and names every option and positional."""
    assert main([verb, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (cli.commands[verb].help or "").split()[0] in said
    for option in cli.commands[verb].params:
        for name in option.opts if isinstance(option, click.Option) else [option.make_metavar(click.Context(cli))]:
            assert name in said


def test_every_verb_is_in_one_group(capsys):
    """The groups of `alignbench --help` list every verb exactly once, each on a line with its description."""
    grouped = [verb.name or "" for verbs in GROUPS.values() for verb in verbs]
    assert sorted(grouped) == sorted(cli.commands)
    assert len(set(grouped)) == len(grouped) == 19
    assert grouped[:5] == ["sweep", "status", "report", "plan", "ls"]
    assert main(["--help"]) == 0
    assert re.findall(r"(?m)^  ([a-z][\w-]+)  +\w", capsys.readouterr().out) == grouped


def test_the_version_is_printed(capsys):
    """`alignbench --version` prints the installed version."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"alignbench {version('alignbench')}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["swep", "x"], r"there is no verb 'swep'; did you mean 'sweep'\? \(see `alignbench --help`\)"),
        (["xyz"], r"there is no verb 'xyz' \(see `alignbench --help`\)"),
        ([], r"name a verb, for instance sweep \(see `alignbench --help`\)"),
        (["--completion", "bsh"], "--completion: there is no 'bsh'; did you mean 'bash'"),
        (["sweep"], r"SWEEP \[a.b=c\]...: is missing \(see `alignbench sweep --help`\)"),
        (["run"], "--method: is missing"),
        (["score", "x"], "-e/--evaluators: is missing"),
        (["fit", "--parallel", "dp"], "--parallel: there is no 'dp'; did you mean 'ddp'"),
        (
            ["ls", "method"],
            r"KIND\]: there is no 'method'; did you mean 'methods'\? \(choose from: methods, evaluators",
        ),
        (["compare", "a", "b", "c"], "unexpected extra argument"),
        (["status", "--plugin", "x"], "there is no option '--plugin'"),
        (["logs", "-f=1", "x"], r"-f: takes no value; leave out '=1' \(see `alignbench logs --help`\)"),
        (["logs", "x", "--follow=yes"], "--follow: takes no value; leave out '=yes'"),
        (["compare", "a", "-e", "x", "b", "-e", "y"], "-e: is given twice; give it once, as -e M,N"),
        (["compare", "a", "-e", "x", "b", "--evaluators=y"], "--evaluators: is given twice"),
        (["plan", "quickstart", "--limit", "²"], "--limit: '²' is not a whole number"),
        (["plan", "quickstrat"], "quickstrat: there is no such file, .*; did you mean 'quickstart'"),
        (["plan", ""], "'': there is no such file"),
        (["plan", "nothing.yaml"], "nothing.yaml: cannot be read: No such file"),
        (["run", "--method", ""], r"quickstart: cases.*label: wrong form \(''\); choose a name for the row"),
        (["sweep", "quickstart", "--wait"], "--wait: --launcher local ignores it"),
        (["sweep", "quickstart", "--slurm", "x"], "--slurm: --launcher local ignores it"),
        (
            ["plan", "quickstart", "--seeds", str(2**64)],
            r"quickstart: grid.training.seed\[0\]: a whole number of 65 bits; choose one of at most 63",
        ),
    ],
)
def test_a_mistake_in_the_words_gives_one_line(words, line, capsys):
    """Unknown or missing verbs, arguments and options give exit code 1 and one line, with the nearest name."""
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(rf"alignbench: .*{line}.*\n", said.err)


def test_options_and_settings_mix_in_any_order(folder, capsys):
    """Settings may come before, between and after options; --only takes all words up to the next option, repeatedly."""
    sweep_file(folder)
    lines = []
    for words in (
        ["tiny.yaml", "training.batch=1", "--only", "method=last", "seed=0", "--limit=2", "--gpu", "h200"],
        ["--gpu=h200", "training.batch=1", "--limit", "2", "tiny.yaml", "--only", "method=last", "--only=seed=0"],
    ):
        assert alignbench("plan", *words, store=folder / "store") == 0
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1]
    assert "1 runs: 1 to train, 1 image sets to make, 2 scores to compute" in lines[0]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_printed(shell, capsys):
    """`alignbench --completion SHELL` prints the script, and the line that installs it."""
    assert main(["--completion", shell]) == 0
    said = capsys.readouterr().out
    assert "_ALIGNBENCH_COMPLETE" in said
    assert f"alignbench --completion {shell}" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sw"], ["sweep"]),
        (["report", "quick"], ["quickstart"]),
        (["run", "--method", "leap"], ["leapalign"]),
        (["sweep", "quickstart", "--launcher", "s"], ["slurm"]),
        (["plan", "--rehe"], ["--rehearse"]),
        (["logs", "1"], ["1a2b"]),
        (["ls", "m"], ["methods"]),
    ],
)
def test_bash_completes(words, expected, tmp_path, capsys):
    """In a real bash, Tab after `alignbench sw` gives sweep; sweeps, methods, runs and options complete, too."""
    (tmp_path / "store/runs/1a2b").mkdir(parents=True)
    assert main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "alignbench").write_text(f'#!/bin/sh\nexec {sys.executable} -m alignbench.cli "$@"\n')
    (tmp_path / "alignbench").chmod(0o755)
    ask = f"COMP_WORDS=(alignbench {' '.join(words)}); COMP_CWORD={len(words)}; _alignbench_completion ./alignbench"
    show = "printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}\n{show}"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (expected, "")


@pytest.mark.parametrize("words", [["gc"], ["rerun", "x"], ["compare", "a", "b"], ["logs", "x"]])
def test_a_file_is_not_a_store(words, tmp_path, capsys):
    """Verbs without a sweep refuse a file as the store, too."""
    (tmp_path / "store").write_text("mine")
    assert main([*words, "--store", str(tmp_path / "store")]) == 1
    assert re.fullmatch(r"alignbench: --store .* it is a file; name a folder\n", capsys.readouterr().err)


@pytest.mark.parametrize("words", ["--help", "ls"])
def test_output_that_cannot_be_written_is_one_line(words):
    """Standard output on a full disk: exit code 1, and one line that says so."""
    done = subprocess.run(
        f"{sys.executable} -m alignbench.cli {words} > /dev/full",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "the output cannot be written: No space left on device" in done.stderr


def test_a_closed_output_is_not_a_failure():
    """`alignbench ls >&-` gives exit code 0 and nothing on stderr."""
    ls = f"{sys.executable} -m alignbench.cli ls >&-"
    done = subprocess.run(["bash", "-c", ls], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_stops_early_is_not_a_failure():
    """`alignbench ls | head -1` gives exit code 0 and nothing on stderr."""
    ls = f"set -o pipefail; {sys.executable} -m alignbench.cli ls | head -1"
    done = subprocess.run(["bash", "-c", ls], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "methods:\n", "")


def test_a_sweep_whose_reader_stops_early_is_interrupted(tmp_path):
    """`alignbench sweep ... 2>&1 | head -1` does not say that everything is done."""
    words = (
        f"{sys.executable} -m alignbench.cli sweep {sweep_file(tmp_path)} --plugin {PLUGIN} --store {tmp_path / 's'}"
    )
    command = f"set -o pipefail; {words} --launcher debug 2>&1 | true"
    assert subprocess.run(["bash", "-c", command]).returncode == 130


def test_a_store_that_may_only_be_read_has_a_status(tmp_path, monkeypatch, capsys):
    """Who may not write to a colleague's store sees what is done, and the logs."""
    path = sweep_file(tmp_path)
    (tmp_path / "store").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert alignbench("sweep", path, store=tmp_path / "store") == 1
    assert "is not writable; choose another folder" in capsys.readouterr().err
    assert alignbench("status", store=tmp_path / "store", plugin=False) == 0
    assert "no sweep was run" in capsys.readouterr().out
    assert alignbench("logs", "last", store=tmp_path / "store", plugin=False) == 1
    assert "there is no such run" in capsys.readouterr().err


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompts_id_depends_on_its_text_alone(tmp_path):
    """The id, and hence the noise, is the same at any position and in any format of file."""
    (tmp_path / "a.txt").write_text("a photo of a circle\na photo of a square\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a photo of a square", "tag": "single_object"}\n')
    a, b = (load_prompts(str(tmp_path / name)) for name in ("a.txt", "b.jsonl"))
    assert a[1].id == b[0].id != a[0].id
    assert (b[0].tag, b[0].metadata["prompt"]) == ("single_object", "a photo of a square")


def test_packaged_prompts_are_disjoint():
    """No evaluation prompt is used for training or tuning."""
    sets = [{prompt.id for prompt in load_prompts(f"shapes/{split}")} for split in ("train", "val", "test")]
    assert not sets[0] & sets[1]
    assert not (sets[0] | sets[1]) & sets[2]
