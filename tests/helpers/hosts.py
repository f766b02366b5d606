"""Two hosts on one machine: network namespaces with names, addresses and folders of their own."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("alpha", "beta")


def ip(*arguments: str) -> str:
    """What ``ip`` prints."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def why_not() -> str | None:
    """Why this machine cannot play two hosts, or None."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if missing := [name for name in ("ip", "unshare") if shutil.which(name) is None]:
        return f"needs the command {missing[0]}"
    name = f"probe{os.getpid()}"
    tried = [
        ["ip", "netns", "add", name],
        ["ip", "-n", name, "link", "add", "br0", "type", "bridge"],
        ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "hostname", name],
    ]
    try:
        for line in tried:
            done = subprocess.run(line, capture_output=True, text=True)
            if done.returncode:
                return f"{' '.join(line)}: {done.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None


@dataclass
class Host:
    """One host; ``folder`` is what it sees at ``work``."""

    name: str
    address: str
    namespace: str
    port: tuple[str, str]  # the switch, and where the host's cable is plugged in
    hosts: Path
    folder: Path
    work: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *line: str, env: Mapping[str, str] | None = None) -> "Command":
        """Start a command in the work folder."""
        script = f"hostname {self.name} && mount --bind '{self.hosts}' /etc/hosts"
        script += f" && mount --bind '{self.folder}' '{self.work}'"
        script += f" && cd '{self.work}' && exec \"$@\""
        into = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount"]
        output = self.hosts.with_name(f"{self.name}_{len(self.started)}.log")
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*into, "sh", "-c", script, "sh", *line],
                env={**os.environ, **(env or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return Command(self, process, output)

    def kill(self) -> None:
        """SIGKILL for all its processes."""
        for pid in ip("netns", "pids", self.namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def plug(self, state: str) -> None:
        """Pull its cable (``down``), or put it in again (``up``)."""
        switch, port = self.port
        ip("-n", switch, "link", "set", port, state)


@dataclass
class Command:
    """A command that a host runs."""

    host: Host
    process: subprocess.Popen[bytes]
    output: Path

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def end(self, seconds: float) -> tuple[int | None, str]:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        return code, self.said()


@contextmanager
def two_hosts(folder: Path, shared: bool = True, loop: bool = False) -> Iterator[list[Host]]:
    """Two hosts on one switch.

    Args:
        folder: an empty folder of this machine.
        shared: both see the same work folder; otherwise each has its own at the same path.
        loop: each takes its own name for 127.0.1.1, as Debian writes it in /etc/hosts.
    """
    key = f"s{os.getpid()}"
    switch, work = f"{key}x", folder / "work"
    work.mkdir(parents=True)
    addresses = [f"10.77.0.{i + 1}" for i in range(2)]
    hosts: list[Host] = []
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for i, name in enumerate(NAMES):
            space, port = f"{key}h{i}", f"p{i}"
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", switch, "link", "add", port, "type", "veth", "peer", "eth0", "netns", space)
            ip("-n", switch, "link", "set", port, "master", "br0", "up")
            ip("-n", space, "addr", "add", f"{addresses[i]}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            etc = folder / f"hosts_{name}"
            lines = ["127.0.0.1 localhost"] + [
                f"{'127.0.1.1' if loop and other == name else a} {other}"
                for a, other in zip(addresses, NAMES, strict=True)
            ]
            etc.write_text("\n".join(lines) + "\n")
            own = work if shared else folder / f"work_{name}"
            own.mkdir(exist_ok=True)
            hosts.append(Host(name, addresses[i], space, (switch, port), etc, own, work))
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            for process in host.started:
                process.wait()
        for space in [switch, *(host.namespace for host in hosts)]:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
