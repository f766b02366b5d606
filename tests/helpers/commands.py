"""``train.py`` in forks of a process that has imported all it needs, so that each is quick."""

import json
import os
import subprocess
import sys
from pathlib import Path

TRAIN = Path(__file__).parents[2] / "train.py"
SMALL = ["data=digits", "model.width=8", "trainer=cpu", "data.subset=100", "epochs=1"]
SMALL += ["callbacks.dashboard=null"]  # its pictures take as long as the training

# Runs train.py in a fork for each line of stdin, so that what it imports is imported once for all.
SERVER = """
import json, os, runpy, sys, traceback
train, *imports = sys.argv[1:]
for name in imports:
    __import__(name)
for line in sys.stdin:
    folder, arguments = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(folder)
    for fd, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(f"../{name}", os.O_CREAT | os.O_WRONLY), fd)
    sys.argv = [train, *arguments]
    code = 0
    try:
        runpy.run_path(train, run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    with open("../torch", "w") as file:
        file.write(str("torch" in sys.modules))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking torch apart would last longer than the command
"""


class Result:
    def __init__(self, code: int, folder: Path) -> None:
        self.code = code
        self.out, self.err, torch_loaded = (
            (folder / name).read_text() for name in ("stdout", "stderr", "torch")
        )
        self.torch = torch_loaded == "True"
        self.left = sorted(p.name for p in (folder / "cwd").rglob("*"))


def serve(*imports: str):
    # Without SLURM, on a login node too.
    folders = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(f for f in folders if not (Path(f) / "srun").exists())
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(TRAIN), *imports],
        env=os.environ | {"PATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def command(folder: Path, *arguments: str) -> Result:
        (folder / "cwd").mkdir()
        server.stdin.write(json.dumps([str(folder / "cwd"), arguments]) + "\n")
        server.stdin.flush()
        return Result(int(server.stdout.readline()), folder)

    with server:
        yield command
        server.stdin.close()


def assert_refused(result: Result, *fragments: str) -> None:
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    for fragment in fragments:
        assert fragment in result.err
    assert result.out == ""
    assert result.left == []
