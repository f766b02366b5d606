"""What a run on one machine opens: the kernel's tables of sockets, and an attack on all of them."""

import fcntl
import ipaddress
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch.distributed as dist

from runs import SMALL, TRAIN, only_run, summary

RANKS = 2
LISTEN = "0A"  # the state in the kernel's tables
NAME = "a-name-for-a-test"

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/net/tcp").is_file(), reason="reads Linux' tables of sockets"
)

HOLD = '''
import os, pathlib, time
from lightning.pytorch.callbacks import Callback

class Hold(Callback):
    """Says that this process trains, and lets it wait in the middle of training."""
    def __init__(self, folder: str):
        self.folder = pathlib.Path(folder)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            (self.folder / f"{os.getpid()} {os.environ['TORCHELASTIC_RUN_ID']}").touch()
            while not (self.folder / "go").exists():
                time.sleep(0.02)
'''

# Puts a pickle into the store at each address that it reads; who unpickles it makes a file. What is
# no store never answers, so each address has a thread, and the process does not wait for them. The
# last seconds are for the run: an elastic launcher would look into its store every second.
ATTACK = """
import base64, datetime, os, pathlib, pickle, sys, threading, time
from torch.distributed import TCPStore

class Evil:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(sys.argv[1]),)

def put(run_id, host, port):
    wait = datetime.timedelta(seconds=2)
    store = TCPStore(host, int(port), timeout=wait, wait_for_workers=False)
    store.set(f"torch.rendezvous.{run_id}", base64.b64encode(pickle.dumps(Evil())).decode())
    print("taken by", host, port, flush=True)

for line in sys.stdin:
    threading.Thread(target=put, args=line.split(), daemon=True).start()
time.sleep(3)
os._exit(0)
"""


def session(leader):
    """The ids of all processes in a session; the leader's descendants are in it."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            if entry.name.isdigit() and os.getsid(int(entry.name)) == leader:
                yield int(entry.name)


def sockets(pid):
    """The inodes of a process's sockets."""
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                kind, _, inode = os.readlink(file).rstrip("]").partition(":[")
                if kind == "socket":
                    yield inode


def address(text):
    """An address and port of the tables: words of 32 bits in the order of this machine."""
    words, port = text.split(":")
    parts = [int(words[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(words), 8)]
    found = ipaddress.ip_address(b"".join(parts))
    return getattr(found, "ipv4_mapped", None) or found, int(port, 16)


def listening(leader):
    """Each process of a session with each address and port that it listens on."""
    owners = [(pid, inode) for pid in session(leader) for inode in sockets(pid)]
    table = {}
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/{leader}/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN:
                    table[fields[9]] = address(fields[1])
    return {(pid, *table[inode]) for pid, inode in owners if inode in table}


def reachable(host):
    """Where to connect to what listens on ``host``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(host), str(host))


@pytest.fixture
def run_and_attack(tmp_path):
    """Watches a run all its life, and attacks it while its ranks are training."""
    (tmp_path / "hold.py").write_text(HOLD)
    notes, cwd, evil = tmp_path / "notes", tmp_path / "cwd", tmp_path / "evil"
    notes.mkdir()
    cwd.mkdir()
    line = [sys.executable, str(TRAIN), *SMALL, f"trainer.devices={RANKS}", "epochs=1"]
    line += ["+callbacks.hold._target_=hold.Hold", f"+callbacks.hold.folder={notes}"]
    path = {"PYTHONPATH": str(tmp_path)}
    attack = [sys.executable, "-c", ATTACK, str(evil)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def run_and_attack(*prefix, **variables):
        env = {**os.environ, **path, **variables}
        process = subprocess.Popen([*prefix, *line], cwd=cwd, env=env, start_new_session=True)
        attacker = subprocess.Popen(attack, **pipes)
        a_store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        found, training, taken = set(), [], None
        try:
            while process.poll() is None:
                found |= listening(process.pid)
                if taken is None and len(training := list(notes.iterdir())) == RANKS:
                    found |= listening(process.pid)
                    run_id = training[0].name.split()[1]
                    targets = {f"{run_id} {reachable(host)} {port}\n" for _, host, port in found}
                    targets.add(f"{run_id} 127.0.0.1 {a_store.port}\n")
                    taken, _ = attacker.communicate("".join(targets))
                    (notes / "go").touch()
                time.sleep(0.02)
        finally:
            process.kill()
            attacker.kill()
        ranks = {int(note.name.split()[0]) for note in training}
        assert len(ranks) == RANKS
        assert ranks <= {pid for pid, _, _ in found}  # else nobody has looked at them
        assert sorted({str(host) for _, host, _ in found if not host.is_loopback}) == []
        assert not evil.exists()
        # By the store that is there to be attacked, and by nothing of the run.
        assert taken == f"taken by 127.0.0.1 {a_store.port}\n"
        assert process.returncode == 0
        assert summary(only_run(cwd))["status"] == "completed"

    return run_and_attack


@pytest.mark.long
@pytest.mark.slow
def test_a_run_on_one_machine_listens_on_loopback_only(run_and_attack):
    run_and_attack()


# -------------------------------------------------------------------------------- other hosts


def outer():
    """An interface that leads to other hosts, and its address."""
    for _, name in socket.if_nameindex():
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            request = struct.pack("256s", name.encode())
            answer = fcntl.ioctl(any_socket, 0x8915, request)  # SIOCGIFADDR
            if not (host := socket.inet_ntoa(answer[20:24])).startswith("127."):
                return name, host
    pytest.skip("this machine has no address but loopback")


def renamed(folder, host=None):
    """What starts a command on a host of another name, which leads to this address or nowhere."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare, which gives a host another name")
    files = {"hosts": "127.0.0.1 localhost\n", "nsswitch.conf": "hosts: files\n"}
    if host is not None:
        files["hosts"] += f"{host} {NAME}\n"
    script = f"hostname {NAME}"
    for name, content in files.items():
        (folder / name).write_text(content)
        script += f" && mount --bind '{folder / name}' /etc/{name}"
    user = [] if os.getuid() == 0 else ["--map-root-user"]
    start = ["unshare", *user, "--uts", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh"]
    ask = "import socket; print(socket.gethostbyname(socket.gethostname()))"
    told = subprocess.run([*start, sys.executable, "-c", ask], capture_output=True, text=True)
    if told.returncode and "gaierror" not in told.stderr:
        pytest.skip(f"a host cannot be given another name here: {told.stderr.strip()}")
    assert told.stdout.strip() == (host or "")
    return start


@pytest.mark.long
def test_also_where_the_hosts_name_leads_to_an_outer_address(run_and_attack, tmp_path):
    _, host = outer()
    run_and_attack(*renamed(tmp_path, host))


@pytest.mark.long
def test_also_where_the_hosts_name_leads_nowhere(run_and_attack, tmp_path):
    run_and_attack(*renamed(tmp_path))


@pytest.mark.long
def test_also_where_the_user_has_named_an_outer_interface(run_and_attack):
    name, _ = outer()
    run_and_attack(GLOO_SOCKET_IFNAME=name, NCCL_SOCKET_IFNAME=name)
