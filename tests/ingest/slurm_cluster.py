"""A real Slurm of one machine that looks like two nodes: Debian's daemons, started in a folder and stopped again.

It takes root (slurmd does) and `apt-get install slurmctld slurmd slurm-client`; users are not authenticated, so it
listens on loopback names of this machine only for as long as a test runs.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NODES = 2

CONFIGURATION = """\
ClusterName=fmristream
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
InactiveLimit=0
MailProg=/bin/true
SchedulerParameters=sched_interval=1
PartitionName=batch Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def why_not() -> str:
    """Why there can be no Slurm here; empty where there can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "squeue") if shutil.which(name) is None]
    if missing:
        return f"no {missing[0]} here: apt-get install slurmctld slurmd slurm-client"
    return "" if os.geteuid() == 0 else "slurmd runs as root only"


@contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """Slurm's commands, in this process's environment, reach a cluster that is there for the block."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    ports = _free_ports(NODES + 1)
    lines = [
        f"NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n]} CPUs=2 RealMemory=4000 State=UNKNOWN"
        for n in range(1, NODES + 1)
    ]
    text = CONFIGURATION.format(host=host, port=ports[0], folder=folder, nodes=NODES)
    configuration = folder / "slurm.conf"
    configuration.write_text(text.replace("PartitionName", "\n".join([*lines, "PartitionName"])))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(configuration)
    commands = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", f"n{n}"] for n in range(1, NODES + 1))]
    daemons = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        for command in commands
    ]
    try:
        _wait_until_idle(folder)
        yield
    finally:
        subprocess.run(["scancel", "--user", "root"], capture_output=True, timeout=30, check=False)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(daemon.pid, signal.SIGKILL)
                daemon.wait()
        del os.environ["SLURM_CONF"]
        if before is not None:
            os.environ["SLURM_CONF"] = before


def jobs() -> list[str]:
    """`number state` of every job that waits or runs; array tasks each for themselves."""
    command = ["squeue", "--noheader", "--array", "--format", "%i %T"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")[:-1]


def wait_for_jobs(timeout_s: float) -> None:
    """Until none waits or runs."""
    deadline = time.monotonic() + timeout_s
    while found := jobs():
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _wait_until_idle(folder: Path) -> None:
    deadline = time.monotonic() + 60
    command = ["sinfo", "--noheader", "--format", "%D %T"]
    while subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() != f"{NODES} idle":
        assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
        time.sleep(0.2)
