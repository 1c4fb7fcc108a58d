"""Several processes make the same run as one, and all of them end together."""

import itertools
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from support import rank_process, tiny
from support.tiny_sweep import PLUGIN, alignbench, same, sweep_file

from alignbench.config import Interrupted, UserError
from alignbench.experiment.document import read
from alignbench.experiment.plan import resolve
from alignbench.experiment.spec import Budget, Training, check_ranks
from alignbench.launch import pending
from alignbench.plugins import Registry
from alignbench.run import Task, execute, process_group, provenance
from alignbench.run.process_group import OtherFailed, ProcessGroup
from alignbench.run.session import RunSession, _reason
from alignbench.store.artefacts import Store, milestone_file
from alignbench.store.locks import Lock
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
        counts, plain = (first[f"lora-{name}-{parallel}"]["collectives"] for parallel in ("fsdp", "ddp"))
        assert counts == second[f"lora-{name}-fsdp"]["collectives"]
        images = first[f"lora-{name}-fsdp"]["records"][0]
        assert images["nfe_forward"] + images["nfe_grad"] >= 4 * 4  # each rank's two images go through it at once
        gathered = [batch["_allgather_base_"] for batch in counts]
        data = [batch["_allgather_base_"] for batch in plain]  # scores and metrics, which no weights belong to
        assert [count - own for count, own in zip(gathered, data)] == [5 * updates] * 2


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


TROUBLE = [  # where, how, rank, parallel, the reason that the run's status gives
    ("starting", "fails", 1, "ddp", "training: rank 1 has not started within 10 seconds; see its log"),
    ("starting", "killed", 1, "fsdp", "training: rank 1 has not started within 10 seconds; see its log"),
    ("training", "fails", 0, "fsdp", "training: rank 0: RuntimeError: fell over"),
    ("training", "fails", 1, "ddp", "training: rank 1: RuntimeError: fell over"),
    ("training", "spoils", 1, "fsdp", "training: rank 1: training, step 1, update 1: the reward is not finite"),
    ("training", "killed", 0, "ddp", "training: rank 0 has ended; see its log"),
    ("training", "killed", 1, "fsdp", "training: rank 1 has ended; see its log"),
    ("saving", "killed", 0, "fsdp", "training: rank 0 has ended; see its log"),
    ("generating", "fails", 1, "ddp", "generation: rank 1: RuntimeError: fell over"),
    ("generating", "killed", 0, "ddp", "generation: rank 0 has ended; see its log"),
    ("generating", "killed", 1, "fsdp", "generation: rank 1 has ended; see its log"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "how", "rank", "parallel", "reason"), TROUBLE)
def test_a_rank_that_fails_or_dies_ends_the_run_with_its_reason(tmp_path, where, how, rank, parallel, reason):
    """Status and log give the reason, the lock is free, nobody is left waiting, and the next attempt makes the rest."""
    store, plain = task(tmp_path, parallel)
    rank_process.together("execute", tmp_path, where, how, str(rank), fail=True)
    run, images = store.run(plain["run"], True), store.images(plain["images"])
    artefact = run if reason.startswith("training") else images
    assert artefact.failure == reason
    assert not artefact.busy
    assert not artefact.done
    told = run.folder / ("log.rank1.txt" if (how, rank) == ("killed", 0) else "log.txt")
    assert reason.partition(": ")[2] in told.read_text()
    assert execute(plain)["state"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "state"), [("fails", "failed"), ("killed", None), ("stopped", "interrupted")])
def test_scoring_concerns_rank_0_alone(tmp_path, how, state):
    """The other rank has ended well by then, and the next attempt makes the scores that are missing, nothing else."""
    _, plain = task(tmp_path)
    first, second = rank_process.together("execute", tmp_path, "scoring", how, "0", fail=(True, False))
    assert ((first or {}).get("state"), second["state"]) == (state, "done")
    again = execute(plain)
    assert again["state"] == "done"
    assert set(again["made"]) == {"scores"}


def test_a_run_whose_store_is_gone_ends_with_the_reason(tmp_path):
    """What made it fail is told, not that the disk's free space cannot be asked for."""
    error = RuntimeError("fell over")
    assert _reason(error, tmp_path / "gone") == "RuntimeError: fell over"


@pytest.mark.slow
def test_a_stop_is_not_a_failure_on_any_rank(tmp_path):
    """A signal on one rank that makes images stops both, which record no failure and keep the images made so far.

    The other rank, which waits for it or works, ends as interrupted too, so that a job can be queued again.
    """
    store, plain = task(tmp_path)
    notes = rank_process.together("execute", tmp_path, "generating", "stopped", "1", fail=True)
    assert [note["state"] for note in notes] == ["interrupted"] * 2
    images = store.images(plain["images"])
    assert images.failure is None
    assert not images.busy
    assert list(images.folder.glob("*.png"))
    assert execute(plain)["state"] == "done"


# -- one rank and its store -------------------------------------------------------------------------------------------


@pytest.fixture
def pair(monkeypatch):
    """Return a function that makes the two ranks of a group as threads would: they share a store, without torch's
    group. ``stop``: what each polls. Heartbeats are a hundred times faster."""
    for name, value in {"BEAT": 0.01, "POLL": 0.001, "ROLL_CALL": 0.2, "SILENT": 10}.items():
        monkeypatch.setattr(process_group, name, value)
    shared, groups = torch.distributed.HashStore(), []

    def make(rank, stop=lambda: False):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
        groups.append(ProcessGroup(stop))
        groups[-1]._store = shared
        threading.Thread(target=groups[-1]._watch, daemon=True).start()
        return groups[-1]

    yield make
    for group in groups:
        group._ended.set()


def in_thread(function):
    """Return a future of ``function()``, run in a thread."""
    return ThreadPoolExecutor(1).submit(function)


def test_messages_reach_all_ranks(pair):
    """A broadcast gives rank 0's value, a barrier waits for both, and a count is that of both."""
    first, second = pair(0), pair(1)
    later = in_thread(lambda: (second.broadcast(lambda: None), second.count("images", 2), second.barrier())[:2])
    assert first.broadcast(lambda: {"a": [1]}) == {"a": [1]}
    shown = []
    first.count("images", 3)
    first.barrier(lambda: shown.append(first.count("images")))
    assert later.result() == ({"a": [1]}, second.count("images"))
    assert first.count("images") == 5


def test_a_rank_that_was_killed_is_noticed_by_whoever_waits(pair):
    """Its heart has stopped, and the others name it; one that never started is not taken for dead."""
    first, second = pair(0), pair(1)
    second._ended.set()
    with pytest.raises(OtherFailed, match="rank 1 has ended; see its log"):
        first.barrier()
    assert first.abort("rank 0: RuntimeError: broken pipe") == "rank 1 has ended; see its log"


def test_a_broken_connection_is_explained_by_the_rank_that_ended(pair):
    """The consequence on one rank gives way to the cause, a silent rank or a reason already written."""
    first, second = pair(0), pair(1)
    assert second.abort("rank 1: the reward is not finite") == "rank 1: the reward is not finite"
    assert first.abort("rank 0: RuntimeError: broken pipe", certain=False) == "rank 1: the reward is not finite"


def test_an_error_while_all_ranks_live_is_its_own_reason(pair):
    """A roll call that everyone answers finds no other cause."""
    first, _ = pair(0), pair(1)
    assert first.abort("rank 0: RuntimeError: bug", certain=False) == "rank 0: RuntimeError: bug"


def test_a_signal_that_follows_a_death_is_not_a_request_to_stop(pair):
    """SLURM ends the other tasks of a step once one was killed: they report its death, not an interruption."""
    first, second = pair(0, stop=lambda: True), pair(1)
    second._ended.set()
    time.sleep(0.05)
    with pytest.raises(OtherFailed, match="rank 1 has ended"):
        first.check()


def test_a_rank_that_waits_obeys_a_stop_and_takes_its_partner_along(pair):
    """Neither goes on alone: the rank that was waited for learns it when it sends its message, at the latest."""
    first, second = pair(0), pair(1, stop=lambda: True)
    with pytest.raises(Interrupted):
        second.broadcast(lambda: None)
    with pytest.raises(Interrupted):
        first.broadcast(lambda: "go on")
    assert second.abort(process_group.STOPPED) == process_group.STOPPED
    with pytest.raises(Interrupted):
        first.check()


def test_a_rank_does_not_join_another_job_that_has_its_port(monkeypatch):
    """It would read that job's messages, and its failure would end that job."""
    shared = torch.distributed.HashStore()
    monkeypatch.setattr(ProcessGroup, "_connect", lambda self, host: shared)
    monkeypatch.setattr(process_group, "START", 0.01)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("joined"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, other in (("0", "rank 1"), ("1", "rank 0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("SLURM_JOB_ID", f"1000{rank}")
        group = ProcessGroup()
        with pytest.raises(OtherFailed, match=f"{other} has not started"):
            group.join()
        group._ended.set()


def test_a_stop_while_waiting_for_a_lock_is_obeyed(tmp_path):
    """A run that another process makes is waited for only until a stop, which is not a failure."""
    store, plain = task(tmp_path)
    run = store.run(plain["run"], True)
    lock = Lock(run.lock)
    assert lock.try_acquire()
    assert execute(plain, lambda: True) == {"state": "interrupted", "reason": "", "made": []}
    assert run.failure is None
    lock.check()
    lock.release()


def test_ranks_with_other_code_or_settings_are_refused():
    """The error names what differs, and both sides."""
    session = object.__new__(RunSession)
    session.task = Task("", "", "", False, {}, {}, [], [], 1, "", [])
    session.code = provenance.code()
    theirs = {}

    def broadcast(make):
        return make() | theirs

    session.group = SimpleNamespace(size=2, broadcast=broadcast)
    session._check_ranks()
    theirs["torch"] = "1.0"
    with pytest.raises(UserError, match=rf"torch: {torch.__version__.split('+')[0]}\S*, but rank 0 has 1.0"):
        session._check_ranks()


def test_threads_stay_as_they_were_at_the_beginning():
    """What was begun with three threads is finished with three; what is new takes the task's number."""
    session = object.__new__(RunSession)
    notes, before = [], torch.get_num_threads()
    session.group, session.note = SimpleNamespace(broadcast=lambda make: make()), notes.append
    try:
        session.keep_threads(lambda: None)
        assert (torch.get_num_threads(), notes) == (before, [])
        session.keep_threads(lambda: {"threads": 3})
        assert torch.get_num_threads() == 3
        assert notes == [f"continues with 3 threads, as it was begun, not with {before}"]
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_another_number_of_threads_does_not_change_a_run_that_was_begun(tmp_path):
    """Training, images and scores begun with two threads are finished with two: bitwise the undisturbed run."""
    stores = []
    for name, threads in (("calm", [2]), ("disturbed", [2, 1, 1, 1, 1])):
        (tmp_path / name).mkdir()
        store, plain = task(tmp_path / name)
        for number in threads:
            asked = itertools.count()
            execute(plain | {"threads": number}, lambda: len(threads) > 1 and next(asked) == 1)  # noqa: B023 - called at once
        assert execute(plain)["state"] == "done"
        stores.append(store.root)
        assert json.loads((store.run(plain["run"], True).folder / "provenance.json").read_text())["threads"] == 2
    same(*stores)


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
