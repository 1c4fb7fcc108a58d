"""A private SLURM on this machine: munge, MariaDB, slurmdbd, slurmctld and two nodes, all below one folder.

    python tests/slurm/cluster.py start FOLDER    # prints the line that points SLURM's commands at it
    python tests/slurm/cluster.py stop FOLDER

Needs root on Debian; missing packages are installed. Sockets, keys, state, spool and logs are in FOLDER, and free ports
are used, so an existing SLURM, munge or MariaDB of the machine is not touched. Works without systemd.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

PROGRAMS = {  # program -> its Debian package
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "slurmdbd": "slurmdbd",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
NODES = ("n0", "n1")
CPUS = 4  # claimed by each node; jobs as small as those of the tests share the real ones
MEMORY = 8000  # megabytes claimed by each node
PATIENCE = 120.0  # seconds, enough for a busy machine
OWNER = "ALIGNBENCH_TEST_CLUSTER"  # in the environment of every daemon: the folder it belongs to

CONF = """\
ClusterName=alignbench
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd-%n
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting_port}
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=associations,limits,qos
EnforcePartLimits=ALL
ReturnToService=2
JobRequeue=1
KillWait=2
MessageTimeout=60
SlurmdTimeout=30
# a real cluster plans every half minute
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
# the claimed processors and memory, not those the machine has
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=UNLIMITED DefaultTime=60
PartitionName=short Nodes=ALL MaxTime=2
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={memory}"

ACCOUNTING = """\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={accounting_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm
"""


class NoCluster(Exception):
    """Error: a cluster is not possible on this machine, or did not start."""


def unsupported_reason() -> str | None:
    """Return why this machine cannot have a cluster; None if it can."""
    if not Path("/etc/debian_version").exists():
        return "a test cluster needs Debian's packages, and this is not Debian"
    if os.geteuid() != 0:
        return "a test cluster needs root"
    return None


def install() -> None:
    """Install the Debian packages of missing programs. Raise NoCluster if that fails."""
    missing = [package for program, package in PROGRAMS.items() if not _which(program)]
    if not missing:
        return
    # RUNLEVEL: do not start the services of the packages
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", "-q", *words], env=quiet, capture_output=True, text=True)
        if done.returncode:
            raise NoCluster(f"apt-get {' '.join(words)}: {(done.stderr or done.stdout).strip()[-500:]}")


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


class Row(NamedTuple):
    """A job, or a task of an array, as ``squeue`` shows it."""

    id: str  # 12, or 12_0 for a task
    state: str
    reason: str
    restarts: int
    node: str


@dataclass
class Cluster:
    """A running cluster. Commands raise CalledProcessError with SLURM's message."""

    folder: Path

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables of every command and every daemon."""
        return {"SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

    # -- from nothing to idle nodes -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Start, and return when all nodes are idle. If that fails, clean up and raise NoCluster with the logs."""
        install()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # other users' commands read slurm.conf and talk to munge
        if (self.folder / "log").exists():
            raise NoCluster(f"{self.folder}: contains a cluster; stop it first")
        for name in ("log", "state"):
            (self.folder / name).mkdir()
        try:
            self._configure()
            self._start_munge()
            self._start_database()
            accounting = self._start_daemon("slurmdbd", "-D")  # reads the slurmdbd.conf beside slurm.conf
            self._until(lambda: self._answers("sacctmgr", "-i", "add", "cluster", "alignbench"), accounting)
            self._run("sacctmgr", "-i", "add", "account", "test")
            self.admit("root")
            self.start_controller()
            for node in NODES:
                self.start_node(node)
        except BaseException as error:
            logs = self.logs()
            stop(self.folder)
            if isinstance(error, (NoCluster, subprocess.SubprocessError)):
                raise NoCluster(f"{error}\n{logs}") from error
            raise

    def _configure(self) -> None:
        controller, accounting, database, *ports = _free_ports(3 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        values = {
            "folder": self.folder,
            "host": host,
            "controller_port": controller,
            "accounting_port": accounting,
            "database_port": database,
            "password": secrets.token_hex(16),
        }
        nodes = [
            NODE.format(name=name, host=host, port=port, cpus=CPUS, memory=MEMORY) for name, port in zip(NODES, ports)
        ]
        self.conf.write_text(CONF.format(nodes="\n".join(nodes), **values))
        secret = self.folder / "slurmdbd.conf"
        secret.touch(0o600)
        secret.write_text(ACCOUNTING.format(**values))
        (self.folder / "database.sql").touch(0o600)
        (self.folder / "database.sql").write_text(
            "CREATE DATABASE IF NOT EXISTS slurm;\n"
            f"CREATE OR REPLACE USER slurm@'127.0.0.1' IDENTIFIED BY '{values['password']}';\n"
            "GRANT ALL ON slurm.* TO slurm@'127.0.0.1';\n"
        )
        self._database_port = database

    def _start_munge(self) -> None:
        """Start a private daemon; that of the machine, if any, keeps its key and its socket."""
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        daemon = self._start_daemon(
            "munged",
            "--foreground",
            "--force",  # the folder may lie below a world-writable one
            f"--key-file={key}",
            f"--socket={self.folder}/munge.socket",
            f"--pid-file={self.folder}/munged.pid",
            f"--seed-file={self.folder}/munge.seed",
            f"--log-file={self.folder}/log/munged",
        )
        self._until((self.folder / "munge.socket").exists, daemon)

    def _start_database(self) -> None:
        files = self.folder / "database"
        common = ["--no-defaults", "--user=root", f"--datadir={files}"]
        self._run("mariadb-install-db", *common, "--skip-test-db", "--auth-root-authentication-method=normal")
        daemon = self._start_daemon(
            "mariadbd",
            *common,
            f"--socket={self.folder}/mariadb.socket",
            f"--pid-file={self.folder}/mariadb.pid",
            f"--log-error={self.folder}/log/mariadb",
            f"--init-file={self.folder}/database.sql",
            "--bind-address=127.0.0.1",
            f"--port={self._database_port}",
            "--skip-name-resolve",
            "--innodb-flush-log-at-trx-commit=0",  # nothing in it outlives the tests
        )

        def listens() -> bool:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._database_port), 1.0):
                return True
            return False

        self._until(listens, daemon)

    def _start_daemon(self, program: str, *words: str) -> subprocess.Popen[bytes]:
        """Start a daemon in its own session, so that Ctrl-C in pytest does not reach it."""
        environment = os.environ | self.environment | {OWNER: str(self.folder)}
        for name in [name for name in environment if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del environment[name]  # set if the tests run in a job
        with (self.folder / "log" / "output").open("a") as output:
            return subprocess.Popen(
                [_which(program) or program, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=self.folder,
            )

    def start_controller(self) -> None:
        self._until(lambda: self._answers("scontrol", "ping"), self._start_daemon("slurmctld", "-D"))

    def stop_controller(self) -> None:
        """Stop slurmctld. It saves its state; job events go unnoticed until it is started again."""
        pids = [pid for pid in owned(self.folder) if _name(pid) == "slurmctld"]
        _kill(pids, signal.SIGTERM)

    def start_node(self, node: str) -> None:
        """Start a node, and return when it accepts jobs."""
        daemon = self._start_daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self.nodes()[node] in ("idle", "mixed", "allocated"), daemon)

    def stop_node(self, node: str) -> None:
        """Kill a node's slurmd with -9; its jobs continue unnoticed."""
        _kill([pid for pid in owned(self.folder) if _name(pid) == "slurmd" and node in _words(pid)])

    def _until(self, ready: Callable[[], bool], daemon: subprocess.Popen[bytes]) -> None:
        """Wait until ``daemon`` is ready. Raise NoCluster if it ends, or takes too long."""
        deadline = time.monotonic() + PATIENCE
        while not ready():
            if daemon.poll() is not None:
                raise NoCluster(f"{' '.join(map(str, daemon.args))}: ended with {daemon.returncode}")
            if time.monotonic() > deadline:
                raise NoCluster(f"{' '.join(map(str, daemon.args))}: not ready after {PATIENCE:.0f} s")
            time.sleep(0.1)

    def logs(self, lines: int = 15) -> str:
        """Return the end of every non-empty log."""
        texts = []
        for path in sorted((self.folder / "log").iterdir()):
            if text := path.read_text(errors="replace").strip():
                texts.append(f"-- {path.name}\n" + "\n".join(text.splitlines()[-lines:]))
        return "\n".join(texts)

    # -- SLURM's commands ---------------------------------------------------------------------------------------------

    def _run(self, *command: str, **options: Any) -> str:
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=PATIENCE, **options
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def _answers(self, *command: str) -> bool:
        try:
            self._run(*command)
        except subprocess.CalledProcessError:
            return False
        return True

    def sbatch(self, *words: str, script: str) -> str:
        """Submit a bash script, and return the job's id."""
        text = script if script.startswith("#!") else f"#!/bin/bash\n{script}\n"
        return self._run("sbatch", "--parsable", *words, input=text).strip()

    def squeue(self, *jobs: str) -> list[Row]:
        """Return a row per task; ended tasks stay for some minutes. ``jobs``: ids of arrays or tasks; none: all."""
        form = ["--noheader", "--array", "--states=all", "-O", "JobArrayID:|,State:|,Reason:|,RestartCnt:|,NodeList:"]
        rows = [line.split("|") for line in self._run("squeue", *form).splitlines()]
        tasks = [Row(id, state, reason, int(restarts), node) for id, state, reason, restarts, node in rows]
        return [row for row in tasks if not jobs or row.id in jobs or row.id.partition("_")[0] in jobs]

    def sacct(self, job: str) -> dict[str, str]:
        """Return the state of a job, or of every task of an array, by id."""
        lines = self._run("sacct", "-X", "-P", "-n", "-j", job, "-o", "JobID,State").splitlines()
        return {id: state for id, _, state in (line.partition("|") for line in lines)}

    def nodes(self) -> dict[str, str]:
        """Return the state of every node: idle, mixed, allocated, drained, down ..."""
        return dict(line.split() for line in self._run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines())

    def wait(self, condition: Callable[[], Any], timeout: float = PATIENCE, every: float = 0.3) -> Any:
        """Return the first true value of ``condition``. Raise AssertionError with the queue if it takes too long."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            if time.monotonic() > deadline:
                queue = "\n".join(str(row) for row in self.squeue())
                raise AssertionError(f"still waiting after {timeout:.0f} s; the queue:\n{queue}")
            time.sleep(every)
        return value

    def ended(self, job: str, timeout: float = PATIENCE) -> dict[str, str]:
        """Wait until a job, or every task of an array, has ended, and return the states by id."""
        over = re.compile("COMPLETED|FAILED|CANCELLED|TIMEOUT|NODE_FAIL|OUT_OF_MEMORY|DEADLINE")

        def states() -> dict[str, str] | None:
            rows = {row.id: row.state for row in self.squeue(job)}
            return rows if rows and all(over.match(state) for state in rows.values()) else None

        return self.wait(states, timeout)

    def admit(self, user: str) -> None:
        """Allow a user of the machine to submit jobs."""
        self._run("sacctmgr", "-i", "add", "user", user, "account=test")

    def cancel(self, *jobs: str) -> None:
        self._run("scancel", *jobs)

    def requeue(self, job: str) -> None:
        """Requeue a job, as a preemption would; it restarts in seconds instead of SLURM's two minutes."""
        self._run("scontrol", "requeue", job)
        self.hurry(job)

    def hurry(self, job: str) -> None:
        """Make a requeued job start soon."""
        self.wait(lambda: any(row.reason == "BeginTime" for row in self.squeue(job)))
        time.sleep(2)  # any sooner, slurmd mistakes it for the killed job and refuses it
        self._run("scontrol", "update", f"jobid={job}", "StartTime=now")

    def drain(self, node: str) -> None:
        self._run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")

    def resume(self, node: str) -> None:
        self._run("scontrol", "update", f"nodename={node}", "state=resume")

    def restart_controller(self) -> None:
        self.stop_controller()
        self.start_controller()

    def processes(self, job: str, rank: int = 0) -> list[int]:
        """Return the Python processes of a rank of a running job (12) or task (12_0)."""
        array, _, task = job.partition("_")
        ids = [f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}"] if task else [f"SLURM_JOB_ID={job}"]
        variables = {*ids, f"SLURM_CONF={self.conf}", f"SLURM_PROCID={rank}"}
        return [pid for pid in _pids() if variables <= _environ(pid) and _name(pid).startswith("python")]

    def kill_job_process(self, job: str, rank: int = 0) -> None:
        """Kill the Python of a job's rank with -9, as the kernel does when memory runs out."""
        _kill(self.wait(lambda: self.processes(job, rank)))


# -- processes --------------------------------------------------------------------------------------------------------


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and int(path.name) != os.getpid()]


def _environ(pid: int) -> set[str]:
    with suppress(OSError):
        return set(Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"))
    return set()


def _words(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    return []


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def owned(folder: Path) -> list[int]:
    """Return the processes of the cluster in ``folder``: daemons, and those of jobs."""
    job = f"SLURM_CONF={folder / 'slurm.conf'}"
    pids = []
    for pid in _pids():
        variables = _environ(pid)
        in_job = job in variables and any(variable.startswith("SLURM_JOB_ID=") for variable in variables)
        if f"{OWNER}={folder}" in variables or in_job:
            pids.append(pid)
    return pids


def _kill(pids: Sequence[int], how: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal, and wait until the processes are gone."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, how)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(_alive(pid) for pid in pids):
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # reaps it if it is a child of this process
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def stop(folder: Path) -> None:
    """End everything that belongs to the cluster in ``folder``, and remove the folder."""
    while pids := [pid for pid in owned(folder) if _alive(pid)]:  # repeat: a daemon may have started another
        _kill(pids)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running() -> Iterator[Cluster]:
    """Yield a cluster in a temporary folder. It ends with this process, however that ends."""
    folder = Path(tempfile.mkdtemp(prefix="alignbench-slurm-"))
    command = [sys.executable, __file__, "stop", str(folder), "--after-stdin"]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert guard.stdin is not None
    try:
        cluster = Cluster(folder)
        cluster.start()
        before = dict(os.environ)
        os.environ.update(cluster.environment)
        try:
            yield cluster
        finally:
            os.environ.clear()
            os.environ.update(before)
    finally:
        guard.stdin.close()
        guard.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("start", "stop"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--after-stdin", action="store_true", help="stop when stdin ends")
    given = parser.parse_args()
    folder = given.folder.resolve()
    if given.what == "stop":
        if given.after_stdin:
            sys.stdin.buffer.read()
        stop(folder)
        return 0
    try:
        if reason := unsupported_reason():
            raise NoCluster(reason)
        Cluster(folder).start()
    except NoCluster as error:
        print(error, file=sys.stderr)
        return 1
    print(f"export SLURM_CONF={folder}/slurm.conf")
    return 0


if __name__ == "__main__":
    sys.exit(main())
