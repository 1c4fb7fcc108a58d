"""``backend.embeddings: stored``: prompts encoded once, by the text encoders alone; all else is as without it."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from support import rank_process
from support.tiny import PROMPTS
from support.tiny_sweep import PLUGIN, alignbench, debug_sweep, same, sweep_file

from alignbench.backends import stored_embeddings
from alignbench.backends.pipeline import PipelineBackend
from alignbench.config import UserError
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.experiment.spec import Budget, Training
from alignbench.launch import cleanup, pending
from alignbench.plugins import Registry
from alignbench.prompts import Prompt, load_prompts
from alignbench.rehearsal.tiny_backends import backend
from alignbench.store.artefacts import Store
from alignbench.store.files import read_json
from alignbench.training.batches import prompt_index, prompts_within_budget

pytestmark = pytest.mark.slow  # whole models, several times

CPU = torch.device("cpu")
TEXTS = ["", *PROMPTS, "a", "a photo of a blue square above a green circle"]
STORED = {"base": {"backend": {"embeddings": "stored"}}}


@pytest.fixture(scope="module", params=["flux", "sd3", "flux2"])
def small(request, tmp_path_factory):
    """A family's small model, in bfloat16, as a function of further settings."""
    folder, family = tmp_path_factory.mktemp(request.param), request.param
    wanted = {"name": family, "size": 32, **backend(family, folder)}
    return lambda **settings: Registry().make("backend", wanted | settings, "backend")


@pytest.fixture
def one(tmp_path):
    """The shapes model, and a store with the embeddings of TEXTS."""
    made = Registry().make("backend", {"name": "flux", "size": 32, **backend("flux", tmp_path)}, "backend")
    store = Store(tmp_path / "store")
    return made, store, store.embeddings / prepare(store, made, TEXTS)


def prepare(store, made, texts, progress=lambda *_: None, may_stop=lambda: None) -> str:
    return stored_embeddings.prepare(store, made, None, CPU, texts, progress, may_stop)


@pytest.fixture
def loads(monkeypatch):
    """The parts that pipelines are loaded without, one entry per pipeline."""
    seen, load = [], PipelineBackend._pipeline
    monkeypatch.setattr(
        PipelineBackend, "_pipeline", lambda self, without=(): seen.append(without) or load(self, without)
    )
    return seen


def test_stored_embeddings_are_the_encoders_bit_by_bit(small, tmp_path, monkeypatch):
    """The same for every family, in several files, in any order and batch; so are the transformer's outputs."""
    monkeypatch.setattr(stored_embeddings, "FILE_BYTES", 2**13)
    made, store = small(), Store(tmp_path)
    folder = store.embeddings / prepare(store, made, TEXTS)
    assert len(list(folder.glob("*.safetensors"))) > 1
    whole, alone = made.load(), made.load(text=stored_embeddings.StoredEmbeddings(folder, CPU))
    for texts in (TEXTS, TEXTS[::-1], TEXTS[2:3] * 3):
        ours, theirs = alone.encode(texts).tensors, whole.encode(texts).tensors
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    x = whole.noise(2, [torch.Generator().manual_seed(i) for i in range(2)])
    with torch.no_grad():
        velocities = [flow.velocity(x, 0.5, flow.encode(PROMPTS)) for flow in (whole, alone)]
    assert torch.equal(*velocities)


def test_no_encoder_is_beside_the_transformer(small, tmp_path, loads):
    """The encoders are loaded once, without transformer and autoencoder; these then without the encoders."""
    made, store = small(), Store(tmp_path)
    text = stored_embeddings.StoredEmbeddings(store.embeddings / prepare(store, made, TEXTS), CPU)
    pipeline, _ = made.load_pipeline(None, text)
    assert [getattr(pipeline, part) for part in (*made.encoders, *made.tokenizers)] == [None] * 2 * len(made.encoders)
    prepare(store, made, TEXTS[::-1])  # all there
    prepare(store, small(guidance=1.0, tune="lora", gradient_checkpointing=True), TEXTS)  # what no embedding depends on
    assert loads == [("transformer", "vae"), (*made.encoders, *made.tokenizers)]


def test_what_an_embedding_depends_on_has_its_own_folder(small, tmp_path):
    """Files, dtype, tokens, device: another folder for each; the size of an image is none of them."""
    made, source = small(), Registry().source("backend", small().name)
    names = {stored_embeddings.folder_name(made, source, CPU)}
    names |= {
        stored_embeddings.folder_name(changed, source, CPU)
        for changed in (small(dtype="float32"), small(max_sequence_length=8))
    }
    names |= {
        stored_embeddings.folder_name(made, "a plug-in's digest", CPU),
        stored_embeddings.folder_name(small(size=64), source, CPU),
    }
    assert len(names) == 4


@pytest.mark.parametrize("budget", [{"images": 6}, {"updates": 3}, {"nfe": 100}, {"gpu_seconds": 1.0}, {"updates": 99}])
def test_prompts_that_can_be_drawn(budget):
    """All that the batches of the budget draw, and of a small budget nothing else."""
    prompts = [Prompt(str(i), f"prompt {i}") for i in range(20)]
    found = prompts_within_budget(prompts, Training(budget=Budget(**budget), batch=2, seed=3))
    batches = {"images": 3, "updates": budget.get("updates")}.get(next(iter(budget)))
    few = {prompts[prompt_index(3, n, 20)] for n in range(2 * batches)} if batches else set(prompts)
    assert set(found) == few
    assert len(found) == min(20, 2 * batches if batches else 20)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The tiny sweep's store, made with stored embeddings."""
    folder = tmp_path_factory.mktemp("stored")
    assert debug_sweep(sweep_file(folder, STORED), folder / "store") == 0
    return folder / "store"


def test_a_sweep_is_the_same_bit_by_bit(swept, stored):
    """Ids, weights, records, images and scores are those of the sweep that computes its embeddings."""
    for kind in ("runs", "images", "scores"):
        ours, theirs = ({path.name for path in (store / kind).iterdir()} for store in (stored, swept / "store"))
        assert ours == theirs
    same(swept / "store", stored)


def test_a_sweep_encodes_only_what_it_needs_and_once(stored, loads, tmp_path):
    """Each seed's eight prompts, evaluation's four, and the empty one; run again with other images, none."""
    (folder,) = stored.joinpath("embeddings").iterdir()
    found = set(stored_embeddings.StoredEmbeddings(folder, CPU).rows)
    plan = resolve(read(sweep_file(tmp_path, STORED)), Registry([PLUGIN]))
    wanted = {"", *(prompt.text for prompt in plan.prompts)}
    for cell in plan.cells:
        if cell.trains:
            prompts = prompts_within_budget(load_prompts(cell.spec.prompts), cell.spec.training)
            wanted |= {prompt.text for prompt in prompts}
    assert found == wanted
    assert len(found) > 4 + 1 + 8
    more = STORED | {"evaluation": {"protocol": {"steps": 1}}}
    assert debug_sweep(sweep_file(tmp_path, more), stored) == 0
    assert loads
    assert ("transformer", "vae") not in loads


def test_gc_keeps_what_a_run_was_made_with(stored, tmp_path):
    """A folder of which no run's records tell goes; the other stays."""
    store = Store(stored)
    (kept,) = store.embeddings.iterdir()
    (store.embeddings / "flux-0000000000").mkdir()
    assert [item.what for item in cleanup.unused(store)] == ["embeddings flux-0000000000"]
    assert [item.what for item in cleanup.delete(store, cleanup.unused(store))] == ["embeddings flux-0000000000"]
    assert list(store.embeddings.iterdir()) == [kept]
    provenance = [read_json(path) for path in stored.glob("runs/*/provenance.json")]
    assert {found["embeddings"] for found in provenance} == {kept.name}


def test_the_plan_counts_them(tmp_path, capsys):
    """Bytes of all rows: 4 prompts of evaluation and 8 of each seed at most, 16 tokens each, in float32."""
    made = Registry().make("backend", {"name": "flux", **backend("flux", tmp_path)}, "backend")
    width = made.read("transformer")["joint_attention_dim"]
    assert alignbench("plan", sweep_file(tmp_path, STORED), store=tmp_path / "store") == 0
    assert f"; {(4 + 16) * 16 * width * 4 / 1e6:.2g} MB of prompts' embeddings" in capsys.readouterr().out
    assert alignbench("plan", sweep_file(tmp_path), store=tmp_path / "store") == 0
    assert "embeddings" not in capsys.readouterr().out


def test_two_ranks_share_what_one_encodes(stored, tmp_path):
    """Two processes make one run: the first encodes, the second reads that; images of one process's weights are its.

    Weights of two ranks are rounded otherwise.
    """
    plan = resolve(read(sweep_file(tmp_path, STORED)), Registry([PLUGIN]))
    store, cell = Store(tmp_path / "store"), next(cell for cell in plan.cells if cell.trains)
    more = {"threads": 1, "progress": str(tmp_path / "progress.json"), "plugins": [PLUGIN], "scores": []}
    plain = pending.task(plan, store, cell, None, **more)
    (tmp_path / "task.json").write_text(json.dumps(plain))
    rank_process.together("execute", tmp_path)
    assert store.run(cell.id, True).done
    (folder,) = store.embeddings.iterdir()
    theirs = stored_embeddings.StoredEmbeddings(stored / "embeddings" / folder.name, CPU)
    ours = stored_embeddings.StoredEmbeddings(folder, CPU)
    assert not theirs.missing(list(ours.rows))
    texts = list(ours.rows)
    assert torch.equal(ours(texts).tensors["text"], theirs(texts).tensors["text"])
    for name in ("weights.safetensors", "weights.sha256"):
        shutil.copy(stored / "runs" / cell.id / name, store.run(cell.id, True).folder)
    shutil.rmtree(store.images(cell.images).folder)
    rank_process.together("execute", tmp_path)
    images = {path.name: path.read_bytes() for path in store.images(cell.images).folder.glob("*.png")}
    assert images == {path.name: path.read_bytes() for path in (stored / "images" / cell.images).glob("*.png")}


# -- disks and kills ---------------------------------------------------------------------------------------------------


def test_a_damaged_row_is_told(one):
    """One bit of one row: that row is refused in one line, the others are as they were; a file that is gone is made."""
    made, store, folder = one
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    before = stored_embeddings.StoredEmbeddings(folder, CPU)([TEXTS[1]]).tensors["text"]
    data[-1] ^= 1  # of the last row of the last tensor
    path.write_bytes(data)
    text = stored_embeddings.StoredEmbeddings(folder, CPU)
    assert torch.equal(text([TEXTS[1]]).tensors["text"], before)
    with pytest.raises(UserError, match=r"\.safetensors: damaged \(its content has changed .*\); delete it and run"):
        text([TEXTS[-1]])
    path.write_bytes(data[:-10])
    with pytest.raises(UserError, match=r"\.safetensors: damaged .*; delete it and run the same command again"):
        prepare(store, made, TEXTS)
    path.unlink()
    prepare(store, made, TEXTS)
    assert torch.equal(stored_embeddings.StoredEmbeddings(folder, CPU)([TEXTS[1]]).tensors["text"], before)


def test_a_prompt_without_an_embedding_is_named(one):
    """One line with the prompt and what to set."""
    with pytest.raises(
        UserError, match=r"no embedding of the prompt 'a cat', .*; choose backend.embeddings: computed$"
    ):
        stored_embeddings.StoredEmbeddings(one[2], CPU)(["a cat"])


def test_too_small_a_disk_is_told_before_anything_is_written(one, monkeypatch):
    """One line with what is needed and what is free."""
    made, store, folder = one
    monkeypatch.setattr(stored_embeddings.shutil, "disk_usage", lambda path: type("", (), {"free": 100}))
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=r"embeddings of 1,000 prompts take .* GB, and 0.00 GB are free; free some"):
        prepare(store, made, [f"prompt {i}" for i in range(1000)])
    assert sorted(folder.iterdir()) == before


def test_asked_to_stop_it_keeps_what_is_written(one, monkeypatch):
    """Stopped after the first file: that one is whole, and the next attempt encodes the others alone."""
    made, store, folder = one
    monkeypatch.setattr(stored_embeddings, "FILE_BYTES", 1)

    def stop():
        raise KeyboardInterrupt

    before = len(stored_embeddings.StoredEmbeddings(folder, CPU).rows)
    with pytest.raises(KeyboardInterrupt):
        prepare(store, made, ["x", "y", "z"], may_stop=stop)
    assert stored_embeddings.StoredEmbeddings(folder, CPU).missing(["x", "y", "z"]) == ["y", "z"]
    shares = []
    prepare(store, made, ["x", "y", "z"], progress=lambda _, share: shares.append(share))
    assert shares == [None, 0.5, 1.0]
    assert len(stored_embeddings.StoredEmbeddings(folder, CPU).rows) == before + 3


SCRIPT = """
    import sys, time
    from pathlib import Path
    import torch
    from alignbench.backends import stored_embeddings as embeddings
    from alignbench.plugins import Registry
    from alignbench.rehearsal.tiny_backends import backend
    from alignbench.store.artefacts import Store

    store, hang = Path(sys.argv[1]), len(sys.argv) > 2
    embeddings.FILE_BYTES = 2**14
    save = embeddings.save
    def slow(*arguments):
        print("writing", flush=True)
        if hang and len(list(store.glob("embeddings/*/*.safetensors"))) == 2:
            (next(store.glob("embeddings/*")) / ".x.safetensors.1-2.tmp").write_bytes(b"half")
            time.sleep(600)
        return save(*arguments)
    embeddings.save = slow
    made = Registry().make("backend", {"name": "flux", **backend("flux", store)}, "backend")
    texts = [f"prompt {i}" for i in range(40)]
    print(embeddings.prepare(Store(store), made, None, torch.device("cpu"), texts, lambda *_: None, lambda: None))
"""


def process(store: Path, *words: str) -> subprocess.Popen:
    script = textwrap.dedent(SCRIPT)
    return subprocess.Popen([sys.executable, "-c", script, str(store), *words], stdout=subprocess.PIPE, text=True)


def test_killed_while_writing_and_gone_on_with(tmp_path):
    """kill -9 leaves whole files and a partial one that is never read; the next attempt adds what is missing."""
    first = process(tmp_path, "hang")
    while not list(tmp_path.glob("embeddings/*/.x*")):
        assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    (folder,) = tmp_path.joinpath("embeddings").iterdir()
    kept = {path: path.read_bytes() for path in folder.glob("[!.]*.safetensors")}
    assert len(kept) == 2
    said, _ = process(tmp_path).communicate()
    assert said.splitlines()[-1] == folder.name
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert len(stored_embeddings.StoredEmbeddings(folder, CPU).rows) == 40
    assert not list(folder.glob(".*"))


def test_two_processes_at_once_encode_each_prompt_once(tmp_path):
    """Both come to an end, and no prompt stands in two files."""
    both = [process(tmp_path), process(tmp_path)]
    said = [p.communicate()[0].splitlines() for p in both]
    assert [p.returncode for p in both] == [0, 0]
    (folder,) = tmp_path.joinpath("embeddings").iterdir()
    files = [stored_embeddings.safe_open(path, "pt") for path in folder.glob("*.safetensors")]
    listed = [prompt for file in files for prompt in json.loads(file.metadata()["prompts"])]
    assert sorted(listed) == sorted(f"prompt {i}" for i in range(40))
    assert sorted(lines.count("writing") for lines in said) == [0, len(files)]


def test_sit_has_no_encoders(tmp_path):
    """Refused in one line."""
    made = Registry().make("backend", {"name": "sit", **backend("sit", tmp_path), "embeddings": "stored"}, "backend")
    with pytest.raises(UserError, match=r"^backend.embeddings: sit has no text encoder .*; choose computed$"):
        made.files()
