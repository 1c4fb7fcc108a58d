"""Scores and records are those in the files, however often they were read before."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from alignbench.config import UserError
from alignbench.reporting.analysis import score_tables
from alignbench.reporting.analysis.score_tables import Columns, ScoreFile, read_columns, read_scores
from alignbench.store.files import move, write, write_frame

TEXTS = ["run", "metric", "prompt_id", "tag"]


@pytest.fixture
def kept(tmp_path) -> Path:
    """Return the path at which a table is kept."""
    return tmp_path / "tables" / "sweep" / "scores"


def saved(root: Path, name: str, frame: pd.DataFrame, metrics: tuple[str, ...] = ("aesthetic", "clip")) -> ScoreFile:
    path = f"scores/{name}.parquet"
    write_frame(root / path, frame)
    return ScoreFile(f"row {name[0]}", "m", len(name), name, "e", metrics, path)


def sweep(root: Path) -> list[ScoreFile]:
    """Save and return files with the same images, in another order, fewer, none, and with columns reversed."""
    images = pd.DataFrame({"prompt_id": ["a", "b", "c"], "tag": ["x", None, "x"], "index": [0, 1, 0]})
    orders = {
        "same": images,
        "again": images,
        "other": images.iloc[::-1],
        "fewer": images.iloc[:2],
        "none": images.iloc[:0].astype({"prompt_id": "str", "tag": "str"}),
        "task": images.assign(tag="y"),
    }
    files = []
    for n, (name, frame) in enumerate(orders.items()):
        ok = [True, False, True][: len(frame)]
        scored = frame.assign(aesthetic=frame["index"] + n, ok=ok, error="", clip=0.5 * n)
        scored.loc[scored.index[:1], "clip"] = np.nan
        files.append(saved(root, name, scored))
        files.append(saved(root, f"{name} backwards", scored[list(reversed(scored.columns))]))
    return [*files, files[0]._replace(path="scores/absent.parquet", run="absent")]


def by_pandas(root: Path, files: list[ScoreFile]) -> pd.DataFrame:
    rows = []
    for file in files:
        if (root / file.path).exists():
            plain = pd.read_parquet(root / file.path)
            for metric in file.metrics:
                columns = plain[["prompt_id", "tag", "index", metric]].itertuples(index=False)
                rows += [(*file[:5], metric, *row, bool(np.isfinite(row[-1]))) for row in columns]
    names = ["label", "method", "seed", "run", "evaluator", "metric", "prompt_id", "tag", "index", "score", "ok"]
    return pd.DataFrame(rows, columns=names)


def equal(left: pd.DataFrame, right: pd.DataFrame) -> None:
    """Assert that two tables are equal in every value, type and category, and in their order."""
    pd.testing.assert_frame_equal(left, right, check_exact=True)
    assert list(left["label"].cat.categories) == list(right["label"].cat.categories)


def never(*_: object) -> pd.DataFrame:
    raise AssertionError("a file was decoded")


# -- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_those_that_pandas_reads(tmp_path, kept):
    """Without a kept table, while one is made, and from it: row for row what pandas reads of each file."""
    files = sweep(tmp_path)
    plain = read_scores(tmp_path, files)
    expected = by_pandas(tmp_path, files).astype(dict.fromkeys(TEXTS, object))
    found = plain.astype(dict.fromkeys(["label", "method", "evaluator", *TEXTS], object))
    pd.testing.assert_frame_equal(found.fillna(""), expected.fillna(""), check_dtype=False, check_exact=True)
    equal(read_scores(tmp_path, files, kept), plain)
    equal(read_scores(tmp_path, files, kept), plain)


def test_the_table_has_the_types_that_reports_expect(tmp_path):
    """Texts are categories, in the order of the files; numbers are numbers."""
    table = read_scores(tmp_path, sweep(tmp_path))
    texts = ("label", "method", "run", "evaluator", "metric", "prompt_id", "tag")
    expected = dict.fromkeys(texts, "category") | {"seed": "int64", "index": "int64", "score": "float64", "ok": "bool"}
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == expected
    assert list(table["label"].cat.categories) == ["row s", "row a", "row o", "row f", "row n", "row t"]
    assert list(table["run"].cat.categories)[8:10] == ["none", "none backwards"]  # without a row


def test_what_did_not_change_is_not_decoded_again(tmp_path, kept, monkeypatch):
    """The second reading, and that of a copy of the store elsewhere, come from the kept table alone."""
    files = sweep(tmp_path)
    plain = read_scores(tmp_path, files, kept)
    monkeypatch.setattr(score_tables, "_decode", never)
    equal(read_scores(tmp_path, files, kept), plain)
    (tmp_path / "scores").rename(tmp_path / "elsewhere")
    (tmp_path / "copy").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "copy" / "scores")
    equal(read_scores(tmp_path / "copy", files, kept), plain)


def in_place(path: Path) -> None:
    """Change a number in a file that an earlier version wrote without a hash, keeping its size and times."""
    about, content = path.stat(), path.read_bytes()
    frame = pd.read_parquet(path)
    changed = frame.assign(clip=frame["clip"] + 1).to_parquet(index=False)
    assert len(changed) == len(content)
    path.write_bytes(changed)
    path.with_suffix(".sha256").unlink()
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    now = path.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (about.st_size, about.st_mtime_ns, about.st_ino)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda root, files: in_place(root / files[0].path), id="a number, size and times kept"),
        pytest.param(lambda root, files: (root / files[2].path).unlink(), id="a file vanished"),
        pytest.param(lambda root, files: saved(root, "absent", pd.read_parquet(root / files[0].path)), id="one came"),
        pytest.param(
            lambda root, files: move(root / files[0].path, root / files[5].path), id="one took another's place"
        ),
        pytest.param(lambda root, files: files.reverse(), id="another order"),
        pytest.param(lambda root, files: files.pop(0), id="a file that is no longer asked for"),
        pytest.param(lambda root, files: files.append(files[0]._replace(label="twin")), id="one more row"),
        pytest.param(lambda root, files: files.insert(0, files.pop(0)._replace(seed=9)), id="another seed"),
        pytest.param(lambda root, files: files.insert(0, files.pop(0)._replace(metrics=("clip",))), id="one metric"),
    ],
)
def test_no_change_goes_unnoticed(tmp_path, kept, change):
    """Whatever changes in the files or in what is asked: the table is that of now, and is kept in place of the old."""
    files = sweep(tmp_path)
    before = read_scores(tmp_path, files, kept)
    change(tmp_path, files)
    plain = read_scores(tmp_path, files)
    assert not plain.equals(before)
    equal(read_scores(tmp_path, files, kept), plain)
    equal(read_scores(tmp_path, files, kept), plain)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["scores.feather", "scores.json"])
def test_a_damaged_table_is_never_used(tmp_path, kept, file):
    """A table that is truncated, has a flipped bit, is empty or belongs to another sweep is read anew and rewritten."""
    files = sweep(tmp_path)
    plain = read_scores(tmp_path, files, kept)
    path = kept.parent / file
    whole = path.read_bytes()
    read_scores(tmp_path, files[:3], kept.parent.with_name("other") / "scores")
    rng = np.random.default_rng(0)
    damaged = [whole[:cut] for cut in (0, 1, len(whole) // 2, len(whole) - 2)]
    damaged += [(kept.parent.with_name("other") / file).read_bytes(), b"[]", b"null", b"\xff\xfe"]
    for place in rng.integers(0, len(whole), 40):
        damaged.append(whole[:place] + bytes([whole[place] ^ (1 << int(rng.integers(8)))]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        equal(read_scores(tmp_path, files, kept), plain)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("known", [False, True])
def test_a_damaged_score_file_is_named(tmp_path, kept, known):
    """One line names its path, even if a table was kept while it was whole; a missing column counts as damage, too."""
    files = sweep(tmp_path)
    if known:
        read_scores(tmp_path, files, kept)
    path = tmp_path / files[3].path
    for content in (path.read_bytes()[:-9], b"", b"no parquet"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{path}: damaged \(.*\); run its sweep or import again, "):
            read_scores(tmp_path, files, kept)
    write_frame(path, pd.DataFrame({"prompt_id": ["a"], "tag": "x", "index": 0, "clip": 1.0, "ok": True}))
    with pytest.raises(UserError, match=r"cannot be read .*aesthetic"):
        read_scores(tmp_path, files, kept)


def test_a_store_that_cannot_be_written_is_still_read(tmp_path, kept):
    """A read-only or full store gives the same table, and nothing is left behind."""
    files = sweep(tmp_path)
    plain = read_scores(tmp_path, files)
    write(kept.parent.parent, "a file, so that no folder can be made: also root cannot write below it")
    equal(read_scores(tmp_path, files, kept), plain)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores", "tables"]


def test_nothing_is_kept_where_nothing_was_read(tmp_path, kept):
    """A report before the first score makes no folder in the store."""
    files = [file._replace(path="scores/absent.parquet") for file in sweep(tmp_path)]
    assert len(read_scores(tmp_path, files, kept)) == 0
    assert not kept.parent.exists()


@pytest.mark.slow
def test_two_reports_at_once_do_not_disturb_each_other(tmp_path, kept):
    """Each asks for other rows and keeps them in the same place, again and again: all get what they asked for."""
    files = sweep(tmp_path)
    asked = [files, files[:5], [file._replace(label="B") for file in files], files[::-1]]
    expected = [read_scores(tmp_path, each) for each in asked]

    def read(n: int) -> None:
        for _ in range(25):
            equal(read_scores(tmp_path, asked[n], kept), expected[n])

    with ThreadPoolExecutor(len(asked)) as pool:
        list(pool.map(read, range(len(asked))))
    assert sorted(path.name for path in kept.parent.iterdir()) == ["scores.feather", "scores.json"]


@pytest.mark.slow
def test_more_rows_than_a_batch_of_arrow_keep_their_categories(tmp_path, kept):
    """100,000 images whose names are longer than a page, in two files, the second with other names first."""
    names = [f"{'a prompt of some length ' * 2}{i:06d}" for i in range(50_000)]
    first = pd.DataFrame({"prompt_id": names, "tag": None, "index": 0, "clip": np.arange(50_000.0), "ok": True})
    files = [saved(tmp_path, name, frame, ("clip",)) for name, frame in {"a": first, "bb": first[::-1]}.items()]
    plain = read_scores(tmp_path, files, kept)
    found = read_scores(tmp_path, files, kept)
    equal(found, plain)
    assert list(found["prompt_id"].cat.categories) == names


# -- records ----------------------------------------------------------------------------------------------------------


def records(root: Path) -> dict[str, str]:
    """Save tables with different columns, types, orders and lengths, by pandas, this store and earlier versions."""
    first = pd.DataFrame({"update": [0, 1, 2], "loss": [0.5, -0.0, np.inf], "ok": True, "name": ["a", None, "b"]})
    first["half"] = first["loss"].astype("float32")
    frames = {
        "first": first,
        "alike": first.assign(loss=[np.pi, 1e-300, 3.0]),
        "nan": first.assign(loss=[np.nan, 0.0, np.nan]),
        "type": first.assign(update=[0.5, 1.5, 2.5], loss=[2**53 + 1, -1, 0]),
        "order": first[["half", "update", "loss"]],
        "more": first.assign(**{"drift mean": 1.0, "steps": 2}),
        "shorter": first.iloc[:1],
        "empty": first.iloc[:0].astype({"name": "str"}),
    }
    for name, frame in frames.items():
        write_frame(root / f"{name}.parquet", frame)
    first.to_parquet(root / "groups.parquet", index=False, row_group_size=2)
    texts: dict = {"use_dictionary": ["name"], "compression": {"name": "snappy"}}
    first.to_parquet(root / "earlier.parquet", index=False, write_statistics=False, **texts)
    return {name: str(root / f"{name}.parquet") for name in (*frames, "groups", "earlier", "absent")}


def same(left: dict[str, Columns], right: dict[str, Columns]) -> None:
    assert list(left) == list(right)
    for key, columns in left.items():
        assert list(columns) == list(right[key])
        for name, array in columns.items():
            assert array.dtype == right[key][name].dtype
            np.testing.assert_array_equal(array, right[key][name])


def test_columns_are_those_that_pandas_reads(tmp_path, monkeypatch):
    """Without kept columns, while they are made, and from them: names, order, types and values of each file."""
    files, kept = records(tmp_path), tmp_path / "training"
    plain = read_columns(files)
    assert list(plain) == list(files)[:-1]
    for key, columns in plain.items():
        expected = pd.read_parquet(files[key])
        texts = {"name": object} if "name" in expected else {}
        found = pd.DataFrame(columns).astype(texts)
        pd.testing.assert_frame_equal(found.fillna("?"), expected.astype(texts).fillna("?"), check_exact=True)
    same(read_columns(files, kept), plain)
    decode: Callable = score_tables._decode
    monkeypatch.setattr(score_tables, "_decode", never)
    same(read_columns(files, kept), plain)
    monkeypatch.setattr(score_tables, "_decode", decode)
    write_frame(Path(files["absent"]), pd.DataFrame({"update": [7]}))
    assert read_columns(files, kept)["absent"]["update"].tolist() == [7]
    same(read_columns(files, kept), read_columns(files))


def test_damaged_records_are_named(tmp_path):
    """One line with the path of the file."""
    files = records(tmp_path)
    Path(files["more"]).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=rf"^{files['more']}: damaged"):
        read_columns(files, tmp_path / "training")
