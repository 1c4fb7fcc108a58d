"""Tables of a sweep, read from the store for every report: scores, training records, costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignbench.experiment.margins import hinge_warnings
from alignbench.store.artefacts import Store
from alignbench.store.files import read_json
from alignbench.store.manifest import Manifest, ManifestRun, ManifestScore
from alignbench.store.run_state import Jobs, RunState, run_state
from alignbench.store.score_gaps import Gap, gaps

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Columns = dict[str, NDArray[Any]]

COSTS = (
    *("nfe_forward", "nfe_grad", "decodes", "reward_calls"),
    *("images", "seconds", "peak_memory_bytes"),
)  # totals in a run's last record


class Results:
    """Results of a sweep's manifest, as far as the store has them. ``jobs``: as for ``run_state``.

    ``sweep``: stem of the manifest's file, under which tables are cached once read; "" caches none.
    """

    def __init__(
        self, store: Path | str, manifest: Manifest, jobs: Callable[[], Jobs] = Jobs, *, sweep: str = ""
    ) -> None:
        self.store = Path(store)
        self._tables = Store(store).tables / sweep if sweep else None
        self.manifest = manifest
        self._ask = jobs

    @cached_property
    def _jobs(self) -> Jobs:
        return self._ask()

    def state(self, run: ManifestRun) -> RunState:
        """Return the run's state and its reason."""
        return run_state(Store(self.store), run, lambda: self._jobs)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Scores of all runs, one row per image and metric."""
        files = ((run, score) for run in self.manifest.runs for score in run.scores)
        return self.read(files, self._tables and self._tables / "scores")

    def read(self, files: Iterable[tuple[ManifestRun, ManifestScore]], kept: Path | None = None) -> pd.DataFrame:
        """Read the score files that exist, one row per image and metric. ``kept``: as for ``read_scores``."""
        from alignbench.reporting.analysis.score_tables import ScoreFile, read_scores

        wanted = (
            ScoreFile(
                label=run.label,
                method=run.method,
                seed=run.seed,
                run=run.id,
                evaluator=score.evaluator,
                metrics=tuple(metric.name for metric in score.metrics),
                path=score.file,
            )
            for run, score in files
        )
        return read_scores(self.store, wanted, kept)

    @cached_property
    def gaps(self) -> list[Gap]:
        """Images of finished runs (milestones aside) that lack scores, and why."""
        from msgspec import structs

        empty = self.scores[~self.scores["ok"].eq(True)]
        files = set(zip(empty["run"], empty["evaluator"]))
        runs = [
            structs.replace(run, milestones=[], scores=[it for it in run.scores if (run.id, it.evaluator) in files])
            for run in self.manifest.runs
        ]
        return gaps(self.store, runs)

    @cached_property
    def training_records(self) -> dict[str, Columns]:
        """Training records by run id, an entry per update, for every run that has any."""
        from alignbench.reporting.analysis.score_tables import read_columns

        files = {run.id: f"{self.store}/runs/{run.id}/train.parquet" for run in self.manifest.runs}
        return read_columns(files, self._tables and self._tables / "training")

    @cached_property
    def origins(self) -> dict[str, dict[str, Any]]:
        """Provenance (software, hardware) by run id, for every run that recorded it."""
        files = {run.id: f"{self.store}/runs/{run.id}/provenance.json" for run in self.manifest.runs}
        return {id: origin for id, file in files.items() if (origin := read_json(file)) is not None}

    @cached_property
    def costs(self) -> pd.DataFrame:
        """Costs, one row per run: state, reason, updates, the meter's totals, mean reward of first and last tenth.

        ``device``: GPUs, or the CPU with its threads, of which ``processes`` were used; None if not recorded.
        """
        import pandas as pd

        rows = []
        for run in self.manifest.runs:
            state = self.state(run)
            row = {"label": run.label, "method": run.method, "seed": run.seed, "run": run.id}
            row |= {"state": state.state, "reason": state.reason} | self._costs(run)
            rows.append(row | machine(self.origins.get(run.id, {})))
        return pd.DataFrame(rows)

    def _costs(self, run: ManifestRun) -> dict[str, Any]:
        """Return the totals of training: zeros for the base model, empty for a run that did not finish."""
        import numpy as np

        names = ["updates", *COSTS]
        records = self.training_records.get(run.id)
        if records is None:
            return dict.fromkeys(names, 0 if run.is_base else None) | dict.fromkeys(("reward_first", "reward_last"))
        tenth = max(1, len(records["update"]) // 10)
        margins = {part["evaluator"]["name"]: part["margin"] for part in run.rewards}
        reward = records.get("reward_mean", np.full(1, np.nan))
        hinged = any(name.startswith("hinge_closed") for name in records)
        lists = [column.tolist() for column in records.values()] if hinged else []
        rows = [dict(zip(records, row)) for row in zip(*lists)]
        return {
            "updates": int(records["update"][-1]) + 1,
            **{name: records[name][-1].item() for name in COSTS},
            "reward_first": float(reward[:tenth].mean()),
            "reward_last": float(reward[-tenth:].mean()),
            "warning": "; ".join(hinge_warnings(rows, margins)),
        }


def machine(origin: dict[str, Any]) -> dict[str, Any]:
    """Return ``device`` and ``processes`` of a run's provenance; None if not recorded."""
    if "devices" not in origin:
        return {"device": None, "processes": None}
    gpus = ", ".join(sorted(set(origin["devices"])))
    cpu = f"CPU, {origin.get('machine', 'unknown machine')}, threads per process: {origin.get('threads', 'unknown')}"
    return {"device": gpus or cpu, "processes": origin.get("processes")}
