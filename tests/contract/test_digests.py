"""A file is known by all of its bytes, and is read again whenever they may have changed."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from alignbench import digests
from alignbench.config import UserError, cache
from alignbench.digests import file_digest, fingerprint


@pytest.fixture
def reads(tmp_path, monkeypatch) -> list[Path]:
    """Count 1000 bytes as large and every file as settled, start with empty caches, and return the list of reads."""
    found: list[Path] = []
    read = digests._read
    monkeypatch.setattr(digests, "_read", lambda path, size: found.append(path) or read(path, size))
    monkeypatch.setattr(digests, "LARGE", 1000)
    monkeypatch.setattr(digests, "SETTLED", -1e6)
    monkeypatch.setattr(digests, "_known", {})
    monkeypatch.setenv("ALIGNBENCH_CACHE", str(tmp_path / "cache"))
    return found


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(bytes(4000))
    return path


def rewrite(path: Path, content: bytes) -> None:
    """Write other content in place, with the modification time that the file had."""
    before = os.stat(path)
    while os.stat(path).st_ctime_ns == before.st_ctime_ns:  # a file system's clock ticks a few hundred times a second
        with path.open("r+b") as file:
            file.write(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("place", [0, 1000, 1777, 3999])
def test_every_byte_counts(weights, reads, place):
    """One flipped byte anywhere in a large file is another content, at the same path, size and modification time."""
    assert file_digest(weights) == sha256(bytes(4000)).hexdigest()
    changed = bytearray(4000)
    changed[place] ^= 1
    rewrite(weights, changed)
    assert file_digest(weights) == sha256(changed).hexdigest()


def test_a_large_file_is_read_once_by_all_processes(weights, reads):
    """The digest is kept in the user's cache with path, size, times and inode; a small file's only in the process."""
    small = weights.with_name("config.json")
    small.write_text("{}")
    found = [file_digest(path) for path in (weights, small, weights, small)]
    assert reads == [weights, small]
    digests._known.clear()  # as in another process
    assert [file_digest(weights), file_digest(small)] == found[:2]
    assert reads == [weights, small, small]
    (record,) = (cache() / "digests").iterdir()
    assert record.stat().st_mode & 0o077 == 0


def test_another_file_at_the_same_path_is_read(weights, reads, tmp_path):
    """A file moved into place, or a link that points elsewhere (a hub snapshot), has another inode or real path."""
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    before = file_digest(weights)
    other = tmp_path / "other"
    other.write_bytes(bytes(3999) + b"x")
    os.utime(other, ns=times)
    link = tmp_path / "snapshot.safetensors"
    link.symlink_to(weights)
    assert file_digest(link) == before
    assert len(reads) == 1
    link.unlink()
    link.symlink_to(other)
    assert file_digest(link) == sha256(other.read_bytes()).hexdigest()
    other.replace(weights)
    assert file_digest(weights) == sha256(bytes(3999) + b"x").hexdigest()


def test_every_shard_counts(tmp_path, reads):
    """A change in the last shard of a folder changes its fingerprint; moving the folder does not."""
    shards = [tmp_path / "model" / f"model-{i}-of-3.safetensors" for i in (1, 2, 3)]
    shards[0].parent.mkdir()
    for i, shard in enumerate(shards):
        shard.write_bytes(bytes([i]) * 2000)
    before = fingerprint(shards)
    moved = [shard.rename(tmp_path / shard.name) for shard in shards]
    assert fingerprint(moved) == before
    moved[2].write_bytes(bytes([2]) * 1999 + b"x")
    assert fingerprint(moved) != before


def test_a_file_that_just_changed_is_read_again(weights, reads, monkeypatch):
    """Within two seconds of its last change a file could change again at the same times, so nothing is kept."""
    monkeypatch.setattr(digests, "SETTLED", 2.0)
    file_digest(weights)
    weights.write_bytes(b"x" * 4000)
    assert file_digest(weights) == sha256(b"x" * 4000).hexdigest()
    assert not cache().exists()


def test_a_file_that_changes_while_it_is_read_is_refused(weights, monkeypatch):
    """One line says so: a download under way has no digest."""

    def read(path: Path, size: int) -> str:
        path.write_bytes(bytes(5000))
        return "half"

    monkeypatch.setattr(digests, "_read", read)
    with pytest.raises(UserError, match=rf"^{weights}: changed while it was read; wait until it is written"):
        file_digest(weights)


def flip(record: Path) -> None:
    """Replace the digest by another one, in a record that is still valid JSON."""
    (file, digest), check = json.loads(record.read_text())
    record.write_text(json.dumps([[file, digest[::-1]], check]))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda record: record.write_bytes(b""), id="empty"),
        pytest.param(lambda record: record.write_bytes(record.read_bytes()[:-9]), id="truncated"),
        pytest.param(lambda record: record.write_text("[null, 3]"), id="something else"),
        pytest.param(flip, id="another digest"),
        pytest.param(lambda record: (record.unlink(), record.mkdir()), id="a folder"),
    ],
)
def test_a_damaged_record_is_not_believed(weights, reads, damage):
    """The file is read again."""
    before = file_digest(weights)
    (record,) = (cache() / "digests").iterdir()
    damage(record)
    digests._known.clear()
    assert file_digest(weights) == before
    assert len(reads) == 2


def test_another_users_record_is_not_believed(weights, reads, monkeypatch):
    """In a cache that users share, each reads the file itself."""
    before = file_digest(weights)
    digests._known.clear()
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert file_digest(weights) == before
    assert len(reads) == 2


def test_a_cache_that_cannot_be_written_costs_time_alone(weights, reads, monkeypatch, tmp_path):
    """A file in the way of the folder, or a user without a home: the digest is right, and nothing is raised."""
    (tmp_path / "cache").write_text("not a folder")
    assert file_digest(weights) == sha256(bytes(4000)).hexdigest()

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(digests, "cache", homeless)
    digests._known.clear()
    assert file_digest(weights) == sha256(bytes(4000)).hexdigest()


def test_writers_at_once_leave_a_whole_record(weights, reads):
    """Eight threads that all hash the file leave one valid record and no temporary file."""

    def hashed(_: int) -> str:
        digests._known.clear()
        return file_digest(weights)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(hashed, range(64))) == {sha256(bytes(4000)).hexdigest()}
    assert len(os.listdir(cache() / "digests")) == 1
    digests._known.clear()
    count = len(reads)
    file_digest(weights)
    assert len(reads) == count


def test_a_long_read_is_announced_with_its_time(weights, reads, monkeypatch, capsys):
    """One line on stderr has the file, its size and the seconds; the second time there is none."""
    monkeypatch.setattr(digests, "LONG", 4000)
    file_digest(weights)
    assert capsys.readouterr().err == f"alignbench: hashing {weights} (0.0 GB), once: 0 s\n"
    file_digest(weights)
    assert capsys.readouterr().err == ""
