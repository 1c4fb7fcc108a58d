"""Several processes make the same run as one, and all of them end together."""

import json
import os
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from support import rank_process, tiny
from support.tiny_sweep import PLUGIN, alignbench, sweep_file

from alignbench.config import UserError
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.experiment.spec import Budget, Training, check_ranks
from alignbench.launch import pending
from alignbench.plugins import Registry
from alignbench.run import execute
from alignbench.run.process_group import ProcessGroup
from alignbench.store.artefacts import Store, milestone_file
from alignbench.training.checkpoint import FINAL, read_state, saved_states

CASES = rank_process.CASES


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return (folder, records of two processes, records of one): two batches of each case, and resumed runs."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.flux_folder(folder / "flux", scale=2.0)
    one = ProcessGroup()
    alone = {f"{t}-{m}": rank_process.trained(folder, one, "ddp", t, m, folder / f"{t}-{m}") for t, m in CASES}
    for tune in ("full", "lora"):  # stopped by one process after a batch, resumed by two
        rank_process.trained(folder, one, "ddp", tune, "leapalign", folder / f"{tune}-stopped", batches=1)
    for kind in rank_process.HALVES:
        alone[kind] = rank_process.halved(folder, one, kind, folder / f"{kind}-one")
    noted = rank_process.together("train", folder)
    return folder, noted, alone


def near(records, others):
    assert len(records) == len(others) > 0
    for mine, theirs in zip(records, others):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def same_weights(folder, other, tolerance=1e-4, file=FINAL):
    ours, theirs = load_file(folder / file), load_file(other / file)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(("tune", "name"), CASES)
def test_two_ranks_are_one_process(both, tune, name, parallel):
    """Loss, gradient norm, drift, costs, weights and their average agree up to rounding, for ddp and fsdp, with all
    weights or adapters."""
    folder, noted, alone = both
    case = f"{tune}-{name}"
    for rank in noted:
        near(rank[f"{case}-{parallel}"]["records"], alone[case]["records"])
    for file in (FINAL, milestone_file(1)):
        same_weights(folder / f"{case}-{parallel}", folder / case, file=file)


@pytest.mark.slow
def test_a_sharded_average_on_the_host(both):
    """The files equal, bit by bit, those of an average kept beside the weights, also for a resumed run."""
    folder, *_ = both
    for file in (FINAL, milestone_file(1)):
        assert (folder / "full-host" / file).read_bytes() == (folder / "full-leapalign-fsdp" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tolerance"), [("master", 1e-3), ("stochastic", 2e-2)])
def test_weights_in_bfloat16_on_two_ranks(both, kind, tolerance):
    """Both ranks record the same, and a single process almost: bfloat16's rounding of activations and gradients flips
    the sign of an update (lr is 1e-3) here and there, and rounding moves a weight by its last place.
    """
    folder, (first, second), alone = both
    assert first[kind] == second[kind]
    for mine, one in zip(first[kind], alone[kind], strict=True):
        assert mine == pytest.approx(one, rel=0.03, abs=1e-3)
    same_weights(folder / f"{kind}-two", folder / f"{kind}-one", tolerance)


@pytest.mark.slow
def test_rewards_in_slices_on_two_ranks(both):
    """Records and weights equal, up to rounding, those of one process that takes a micro-batch at once."""
    folder, noted, alone = both
    for rank in noted:
        near(rank["sliced"]["records"], alone["lora-leapalign"]["records"])
    same_weights(folder / "sliced", folder / "lora-leapalign")


@pytest.mark.slow
def test_weights_are_gathered_once_per_update(both):
    """Each of the five modules is gathered once per update, however many network calls that makes."""
    _, (first, second), _ = both
    for name, updates in (("leapalign", 1), ("dancegrpo", 2)):
        counts = first[f"lora-{name}-fsdp"]["collectives"]
        assert counts == second[f"lora-{name}-fsdp"]["collectives"]
        images = first[f"lora-{name}-fsdp"]["records"][0]
        assert images["nfe_forward"] + images["nfe_grad"] >= 4 * 4  # each rank's two images go through it at once
        assert [batch["_allgather_base_"] for batch in counts] == [5 * updates] * 2
        assert not any("_allgather_base_" in batch for batch in first[f"lora-{name}-ddp"]["collectives"])


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_checkpoint_does_not_depend_on_the_number_of_ranks(both, tune):
    """Two ranks with shards resume from one process, and one from two: up to rounding, as the undisturbed run."""
    folder, noted, alone = both
    case = f"{tune}-leapalign"
    near(noted[0][f"{tune}-resumed"]["records"], alone[case]["records"][1:])
    same_weights(folder / f"{tune}-stopped", folder / case)
    kept = folder / f"{tune}-back"
    shutil.copytree(folder / f"{case}-fsdp", kept)
    saved_states(kept)[0].unlink()
    (kept / FINAL).unlink()
    assert read_state(saved_states(kept)[0])["step"] == 1
    near(
        rank_process.trained(folder, ProcessGroup(), "ddp", tune, "leapalign", kept)["records"],
        alone[case]["records"][1:],
    )
    same_weights(kept, folder / case)


@pytest.mark.slow
def test_two_ranks_guide_as_one_process_does(tmp_path):
    """SD3, FLUX.2 and SiT are sharded; a velocity takes two network calls, one or both with a gradient."""
    alone = {}
    for guided in rank_process.GUIDED:
        kept = tmp_path / guided[0]
        alone[guided[0]] = rank_process.trained(
            tmp_path, ProcessGroup(), "ddp", "full", "leapalign", kept, guided=guided
        )["records"]
    for rank in rank_process.together("guide", tmp_path):
        for family, records in alone.items():
            near(rank[family], records)
    for family in alone:
        same_weights(tmp_path / f"{family}-fsdp", tmp_path / family)


def task(folder, parallel="ddp"):
    """Return the store in ``folder`` and the task of the tiny sweep's trained run, and write the task to task.json."""
    store = Store(folder / "store")
    changes = {"base": {"training": {"milestones": [2]}}}
    plan = resolve(read(sweep_file(folder, changes), seeds="0"), Registry([PLUGIN]))
    cell = next(cell for cell in plan.cells if cell.trains)
    scores = [score._asdict() for score in plan.scores]
    more = {"threads": 1, "progress": str(folder / "progress.json"), "plugins": [PLUGIN], "parallel": parallel}
    plain = pending.task(plan, store, cell, None, scores=scores, **more)
    (folder / "task.json").write_text(json.dumps(plain))
    return store, plain


@pytest.mark.slow
def test_a_run_on_two_ranks_is_the_run_on_one(tmp_path):
    """Two ranks go from nothing to scores; one process makes the same images, byte by byte, and scores again."""
    store, plain = task(tmp_path, "fsdp")
    first, second = rank_process.together("execute", tmp_path)
    assert (first["state"], second["state"]) == ("done", "done")
    assert first["made"] == ["run", *["images"] * 2, *["scores"] * 4]
    assert json.loads((store.run(plain["run"], True).folder / "provenance.json").read_text())["processes"] == 2
    images = store.images(plain["images"])
    milestone = store.images(plain["milestones"][0][1])
    final = {path.name: path.read_bytes() for path in images.folder.glob("*.png")}
    earlier = {path.name: path.read_bytes() for path in milestone.folder.glob("*.png")}
    manifest = pd.read_parquet(images.product)
    scores = {path: pd.read_parquet(path) for path in (store.root / "scores").rglob("*.parquet")}
    assert len(final) == len(manifest) == 4
    assert len(earlier) == 4
    shutil.rmtree(milestone.folder)
    shutil.rmtree(images.folder)
    shutil.rmtree(store.root / "scores")
    assert execute(plain)["made"] == [*["images"] * 2, *["scores"] * 4]
    assert {path.name: path.read_bytes() for path in images.folder.glob("*.png")} == final
    assert {path.name: path.read_bytes() for path in milestone.folder.glob("*.png")} == earlier
    pd.testing.assert_frame_equal(pd.read_parquet(images.product), manifest)
    for path, frame in scores.items():
        pd.testing.assert_frame_equal(pd.read_parquet(path), frame)


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["0", "1"])
def test_a_rank_that_fails_ends_the_run_with_its_reason(tmp_path, fails):
    """When a rank fails unexpectedly, the reason is recorded, the lock is free, and no rank is left waiting."""
    store, plain = task(tmp_path)
    rank_process.together("execute", tmp_path, fails, expect=1)
    run = store.run(plain["run"], True)
    assert "RuntimeError: fell over" in (run.failure or "")
    assert not run.busy
    assert not run.done


def test_a_verb_waits_for_no_rank_of_the_shell_that_it_is_typed_in(monkeypatch):
    """Inside torchrun or mpirun it would hang as soon as it loads a model, waiting for ranks that nobody starts."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert ProcessGroup().size == 4
    assert alignbench("ls", "methods", plugin=False) == 0
    assert (ProcessGroup().size, ProcessGroup().rank) == (1, 0)
    assert not {"LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"} & os.environ.keys()  # which accelerate reads


def test_one_process_starts_nothing(monkeypatch):
    """A single process sends no messages, waits for none, and makes no process group."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    group = ProcessGroup()
    assert group.broadcast(lambda: {"a": 1}) == {"a": 1}
    group.barrier()
    group.check()
    assert group.abort("why") == "why"
    group.close()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("batch", "micro", "ranks"), [(9, None, 2), (8, 5, 2), (8, None, 16)])
def test_batches_that_ranks_cannot_share_are_refused_before_submission(batch, micro, ranks):
    """The error has the place and the setting; a batch that divides is accepted."""
    training = Training(budget=Budget(updates=1), batch=batch, micro_batch=micro)
    with pytest.raises(UserError, match=r"here: training.(micro_)?batch"):
        check_ranks(training, ranks, "here")
    check_ranks(training, 1, "here")
