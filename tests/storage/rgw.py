"""A real S3 server on loopback: Ceph's RADOS gateway with one monitor, one manager and one store in memory.

Debian's packages `radosgw ceph-mon ceph-osd ceph-mgr ceph-common` are all that it needs; it runs as root only.
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ACCESS_KEY, SECRET_KEY = "RGWACCESSKEY", "rgw-sEcReT-key"
_PROGRAMS = ("ceph", "ceph-mon", "ceph-mgr", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")

_CONFIG = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]
public network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc secure
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
osd objectstore = memstore
memstore device bytes = 4G
osd max object name len = 256
osd max object namespace len = 64
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
pid file = {folder}/$name.pid
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
[mgr.x]
mgr data = {folder}/mgr
[client.rgw.x]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


def missing() -> str:
    """Why no gateway can be started here, "" if one can."""
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"Ceph is not installed ({', '.join(absent)}): apt-get install radosgw ceph-mon ceph-osd ceph-mgr ceph-common"
    return "" if os.geteuid() == 0 else "Ceph's daemons start as root only"


@contextmanager
def gateway(folder: Path) -> Iterator[str]:
    """The address of a fresh server; everything that was started is stopped at the end."""
    mon_v2, mon_v1, port = _free_ports(3)
    for name in ("mon", "osd", "mgr", "rgw"):
        (folder / name).mkdir(parents=True)
    config = folder / "ceph.conf"
    fsid = uuid.uuid4()
    config.write_text(_CONFIG.format(fsid=fsid, folder=folder, mon_v2=mon_v2, mon_v1=mon_v1, port=port))
    try:
        _start(config, folder, f"[v2:127.0.0.1:{mon_v2},v1:127.0.0.1:{mon_v1}]", str(fsid))
        endpoint = f"http://127.0.0.1:{port}"
        _until(lambda: _answers(endpoint), "the gateway does not answer")
        keys = ["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY]
        _run(config, "radosgw-admin", "user", "create", "--uid=test", "--display-name=test", *keys)
        yield endpoint
    finally:
        _stop(folder)


@contextmanager
def bucket(endpoint: str, name: str, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the AWS variables lead to the server, and make sure of a bucket there."""
    import boto3

    from fmristream.storage.s3_client import S3Client

    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3Client.clear_instance_cache()  # clients of another server
    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket=name)
    client.close()
    try:
        yield
    finally:
        S3Client.clear_instance_cache()


def _start(config: Path, folder: Path, address: str, fsid: str) -> None:
    monitors = str(folder / "monmap")
    _run(config, "monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, monitors)
    _run(config, "ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors)
    _run(config, "ceph-mon", "-i", "a")
    _run(config, "ceph", "-s")
    _run(config, "ceph-mgr", "-i", "x")
    osd = str(uuid.uuid4())
    _run(config, "ceph", "osd", "new", osd)
    _run(config, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    _run(config, "ceph", "osd", "crush", "add", "osd.0", "1.0", "host=localhost", "root=default")
    _run(config, "ceph-osd", "-i", "0")
    _until(lambda: "1 up" in _run(config, "ceph", "osd", "stat"), "the object store does not come up")
    _run(config, "radosgw", "-n", "client.rgw.x")


def _run(config: Path, program: str, *arguments: str) -> str:
    with tempfile.TemporaryFile("w+") as said:  # not a pipe: daemons would keep it open
        done = subprocess.run([program, "-c", config, *arguments], stdout=said, stderr=said, timeout=120)
        said.seek(0)
        text = said.read()
    assert done.returncode == 0, f"{program} {' '.join(arguments)}: {text[-2000:]}"
    return text


def _stop(folder: Path) -> None:
    pids = []
    for name in ("client.rgw.x", "osd.0", "mgr.x", "mon.a"):
        with suppress(FileNotFoundError, ValueError, ProcessLookupError):
            pids.append(int((folder / f"{name}.pid").read_text()))
            os.kill(pids[-1], signal.SIGKILL)  # nothing of it is kept
    _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "a daemon does not end")


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _until(holds, otherwise: str, *, limit_s: float = 90) -> None:
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, otherwise
        time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
