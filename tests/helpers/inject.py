"""``train.py`` with a fault, in forks of a process that has imported torch and Lightning.

A fault is ``(name, at)``: what happens, and when: ``pass:N`` in the N-th forward pass of training
(a SAM step has two), ``between:N`` behind the N-th perturbation, before its second pass,
``save:N`` as the N-th checkpoint begins to be written, ``test:1`` as the test begins, or
``tested:1`` when its results are logged and ``metrics.json`` is not yet written.
"""

import errno
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

import sam_lightning.optim.sam as sam
import sam_lightning.runs.record as results
import sam_lightning.training.checkpoint_io as checkpoint_io
from sam_lightning.config.conf import CONF
from sam_lightning.training.callbacks.last_checkpoint import LastCheckpoint
from sam_lightning.training.module import SAMModule

TRAIN = str(CONF.parent / "train.py")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["sam_lightning.training.run", "sklearn.datasets", "torch._dynamo", "torchvision.transforms.v2"]
)


def happen(name):
    if name == "full_disk":  # what a process may write to one file, which the weights exceed
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    elif name == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    elif name == "gone":
        shutil.rmtree("logs")
    elif name == "io_error":  # as of a rename, or of a folder that has gone
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/a/file")
    else:
        os.kill(os.getpid(), getattr(signal, name))


def at_call(owner, method, number, name):
    """Let the fault happen as ``owner.method`` is called for the ``number``-th time."""
    original, calls = getattr(owner, method), [0]

    def wrapped(self, *args, **kwargs):
        if not isinstance(self, torch.nn.Module) or self.training:
            calls[0] += 1
            if calls[0] == number:
                happen(name)
        return original(self, *args, **kwargs)

    setattr(owner, method, wrapped)


def between_passes(number, name):
    original, calls = sam.SAM.perturbed, [0]

    @contextmanager
    def perturbed(self, *args, **kwargs):
        with original(self, *args, **kwargs):
            calls[0] += 1
            if calls[0] == number:
                happen(name)
            yield

    sam.SAM.perturbed = perturbed


def inject(name, at):
    where, number = at.split(":")
    if where == "pass":
        at_call(SAMModule, "forward", int(number), name)
    elif where == "between":
        between_passes(int(number), name)
    elif where == "tested":
        at_call(results.Record, "_summary", int(number), name)
    elif where == "test":
        at_call(LastCheckpoint, "on_test_start", int(number), name)
    else:
        at_call(checkpoint_io.AtomicCheckpointIO, "save_checkpoint", int(number), name)


def main(cwd, arguments, fault, environment):
    os.setsid()  # with a process group to kill
    multiprocessing.set_start_method(None, force=True)  # loaders', as in a process of one's own
    os.chdir(cwd)
    os.environ.update(environment)
    for fd, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), fd)
    if fault is not None:
        inject(*fault)
    sys.argv = [TRAIN, *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        runpy.run_path(TRAIN, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def begin(cwd, *arguments, fault=None, **environment):
    """Start ``train.py`` in ``cwd``; what it prints goes to files there."""
    process = SERVER.Process(target=main, args=(str(cwd), arguments, fault, environment))
    process.start()
    return process


def forked(cwd, *arguments, fault=None, kill_after=None, **environment):
    """Run it to its end, or kill it after so many seconds."""
    process = begin(cwd, *arguments, fault=fault, **environment)
    process.join(kill_after or 250)
    if process.is_alive():
        assert kill_after, "the run hangs"
        process.kill()
        process.join()
    printed = [(Path(cwd) / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(arguments, process.exitcode, *printed)
