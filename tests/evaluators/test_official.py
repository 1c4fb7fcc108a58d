"""Official engines' environments: complete or absent, sharing what is not pinned, with one-line errors."""

import pytest

from alignbench import official
from alignbench.config import UserError
from alignbench.prompts import Prompt
from alignbench.testing.evaluator_contract import random_image

SCRIPT = """
import json, sys
import msgspec
request = json.load(open(sys.argv[1]))
if "boom" in request["prompts"]:
    raise ValueError("the package broke")
scores = [len(prompt) for prompt in request["prompts"]]
json.dump({"scores": scores, "versions": {"msgspec": msgspec.__version__}}, open(request["output"], "w"))
"""


@pytest.fixture
def engines(tmp_path, monkeypatch):
    """A folder of test engines and an empty cache; 'echo' scores a prompt by its length and pins nothing."""
    folder = tmp_path / "engines"
    folder.mkdir()
    (folder / "echo.py").write_text(SCRIPT)
    (folder / "requirements-echo.txt").write_text("# nothing\n")
    monkeypatch.setattr(official, "HERE", folder)
    monkeypatch.setenv("ALIGNBENCH_CACHE", str(tmp_path / "cache"))
    return folder


def scores(*texts):
    images = [random_image(8, 8, seed) for seed in range(len(texts))]
    return official.score("echo", "length", "model.pt", images, [Prompt(text, text) for text in texts])


@pytest.mark.slow
def test_an_environment_shares_what_it_does_not_pin(engines):
    """Its script imports the running environment's packages, but its own packages come first."""
    import msgspec

    said = []
    folder = official.install("echo-official", said.append)
    assert official.environments() == {"echo-official": folder}
    assert all(line.startswith("echo-official: ") for line in said)
    assert scores("a", "abc")["length"].tolist() == [1, 3]
    answer = official.run("echo", {"prompts": []}, engines)
    assert answer["versions"] == {"msgspec": msgspec.__version__}
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "msgspec.py").write_text("__version__ = 'pinned'")
    assert official.run("echo", {"prompts": []}, engines)["versions"] == {"msgspec": "pinned"}


@pytest.mark.slow
def test_installing_again_does_nothing(engines):
    """The second call makes no environment and returns the first one's folder."""
    folder, said = official.install("echo-official", lambda line: None), []
    stamp = (folder / "pyvenv.cfg").stat().st_mtime_ns
    assert official.install("echo-official", said.append) == folder
    assert (folder / "pyvenv.cfg").stat().st_mtime_ns == stamp
    assert said == [f"echo-official: already installed in {folder}"]


@pytest.mark.slow
def test_a_failed_installation_leaves_nothing(engines, tmp_path):
    """A requirement that cannot be met is a one-line error and leaves no environment."""
    (engines / "requirements-echo.txt").write_text("./no-such-folder\n")
    with pytest.raises(UserError, match=r"requirements-echo.txt: failed with exit code 1: .*no-such-folder") as error:
        official.install("echo-official", lambda line: None)
    assert "\n" not in str(error.value)
    assert official.environments() == {"echo-official": None}
    assert list((tmp_path / "cache" / "environments").iterdir()) == []


@pytest.mark.slow
def test_other_pins_need_another_environment(engines):
    """After a change of the requirements the old environment no longer counts as installed."""
    official.install("echo-official", lambda line: None)
    (engines / "requirements-echo.txt").write_text("# something else\n")
    assert official.environments() == {"echo-official": None}


@pytest.mark.slow
def test_a_script_that_fails_is_one_line(engines):
    """The error has the script's last line and the environment's name."""
    official.install("echo-official", lambda line: None)
    with pytest.raises(UserError, match="echo-official: failed with exit code 1: ValueError: the package broke"):
        scores("a", "boom")


def test_unknown_environments_are_refused(engines):
    """The error lists the existing ones."""
    with pytest.raises(UserError, match=r"no environment 'hps'.*echo-official"):
        official.install("hps")


def test_every_shipped_engine_is_a_script_with_pinned_requirements():
    """Each requirements file names exact versions, and stands beside its script."""
    files = sorted(official.HERE.glob("requirements-*.txt"))
    assert {"requirements-hpsv2.txt", "requirements-imagereward.txt"} <= {path.name for path in files}
    for path in files:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert all("==" in line for line in lines), path
        assert (official.HERE / f"{path.stem.removeprefix('requirements-')}.py").is_file()


def test_no_images_need_no_environment(engines):
    """An empty table starts no process."""
    assert scores().empty
