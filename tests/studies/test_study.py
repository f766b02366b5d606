"""Studies: what a file expands to, and real processes that fail, are killed and go on."""

import csv
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy import stats

from sam_lightning.config.conf import CONF, DEFAULTS
from sam_lightning.config.errors import ConfigError, TrainingError
from sam_lightning.runs.lock import owned
from sam_lightning.studies import plan, runner
from sam_lightning.studies.study import main

FILE = """\
common: {experiment: quickstart, model.width: 2, epochs: 3}
seeds: [0, 7]
settings: {data.label_noise: [0, 0.4]}
arms:
  sgd: {method: sgd}
  long: {method: sgd, epochs: 6}
  sam: {method: sam, rho: [0.05, 0.1]}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(content, name="noise"):
    Path(f"{name}.yaml").write_text(content)
    return f"{name}.yaml"


def study(*arguments, **options):
    command = [sys.executable, "-m", "sam_lightning", "study", *arguments]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def wait_for(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def written(folder):
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*") if p.is_file()}


def everything(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- the file


def test_expansion(here):
    runs = plan.read(Path(write(FILE)), ["batch_size=32"]).runs
    base = ["experiment=quickstart", "model.width=2"]
    expected = [
        ("sgd,data.label_noise=0,seed=0", ["epochs=3", "method=sgd"]),
        ("long,data.label_noise=0,seed=0", ["epochs=6", "method=sgd"]),
        ("sam,rho=0.05,data.label_noise=0,seed=0", ["epochs=3", "method=sam", "rho=0.05"]),
        ("sam,rho=0.1,data.label_noise=0,seed=0", ["epochs=3", "method=sam", "rho=0.1"]),
        ("sgd,data.label_noise=0.4,seed=0", ["epochs=3", "method=sgd"]),
        ("long,data.label_noise=0.4,seed=0", ["epochs=6", "method=sgd"]),
        ("sam,rho=0.05,data.label_noise=0.4,seed=0", ["epochs=3", "method=sam", "rho=0.05"]),
        ("sam,rho=0.1,data.label_noise=0.4,seed=0", ["epochs=3", "method=sam", "rho=0.1"]),
    ]
    expected += [(name[:-1] + "7", own) for name, own in expected]
    assert len(runs) == len(expected)
    for run, (name, own) in zip(runs, expected, strict=True):
        noise = name.split("data.label_noise=")[1].split(",")[0]
        assert str(run.folder) == f"logs/studies/noise/{name}"
        assert run.arguments == [
            *base,
            *own,
            f"data.label_noise={noise}",
            "batch_size=32",
            f"seed={name[-1]}",
            f'hydra.run.dir="logs/studies/noise/{name}"',
            "hydra.mode=RUN",
            "ckpt_path=last",
        ]
    assert everything(here) == {"noise.yaml"}


VALUES = [
    *(0, 0.4, 1e-05, True, False, None, "digits", "a b", "it's", '"', "null", "5e-4", "16-mixed"),
    *("1,2", "[x]", "/photos/a-b.c", "~/photos", "k=v", "é", "", [0.5, 0.25], ["a,b", None]),
    *("C:\\x\\", 'a\\"b', r"\d+\\s", "\\", '\\\\"', ["a\\", "b"]),
]


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_hydra_reads_back_the_value(value):
    with initialize_config_dir(str(CONF), **DEFAULTS):
        cfg = compose("train", [f"task_name={plan.text(value)}"])
    assert OmegaConf.to_container(cfg)["task_name"] == value
    assert type(OmegaConf.to_container(cfg)["task_name"]) is type(value)


def test_a_list_in_a_grid_is_a_value_and_one_in_common_is_no_grid(here):
    content = "common: {experiment: quickstart, data.mean: [0.1]}\nseeds: [0]\n"
    content += "arms: {a: {optimizer: adamw, optimizer.betas: [[0.9, 0.99], [0.8, 0.9]]}}"
    runs = plan.read(Path(write(content))).runs
    assert [run.overrides["optimizer.betas"] for run in runs] == ["[0.9,0.99]", "[0.8,0.9]"]
    assert {run.overrides["data.mean"] for run in runs} == {"[0.1]"}
    assert runs[0].folder.name == "a,optimizer.betas=-0.9,0.99-,seed=0"


ARMS = "seeds: [0]\narms: "
QUICK = f"common: {{experiment: quickstart}}\n{ARMS}"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "noise.yaml: no such file"),
        ("- a", [], "noise.yaml: must be a mapping with seeds and arms, not list"),
        ("a: [", [], "noise.yaml: while parsing"),
        ("arms: {a: {}}\narms: {b: {}}", [], "found duplicate key arms"),
        (f"setings: {{}}\n{ARMS}{{a: {{}}}}", [], "setings: no such key; did you mean settings?"),
        (f"x: 1\n{ARMS}{{a: {{}}}}", [], "x: no such key; allowed are common, seeds, settings, "),
        ("arms: {a: {}}", [], "seeds=null: allowed is a list"),
        ("seeds: [0, 0]\narms: {a: {}}", [], "seeds=[0, 0]: allowed is a list, each seed once"),
        ("seeds: [-1]\narms: {a: {}}", [], "seed=-1: allowed is a whole number from 0 to"),
        ("seeds: [a]\narms: {a: {}}", [], "seed=a: allowed is a whole number from 0 to"),
        ("seeds: [0]", [], "arms=null: allowed is a mapping from names to overrides"),
        (f"{ARMS}[sgd, sam]", [], "arms=['sgd', 'sam']: allowed is a mapping from names to"),
        (f"{ARMS}{{a: sgd}}", [], "arms.a=sgd: allowed is a mapping, as in {rho: 0.1}"),
        (f"{ARMS}{{a: }}", [], "arms.a=None: allowed is a mapping, as in"),
        (f"{ARMS}{{a/b: {{}}}}", [], "a/b: must be a name of letters"),
        (f"{ARMS}{{a: {{data: {{root: x}}}}}}", [], "arms.a.data={'root': 'x'}: allowed are"),
        (f"{ARMS}{{a: {{rho: []}}}}", [], "arms.a.rho=[]: allowed are numbers, texts"),
        (f"{ARMS}{{a: {{rho: [[{{b: 1}}]]}}}}", [], "arms.a.rho=[[{'b': 1}]]: allowed are"),
        (f"{ARMS}{{a: {{seed: 1}}}}", [], "arms.a.seed: may not be given; list them in seeds"),
        (f"{ARMS}{{a: {{+seed: 1}}}}", [], "arms.a.+seed: may not be given; list them in seeds"),
        (f"{ARMS}{{a: {{sweep: rho_grid}}}}", [], "arms.a.sweep: may not be given; a list of"),
        (f"{ARMS}{{a: {{hydra/launcher: x}}}}", [], "arms.a.hydra/launcher: may not be given"),
        (f"common: 3\n{ARMS}{{a: {{}}}}", [], "common=3: allowed is a mapping, as in"),
        (f"settings: {{rho: [1]}}\n{ARMS}{{a: {{rho: 2}}}}", [], "arms.a.rho: is in settings too"),
        (f"metric: test/ac\n{ARMS}{{a: {{}}}}", [], "metric=test/ac: allowed is val/acc, "),
        (f"{QUICK}{{a: {{rho: [1, 1]}}}}", [], "arms.a: two runs would be called a,rho=1,seed=0"),
        (f"{QUICK}{{a: {{task_name: [{'x' * 300}]}}}}", [], "too long for the name of a folder"),
        (f"{QUICK}{{a: {{}}, b: {{rho: -1}}}}", [], "arms.b: rho=-1: allowed is a number >= 0"),
        (f"{QUICK}{{a: {{}}, b: {{method: sgdd}}}}", [], "arms.b: method=sgdd: allowed are asam"),
        (f"{QUICK}{{a: {{rh: 1}}}}", [], "arms.a: rh=1: no such key; did you mean rho?"),
        (f"{QUICK}{{a: {{rho: [0, x]}}}}", [], "arms.a: rho=x: allowed is a number >= 0"),
        (f"{ARMS}{{a: {{data: image_folder}}}}", [], "arms.a: data.root: must be given"),
        (FILE, ["data=image_folder", "data.root=gone"], "arms.sgd: data.root=gone: no such folder"),
        (FILE, ["rho=0.1"], "arms.sam.rho: has values already, so not rho=0.1 for all"),
        (FILE, ["data.label_noise=0"], "settings.data.label_noise: has values already"),
        (FILE, ["++rho=0.3"], "arms.sam.rho: has values already, so not ++rho=0.3 for all"),
        (
            FILE,
            ["method.rho=0.3"],
            "arms.sam: sam,rho=0.1,data.label_noise=0 and sam,rho=0.05,data.label_noise=0 are "
            "identical runs, because rho changes nothing here; remove one",
        ),
        (f"settings: {{rho: [1]}}\n{ARMS}{{a: {{+rho: 2}}}}", [], "arms.a.+rho: is in settings"),
        (
            f"{QUICK}{{a: {{task_name: [a, b]}}}}",
            [],
            "arms.a: a,task_name=b and a,task_name=a are identical runs, because task_name changes",
        ),
        (
            f"{QUICK}{{a: {{method: sgd, rho: [0.1, 0.2]}}}}",
            [],
            "are identical runs, because rho changes nothing with method=sgd; remove one",
        ),
        (FILE, ["ckpt_path=x"], "ckpt_path=x: may not be given; a run goes on from its own"),
        (FILE, ["hydra.run.dir=x"], "hydra.run.dir=x: may not be given"),
        (FILE, ["lr=0.1,0.2"], "arms.sgd: lr=0.1,0.2: several values are a sweep"),
        (FILE, ["lr=-1"], "arms.sgd: lr=-1: allowed is a number > 0"),
        (FILE, ["job=2"], "job=2: no such key; did you mean jobs?"),
        (FILE, ["jobs=0"], "jobs=0: allowed is a whole number >= 1"),
        (f"{QUICK}{{sgd: {{}}}}", ["only=sgdd"], "no such arm, sgdd; did you mean sgd?"),
        (f"{QUICK}{{sgd: {{}}}}", ["seed=0,3"], "seed=0,3: no such seed, 3; the file has 0"),
        (FILE, ["more.yaml"], "FILE: give one, as in conf/study/quick.yaml, not noise.yaml and"),
        (FILE, ["--jobs"], "--jobs: no such flag"),
        (
            f"{QUICK}{{a: {{}}}}",
            ["out=noise.yaml"],
            "out=noise.yaml: cannot be made (Not a directory)",
        ),
    ],
)
def test_errors_name_their_place_and_write_nothing(here, content, arguments, message):
    if content is not None:
        write(content)
    before = everything(here)
    with pytest.raises(ConfigError) as caught:
        main(["noise.yaml", *arguments])
    assert message in " ".join(str(caught.value).split())
    assert everything(here) == before


def test_checks_and_lists_without_torch_and_ends_with_code_2(here):
    write(QUICK + "{a: {}, b: {model.width: 0}}")
    code = (
        "import sys; from sam_lightning.config.errors import one_line_errors\n"
        "from sam_lightning.studies.study import main\n"
        "try:\n"
        "    with one_line_errors(): main(sys.argv[1:])\n"
        "finally:\n"
        "    print({'torch', 'lightning', 'scipy', 'matplotlib'} & {*sys.modules})\n"
    )
    command = [sys.executable, "-c", code, "noise.yaml"]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "set()\n")
    where = "error: noise.yaml: arms.b: model.width=0: allowed is a whole number >= 1\n"
    assert refused.stderr == where
    write(QUICK + "{a: {}}")
    listed = subprocess.run([*command, "dry=true"], capture_output=True, text=True)
    assert (listed.returncode, listed.stderr) == (0, "")
    train = os.path.relpath(CONF.parent / "train.py")
    assert listed.stdout == (
        f"missing     python {train} experiment=quickstart seed=0 "
        "'hydra.run.dir=\"logs/studies/noise/a,seed=0\"' hydra.mode=RUN ckpt_path=last\n"
        "set()\n"
    )
    assert everything(here) == {"noise.yaml"}


def test_a_launcher_around(here, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="one process, and torchrun has started 2: leave it out"):
        main([write(FILE)])


# ---- processes, with a script in the place of train.py that leaves what a run leaves


STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
given = dict(a.split("=", 1) for a in sys.argv[1:])
folder = Path(given.pop("hydra.run.dir").strip('"'))
(folder / ".hydra").mkdir(exist_ok=True)
stored = [f"{k}={v}" for k, v in given.items() if not k.startswith("hydra")]
(folder / ".hydra" / "overrides.yaml").write_text(json.dumps(stored))
def leave(status, reason, code):
    found = {"status": status, "exit_reason": reason, "metrics": {"test/acc": 0.5}}
    (folder / "metrics.json").write_text(json.dumps(found))
    sys.exit(code)
signal.signal(signal.SIGTERM, lambda *_: leave("interrupted", "Interrupted: stopped", 143))
end = given.get("task_name", "well").strip('"')
if end == "stay":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end = "sleep"
(folder / "starts").open("a").write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\\n")
if end == "sleep":
    time.sleep(60)
if end == "wait": # for another run
    while not list(folder.parent.glob("*/starts"))[1:]:
        time.sleep(0.01)
if end == "refuse":
    print("error: rho=-1: allowed is a number >= 0")
    sys.exit(2)
if end == "raise":
    raise RuntimeError("no memory")
if end == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if end == "fail":
    leave("failed", "TrainingError: no finite gradient", 1)
leave("completed", "completed", 0)
"""


@pytest.fixture
def stand_in(here, monkeypatch):
    script = here / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(runner, "TRAIN", script)
    monkeypatch.setattr("sam_lightning.studies.study.report", lambda plan, out: None)
    return script


def arms(**ends):
    """A study whose runs end like this; their batch sizes tell them apart."""
    named = enumerate(ends.items(), 8)
    return QUICK + json.dumps({n: {"task_name": end, "batch_size": i} for i, (n, end) in named})


def starts(name):
    """(process id, OMP_NUM_THREADS) of each start of a run of the study."""
    text = Path(f"logs/studies/noise/{name}/starts").read_text()
    return [line.split() for line in text.splitlines()]


@pytest.mark.slow
def test_what_fails_takes_no_other_down_and_is_tried_again(stand_in, capsys):
    ends = {e: e for e in ("refuse", "raise", "die", "fail", "well")}
    file = write(arms(**ends))
    with pytest.raises(TrainingError, match="4 of 5 runs did not complete"):
        main([file])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("[")]
    expected = [
        "refuse,seed=0: failed: rho=-1: allowed is a number >= 0, ",
        "raise,seed=0: failed: RuntimeError: no memory, ",
        "die,seed=0: failed: ended by SIGKILL, ",
        "fail,seed=0: failed: TrainingError: no finite gradient, ",
        "well,seed=0: test/acc 0.5000, ",
    ]
    for i, (line, start) in enumerate(zip(lines, expected, strict=True), 1):
        assert line.startswith(f"[{i}/5] {start}")
    assert "error: ended by SIGKILL" in Path("logs/studies/noise/die,seed=0/output.txt").read_text()
    table = out[out.index("not completed") :]
    assert "well" not in table
    assert "RuntimeError: no memory" in table
    stand_in.write_text(STAND_IN.replace('end == "raise"', "False"))
    with pytest.raises(TrainingError, match="3 of 5 runs did not complete"):
        main([file])
    assert "5 runs: 1 completed before, 4 to go" in capsys.readouterr().out
    assert {end: len(starts(f"{end},seed=0")) for end in ends} == {
        **dict.fromkeys(ends, 2),
        "well": 1,
    }


def test_side_by_side_cores_are_shared(stand_in, monkeypatch):
    file = write(arms(a="wait", b="wait"))  # each ends only once the other has started
    monkeypatch.delenv("OMP_NUM_THREADS")
    main([file, "jobs=2"])
    cores = len(os.sched_getaffinity(0))
    assert [threads for n in "ab" for _, threads in starts(f"{n},seed=0")] == [
        str(max(1, cores // 2))
    ] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    shutil.rmtree("logs")
    main([file, "jobs=2"])
    assert [threads for _, threads in starts("a,seed=0")] == ["7"]


def test_a_folder_that_cannot_be_made_ends_the_study_once_its_runs_have_saved(stand_in, capfd):
    file = write(arms(a="sleep", first="wait", b="well"))  # ``first`` ends once ``a`` has begun
    Path("logs/studies/noise").mkdir(parents=True)
    Path("logs/studies/noise/b,seed=0").symlink_to("nowhere")
    process = started(file, "launcher=joblib", "jobs=2")
    process.communicate(timeout=60)
    assert process.returncode == 2
    said = capfd.readouterr().err
    assert said == "error: logs/studies/noise/b,seed=0: File exists\n"
    ((pid, _),) = starts("a,seed=0")
    assert not Path(f"/proc/{pid}").exists()
    assert runner.status(plan.read(Path(file)).runs[0]).state == "interrupted"


def test_only_some_arms_and_seeds(stand_in):
    file = write(arms(a="well", b="well", c="well").replace("[0]", "[0, 1, 2]"))
    main([file, "only=a,c", "seed=0,2"])
    names = sorted(path.name for path in Path("logs/studies/noise").iterdir())
    assert names == ["a,seed=0", "a,seed=2", "c,seed=0", "c,seed=2"]


def test_what_is_refused_can_be_corrected_and_what_is_damaged_is_run_anew(stand_in):
    file = write(arms(a="well", b="refuse"))
    with pytest.raises(TrainingError, match="1 of 2 runs did not complete"):
        main([file])
    (stale := Path("logs/studies/noise/b,seed=0/.hydra/hydra.yaml")).touch()
    damaged = '{"status": "completed", "metrics": [1]}'
    Path("logs/studies/noise/a,seed=0/metrics.json").write_text(damaged)
    write(arms(a="well", b="well"))
    main([file])
    assert len(starts("a,seed=0")) == len(starts("b,seed=0")) == 2
    assert not stale.exists()  # train.py would have gone on with what is stored


@pytest.mark.parametrize("data", ["cifar10", "image_folder"])
def test_images_may_move(stand_in, data):
    for folder in ("old/photos", "new/photos", "new/others"):
        Path(folder).mkdir(parents=True)
    file = write(f"{QUICK}{{a: {{data: {data}}}}}")
    main([file, "data.root=old/photos"])
    config = {"data": {"source": {"_target_": f"sam_lightning.data.source.{data}"}}}
    OmegaConf.save(config, "logs/studies/noise/a,seed=0/.hydra/config.yaml")
    main([file, "data.root=new/photos", "data.num_workers=2"])
    other = pytest.raises(ConfigError, match=r"old/photos, and the study has data\.root=n")
    with other if data == "image_folder" else nullcontext():
        main([file, "data.root=new/others"])
    assert len(starts("a,seed=0")) == 1


@pytest.mark.parametrize("end", ["well", "fail"])
def test_a_folder_of_other_overrides_is_not_mixed_in(stand_in, end):
    file = write(arms(a="well", b=end))
    with pytest.raises(TrainingError) if end == "fail" else nullcontext():
        main([file])
    before = written("logs")
    with pytest.raises(ConfigError) as caught:
        main([file, "epochs=9"])
    assert str(caught.value) == (
        "logs/studies/noise/a,seed=0: is of a run with no epochs, and the study has epochs=9 "
        "(and 1 more folders); undo the change, or remove what is to run again"
    )
    write(arms(a="well", b="other"))
    with pytest.raises(
        ConfigError, match=f"b,seed=0: is of .* task_name={end}, .* task_name=other;"
    ):
        main([file, "only=a"])  # for the report is of all runs of the file
    assert written("logs") == before
    shutil.rmtree("logs/studies/noise/b,seed=0")
    main([file])
    assert len(starts("a,seed=0")) == len(starts("b,seed=0")) == 1


def test_what_is_left_is_weighed_by_passes(stand_in, capsys):
    sgd, sam = plan.read(Path(write(QUICK + "{a: {method: sgd}, b: {}}"))).runs
    runner.Runner([sgd, sam], 1, left=[sam], seconds=60, passes=sgd.passes)._say(sgd, "60 s")
    assert capsys.readouterr().out.endswith("; about 0:02:00 left\n")


# What ``python -m sam_lightning study`` does, with the stand-in.
COMMAND = """
import sys
from pathlib import Path
from sam_lightning.studies import runner
from sam_lightning.studies import study
from sam_lightning.config.errors import one_line_errors
runner.TRAIN = Path("stand_in.py").absolute()
study.report = lambda plan, out: None
sys.stdout.reconfigure(line_buffering=True)
with one_line_errors():
    study.main(sys.argv[1:])
"""


def started(*arguments):
    # A shell's background jobs ignore SIGINT, and so would what the tests start from one.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heed)


@pytest.mark.parametrize(
    ("signum", "code", "second"),
    [(signal.SIGTERM, 143, "sleep"), (signal.SIGINT, 130, "sleep"), (signal.SIGINT, 130, "stay")],
)
def test_a_signal_ends_the_runs_and_the_study(stand_in, signum, code, second):
    file = write(arms(a="sleep", b=second, c="sleep"))
    process = started(file, "jobs=2")
    both = [Path(f"logs/studies/noise/{name},seed=0/starts") for name in "ab"]
    wait_for(lambda: all(path.is_file() and path.read_text().endswith("\n") for path in both))
    process.send_signal(signum)
    if second == "stay":  # and does so until it is asked twice, which the other has ended by then
        ((pid, _),) = starts("a,seed=0")
        wait_for(lambda: not Path(f"/proc/{pid}").exists())
        process.send_signal(signum)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == code
    assert f"stopped by {signum.name}" in out
    states = [runner.status(run).state for run in plan.read(Path(file)).runs]
    assert states == ["interrupted", "unfinished" if second == "stay" else "interrupted", "missing"]
    for name in "ab":
        ((pid, _),) = starts(f"{name},seed=0")
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
def test_a_run_whose_study_was_killed_is_waited_for_and_not_run_twice(stand_in, capsys):
    stand_in.write_text(STAND_IN.replace("time.sleep(60)", "time.sleep(2)"))
    file = write(arms(a="sleep", b="well"))
    process = started(file)
    wait_for(Path("logs/studies/noise/a,seed=0/starts").is_file)
    process.kill()
    process.wait()
    process.stdout.close()  # which the run that is left has open too
    main([file])
    out = capsys.readouterr().out
    assert "a,seed=0: already running elsewhere; waiting\n" in out
    assert out.splitlines()[-1] == "[2/2] a,seed=0: test/acc 0.5000, by another process"
    assert len(starts("a,seed=0")) == len(starts("b,seed=0")) == 1


def at_work(folder, there):
    with owned(folder):
        there.put(None)
        time.sleep(60)


@pytest.mark.slow
def test_a_run_that_was_started_by_hand_is_waited_for_and_keeps_its_settings(stand_in):
    file = write(arms(a="well"))
    folder = Path("logs/studies/noise/a,seed=0")
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").touch()
    fork = multiprocessing.get_context("fork")
    holder = fork.Process(target=at_work, args=(folder, there := fork.Queue()))
    holder.start()
    there.get(timeout=20)
    process = started(file)
    lines = []
    try:
        while "waiting" not in "".join(lines):
            lines.append(process.stdout.readline())
        assert everything(folder) == {".hydra", ".hydra/config.yaml", ".lock", "output.txt"}
        assert (folder / "output.txt").read_text() == ""
    finally:
        holder.kill()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert lines[-1] == "a,seed=0: already running elsewhere; waiting\n"
    assert out.startswith("[1/1] a,seed=0: test/acc 0.5000, ")


# ---- the report


@cache
def composed(*overrides):
    with initialize_config_dir(str(CONF), **DEFAULTS):
        return compose("train", list(overrides))


def finish(run, **metrics):
    """Leave in a planned run's folder what it would leave with these final metrics."""
    texts = [f"{key}={value}" for key, value in run.overrides.items()]
    cfg = composed(*texts[:-1]).copy()
    cfg.seed, cfg.output_dir = run.seed, str(run.folder)
    (run.folder / ".hydra").mkdir(parents=True)
    OmegaConf.save([*texts, "ckpt_path=last"], run.folder / ".hydra" / "overrides.yaml")
    summary = {
        "status": "completed",
        "metrics": {name.replace("_", "/"): value for name, value in metrics.items()},
        **{
            "seconds": 12.5,
            "train_seconds": 10.0,
            "images_per_second": 500.0,
            "epochs": cfg.epochs,
        },
        **{"updates": 9, "devices": 1, "device": "cpu", "git_commit": f"{run.seed}abc" * 8},
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    (run.folder / "metrics.json").write_text(json.dumps(summary))
    rows = [(e, 0.1 * e + 1e-9, "", (2.5, "nan")[e % 2]) for e in range(cfg.epochs)]
    rows.append((cfg.epochs, "", 0.5, ""))
    lines = ["epoch,val/acc,test/acc,val/loss", *(",".join(map(str, row)) for row in rows)]
    (run.folder / "metrics.csv").write_text("\n".join(lines))


@pytest.mark.long
def test_settings_stay_apart_and_the_best_radius_is_each_ones_own(here, capsys):
    file = write(FILE.replace("[0, 7]", "[0, 7, 9]"))
    rng = np.random.default_rng(0)
    accs = {}
    for run in plan.read(Path(file)).runs:
        noise, rho = run.choice["data.label_noise"], run.choice.get("rho", 0)
        acc = float(rng.random())
        accs.setdefault((run.arm, noise, rho), []).append(acc)
        # Validation has it that the smaller radius is best without noise, the larger with it.
        finish(run, val_acc=abs((rho == 0.1) - (noise == 0)) + acc / 100, test_acc=acc)
    assert main([file, "out=kept"]) is None
    with open("kept/noise/summary.csv", newline="") as text:
        rows = list(csv.DictReader(text))
    found = {}
    for row in rows:
        arm = "long" if row["epochs"] == "6" else row["method"]
        found[arm, float(row["data.label_noise"]), float(row["rho"])] = row
    assert found.keys() == accs.keys()
    for key, row in found.items():
        mean = np.mean(accs[key])
        low, high = stats.t.interval(0.95, 2, mean, stats.sem(accs[key]))
        values = [float(row[f"test/acc {part}"]) for part in ("mean", "low", "high")]
        assert values == pytest.approx([mean, low, high])
        assert float(row["total_passes"]) == (3 if key[0] == "sgd" else 6)
    chosen = {key for key, row in found.items() if row["chosen"] == "1"}
    assert chosen == {("sam", 0, 0.05), ("sam", 0.4, 0.1)}
    report = Path("kept/noise/report.md").read_text()
    for noise, rho in ((0, 0.05), (0.4, 0.1)):
        for other, equal in (("sgd", "epochs"), ("long", "passes")):
            ours, theirs = accs["sam", noise, rho], accs[other, noise, 0]
            p = stats.ttest_rel(ours, theirs).pvalue
            epochs = 6 if other == "long" else 3
            row = f"| sam, rho {rho:g}, label_noise {noise:g}, 3 epochs | "
            row += f"sgd, label_noise {noise:g}, {epochs} epochs | {equal} | 3 | "
            row += f"{100 * np.mean(np.subtract(ours, theirs)):+.2f} ± "
            assert f"| {p:.4f} |" in report[report.index(row) :].partition("\n")[0]
    assert "runs are of different commits (0abc0ab, 7abc7ab, 9abc9ab)" in report
    assert (here / "kept" / "noise" / "rho_2.png").is_file()
    assert "24 runs: 24 completed before, 0 to go" in capsys.readouterr().out


def test_runs_json_has_the_figures_of_metrics_json(here, capsys):
    file = write(FILE.replace("settings: {data.label_noise: [0, 0.4]}\n", ""))
    given = ["lr=0.2", "++data.cache_dir=/home/me"]  # the one is a setting, the other a place
    runs = plan.read(Path(file), given).runs
    for i in (0, 1, 4):
        finish(runs[i], val_acc=0.1 * i + 1 / 3, test_acc=0.123456789012 * i, train_loss=1.0)
    runs[3].folder.mkdir()
    (runs[3].folder / "output.txt").write_text("$ python train.py x\nerror: no space\n")
    shutil.copytree(runs[0].folder, runs[0].folder.parent / "old,seed=0")
    main([file, *given, "only=sgd", "out=kept"])  # these are completed
    kept = json.loads(Path("kept/noise/runs.json").read_text())
    assert kept["study"] == "noise"
    assert kept["file"] == OmegaConf.to_container(OmegaConf.load(file))
    assert [(r["arm"], r["settings"], r["seed"]) for r in kept["runs"]] == [
        (run.arm, dict(run.choice), run.seed) for run in runs
    ]
    assert [r["state"] for r in kept["runs"]] == [
        *("completed", "completed", "missing", "failed"),
        *("completed", "missing", "missing", "missing"),
    ]
    assert kept["runs"][3]["reason"] == "no space"
    for i, passes in ((0, 3), (1, 6), (4, 3)):
        of_run = json.loads((runs[i].folder / "metrics.json").read_text())
        line = kept["runs"][i]
        for key in ("metrics", "seconds", "train_seconds", "epochs", "git_commit", "device"):
            assert line[key] == of_run[key]
        assert line["passes"] == passes
        epochs = list(range(1, of_run["epochs"] + 1))
        assert line["curves"] == {
            "epoch": epochs,
            "val/acc": [round(0.1 * (e - 1), 5) for e in epochs],  # test/acc is measured once
            "val/loss": [2.5 if e % 2 else None for e in epochs],  # JSON has no NaN
        }
    assert kept["overrides"] == ["lr=0.2"]
    said = capsys.readouterr()
    assert (
        "1 in logs/studies/noise are not of the file and not counted: the first is old," in said.err
    )
    assert "warning: 5 of the file's 8 runs have no result yet" in said.err
    assert "3 runs in 2 groups; left out: 1 failed; see kept/noise/report.md" in said.out
    assert "a,seed=0" not in Path("kept/noise/report.csv").read_text()
    assert "old,seed=0" not in Path("kept/noise/report.csv").read_text()
    before = written("kept")
    shutil.rmtree("logs")  # as in another clone
    finish(runs[0], test_acc=0.9)
    said = "kept/noise/runs.json: has results of 2 runs that are not in logs/studies/noise, the "
    with pytest.raises(ConfigError, match=f"{said}first is long,seed=0; give out=FOLDER"):
        main([file, *given, "only=sgd", "seed=0", "out=kept"])
    assert written("kept") == before
    main([file, *given, "only=sgd", "seed=0", "out=other"])
    assert Path("other/noise/report.md").is_file()


@pytest.mark.slow
def test_failed_runs_replace_no_results(stand_in, monkeypatch):
    monkeypatch.undo()
    os.chdir(stand_in.parent)
    monkeypatch.setattr(runner, "TRAIN", stand_in)
    file = write(arms(a="refuse", b="refuse"))
    runs = plan.read(Path(file)).runs
    for run in runs:
        finish(run, test_acc=0.5)
    main([file])
    before = written("results")
    shutil.rmtree(runs[0].folder)
    with pytest.raises(ConfigError, match="has results of 1 runs that are not in logs/studies/noi"):
        main([file])
    shutil.rmtree(runs[1].folder)
    with pytest.raises(TrainingError, match="2 of 2 runs did not complete"):
        main([file])
    assert written("results") == before


# ---- real runs


SMALL = """\
common: {experiment: quickstart, model.width: 2, data.subset: 100, epochs: 2}
seeds: [0]
arms:
  sam: {method: sam}
  big: {method: sgd, data.val_size: 5000}
"""


@pytest.mark.slow
def test_a_real_study(here):
    file = write(SMALL)
    first = study(file)
    wait_for(Path("logs/studies/noise/sam,seed=0/.hydra/overrides.yaml").is_file)
    first.kill()  # its run goes on
    first.communicate()
    out, err = (again := study(file)).communicate(timeout=120)
    assert again.returncode == 1
    assert err.splitlines()[-1] == "error: 1 of 2 runs did not complete"
    assert "big,seed=0: failed: data.val_size=5000: " in out
    assert "sam,seed=0: test/acc" in out
    folder = Path("logs/studies/noise/sam,seed=0")
    of_run = json.loads((folder / "metrics.json").read_text())
    line, failed = json.loads(Path("results/noise/runs.json").read_text())["runs"]
    assert line["metrics"] == of_run["metrics"]
    assert line["metrics"].keys() >= {"train/loss", "train/acc", "test/acc"}
    assert line["versions"] == of_run["versions"]
    assert (line["passes"], line["epochs"]) == (4, 2)
    assert failed["state"] == "failed"
    assert of_run["config"]["ckpt_path"] is None  # begun once
    assert "big,seed=0: data.val_size=5000: " in Path("results/noise/report.md").read_text()
    assert err.splitlines()[0] == "warning: 1 of the file's 2 runs have no result yet"
    out, err = (listed := study(file, "dry=true")).communicate(timeout=60)
    assert (listed.returncode, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["completed", "failed"]


@pytest.mark.long
@pytest.mark.parametrize(
    "signum",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.long),
    ],
)
def test_a_study_that_is_stopped_goes_on_with_the_same_result(here, signum):
    file = write(SMALL.replace("epochs: 2", "epochs: 20").partition("  big:")[0])
    (run,) = plan.read(Path(file)).runs
    process = study(file, "launcher=joblib", "jobs=2")
    wait_for((run.folder / "checkpoints" / "previous.ckpt").is_file)
    process.send_signal(signum)
    if signum == signal.SIGKILL:  # as a machine without power, which takes the run with it
        known = [str(os.getpid()), str(process.pid)]
        here_too = [p.parent for p in Path("/proc").glob("[0-9]*/cwd") if p.resolve() == here]
        (of_run,) = (int(p.name) for p in here_too if p.name not in known)
        os.kill(of_run, signum)
    process.communicate(timeout=60)
    assert process.returncode == (-9 if signum == signal.SIGKILL else 143)
    state = "unfinished" if signum == signal.SIGKILL else "interrupted"
    assert runner.status(run).state == state
    _, err = (again := study(file, "launcher=joblib")).communicate(timeout=120)
    assert (again.returncode, err) == (0, "")
    broken = json.loads((run.folder / "metrics.json").read_text())
    assert len(broken["parts"]) == 2
    shutil.move(run.folder, "broken")
    study(file).communicate(timeout=120)
    whole = json.loads((run.folder / "metrics.json").read_text())
    assert whole["config"]["ckpt_path"] is None
    assert whole["metrics"] == broken["metrics"]


@pytest.mark.long
def test_the_example(here):
    shorter = ["epochs=1", "data.subset=200", "seed=0"]
    process = study(str(CONF / "study" / "quick.yaml"), *shorter)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    kept = json.loads(Path("results/quick/runs.json").read_text())
    assert kept["overrides"] == shorter[:2]
    states = {(run["arm"], run["settings"].get("rho"), run["seed"]): run for run in kept["runs"]}
    assert len(states) == len(kept["runs"]) == 8
    for (arm, rho, seed), run in states.items():
        assert run["state"] == ("missing" if seed else "completed")
        assert run["settings"]["data.label_noise"] == 0.4
        if not seed:
            assert run["passes"] == (1 if rho is None else 2), arm
    assert {path.name for path in Path("results/quick").iterdir()} == {
        *("report.md", "report.tex", "report.csv", "summary.csv", "runs.json"),
        *("rho.png", "epochs.png", "compute.png"),
    }
