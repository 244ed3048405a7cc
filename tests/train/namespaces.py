"""Machines that are network namespaces of this one, each with one address of its own, on one switch; it takes root."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_ADDRESSES = "10.213.77"  # nothing outside the namespaces sees them


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A namespace and its address."""

    name: str
    address: str

    def command(self, words: Sequence[str]) -> list[str]:
        """The same command, run there."""
        return ["ip", "netns", "exec", self.name, *words]


def why_not() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if shutil.which("ip") is None:
        return "no ip here: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces take root"
    try:
        with machines(1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"


@contextlib.contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """That many machines, for the block."""
    prefix = f"fs{os.getpid()}"
    switch = f"{prefix}-switch"
    made = [Machine(name=f"{prefix}-{n}", address=f"{_ADDRESSES}.{n + 1}") for n in range(count)]
    with contextlib.ExitStack() as stack:
        for name in (switch, *(machine.name for machine in made)):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for number, machine in enumerate(made):
            port = f"port{number}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", machine.name)
            _ip("-n", switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "eth0")
            _ip("-n", machine.name, "link", "set", "eth0", "up")
        yield made


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)
