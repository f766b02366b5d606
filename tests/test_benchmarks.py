"""The measuring instrument: its order, its statistic, and that its parts run and report."""

import gc
import json
import operator
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from benchmarks import gpu
from benchmarks.__main__ import PARTS, table
from benchmarks.gpu_plan import LOOPS
from benchmarks.gpu_tables import markdown
from benchmarks.limit import Count, bounds, counted
from benchmarks.loaders import datasets_loader, installed, webdataset_loader
from benchmarks.peers import PlainLoop, implementations
from benchmarks.photographs import extracted, write_photographs
from benchmarks.timing import Measurement, interleave, ratio, summary, turns
from runs import children, wait_for_end
from sam_lightning.data import image_folder
from sam_lightning.data.listing import list_images
from sam_lightning.data.packing import Packing, pack
from sam_lightning.models import SAMResNet18

ROOT = Path(__file__).parent.parent


class Machine:
    """A clock, and work that takes its seconds times how slow the machine is just then."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowness = 1.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def work(self, name: str, seconds: float):
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * self.slowness

        return run


def test_every_round_has_every_case_and_orders_differ():
    orders = [turns("ABC", index) for index in range(6)]
    assert orders[0] == ["A", "B", "C"]
    assert all(sorted(order) == ["A", "B", "C"] for order in orders)
    assert {order[0] for order in orders} == {"A", "B", "C"}
    assert len({tuple(order) for order in orders}) == 6


def test_cases_take_turns_after_the_warmup():
    machine = Machine()
    cases = {name: machine.work(name, 1.0) for name in "AB"}
    seconds = interleave(cases, rounds=3, warmup=2, clock=machine.clock)
    assert len(machine.calls) == (3 + 2) * 2
    assert all({*machine.calls[i : i + 2]} == {"A", "B"} for i in range(0, 10, 2))
    assert {name: len(values) for name, values in seconds.items()} == {"A": 3, "B": 3}


def test_ratio_is_exact_on_a_machine_that_slows_down():
    machine = Machine()
    seconds: dict[str, list[float]] = {"A": [], "B": []}
    for slowness in (1.0, 1.0, 3.0, 10.0, 2.0):
        machine.slowness = slowness
        cases = {"A": machine.work("A", 1.25), "B": machine.work("B", 1.0)}
        for name, values in interleave(cases, 1, clock=machine.clock).items():
            seconds[name] += values
    result = ratio("part", "what", seconds["A"], seconds["B"])
    assert (result.lower, result.median, result.upper) == pytest.approx((1.25, 1.25, 1.25))
    assert result.rounds == 5


def test_ratio_is_the_median_of_the_rounds_and_not_the_ratio_of_medians():
    result = ratio("part", "what", [1.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert (result.lower, result.median, result.upper) == (1.5, 2.0, 2.5)
    assert ratio("part", "what", [1.0, 10.0, 6.0], [1.0, 2.0, 3.0]).median == 2.0  # not 6 / 2


def test_ratio_needs_as_many_of_both():
    with pytest.raises(ValueError, match="shorter"):
        ratio("part", "what", [1.0, 2.0], [1.0])


def test_a_case_may_count_its_own_seconds():
    assert interleave({"A": lambda: 0.5}, rounds=2) == {"A": [0.5, 0.5]}


def test_one_value_has_no_spread():
    assert summary("part", "what", [2.0], "s") == Measurement("part", "what", 2.0, 2.0, 2.0, 1, "s")


def test_table_is_markdown_with_one_row_each():
    rows = table([summary("step", "a / b", [1.0, 2.0, 3.0], "x"), summary("input", "c", [1e4], "")])
    assert rows.splitlines()[0] == "| step | a / b | 2.000 x | 1.500 .. 2.500 | 3 |"
    assert rows.splitlines()[1].startswith("| input | c | 10,000 ")


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_peers_compute_the_same_step(adaptive):
    pytest.importorskip("pytorch_optimizer")
    weights = {}
    for name, make in implementations(adaptive).items():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        x = torch.randn(16, 4)
        optimizer = make(model)
        for _ in range(3):
            model.zero_grad()
            model(x).square().mean().backward()
            optimizer.first_step(zero_grad=True)
            model(x).square().mean().backward()
            optimizer.second_step()
        weights[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert len(weights) == 3
    for name, values in weights.items():
        torch.testing.assert_close(values, weights["plain loop"], msg=name)


def test_plain_loop_moves_by_rho():
    model = torch.nn.Linear(5, 3)
    before = model.weight.detach().clone()
    optimizer = PlainLoop([model.weight])
    model.weight.grad = torch.randn(3, 5)
    optimizer.first_step()
    assert (model.weight - before).norm().item() == pytest.approx(0.05, rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files left open
@pytest.mark.parametrize("name", ["webdataset", "datasets"])
def test_other_packages_load_the_same_images(name, tmp_path):
    package = pytest.importorskip(name)
    write_photographs(tmp_path / "photos", 6)
    pack(list_images(str(tmp_path / "photos")), tmp_path / "shards", Packing())
    view = transforms.PILToTensor()
    if name == "webdataset":
        batches = [*webdataset_loader(package, tmp_path / "shards", view, 4)]
    else:
        files = extracted(tmp_path / "shards")
        batches = [b.values() for b in datasets_loader(package, files, view, 4)]
    seen = torch.cat([images for images, _ in batches])
    images = [*image_folder(str(tmp_path / "photos"), cache_dir=str(tmp_path)).train.images]
    key = operator.methodcaller("tolist")
    assert sorted(map(key, seen)) == sorted(map(key, images))
    gc.collect()


def test_a_package_that_is_not_there_is_said(capsys):
    assert installed("no_such_package") is None
    assert "no_such_package is not installed, and is left out: pip" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepp"], "stepp: no such part; there are step, loop"),
        (["--device", "cuda"], "--device cuda: there is no CUDA GPU here"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    done = benchmarks(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What all parts print and write when they have little to do."""
    file = tmp_path_factory.mktemp("quick") / "figures" / "benchmarks.json"
    done = benchmarks("--quick", "--threads", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", PARTS)
def test_quick_part(quick, part):
    printed, report = quick
    assert report["quick"] is True
    assert report["environment"]["threads"] == 1
    measurements = [m for m in report["measurements"] if m["part"] == part]
    assert measurements
    assert all(m["lower"] <= m["median"] <= m["upper"] for m in measurements)
    assert all(f"| {part} | {m['what']} | " in printed for m in measurements)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_memory_counts_one_copy(quick):
    _, report = quick
    figures = {m["what"]: m["median"] for m in report["measurements"] if m["part"] == "memory"}
    kept = {what: value for what, value in figures.items() if "kept between steps" in what}
    peak = {what: value for what, value in figures.items() if "peak of a step" in what}
    assert [v for w, v in kept.items() if w.startswith("ours")] == pytest.approx([1], abs=0.01)
    assert [v for w, v in kept.items() if w.startswith("plain loop")] == pytest.approx(
        [1], abs=0.05
    )
    assert [v for w, v in peak.items() if w.startswith("ours")] == pytest.approx([1], abs=0.1)


# ------------------------------------------------------------------- the script for one GPU

# Writes a row, half of another, and hangs with a child; neither ends when it is told to.
HANGS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child:
    with open(sys.argv[1], "a") as file:
        file.write('{"pids": [%d, %d]}\\n{"half": ' % (os.getpid(), child))
time.sleep(600)
"""


def test_a_part_that_hangs_is_killed_at_its_limit_and_its_rows_count(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.3)
    rows, taken = tmp_path / "part" / "rows.jsonl", []
    command = [sys.executable, "-c", HANGS, str(rows)]
    state, seconds = gpu.run_part(command, rows, 1.5, taken.append)
    assert state == "killed at its limit of 2 s"
    assert 1.5 <= seconds < 60
    (row,) = taken
    wait_for_end(row["pids"])


def test_a_part_that_fails_says_why(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    state, _ = gpu.run_part(command, tmp_path / "rows.jsonl", 60, print)
    assert state == "failed with exit code 1: no such model"


def on_a_cpu(file: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--device=cpu", f"--json={file}", *arguments]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corect"], "corect: no such part; there are correct, tests, speed"),
        (["--images=/nowhere"], "--images /nowhere: there is no folder train in it"),
        ([], "--device cuda: there is no CUDA GPU here; --device cpu tries it in small"),
    ],
)
def test_what_the_script_for_a_gpu_cannot_do_is_refused(tmp_path, arguments, message):
    command = [sys.executable, "-m", "benchmarks.gpu", f"--json={tmp_path}/gpu.json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_limits_of_parts_and_of_all(tmp_path):
    command = on_a_cpu(tmp_path / "gpu.json", "--limit=2", "--minutes=0.06")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == list(gpu.PARTS)
    assert parts["correct"]["state"] == "killed at its limit of 2 s"
    assert [part["state"] for part in parts.values()][2:] == ["not reached"] * 4
    assert (tmp_path / "gpu.json.md").read_text() in done.stdout
    assert "| train | no figure |" in done.stdout


@pytest.mark.long
def test_a_stop_leaves_what_was_found(tmp_path):
    command = on_a_cpu(tmp_path / "gpu.json", "--limit=200", "correct", "kernels")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        first = json.loads(process.stdout.readline())
        (child,) = children(process.pid)
        process.send_signal(signal.SIGTERM)
        shown = process.stdout.read()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert first in report["rows"]
    assert [part["state"] for part in report["parts"].values()] == ["stopped", "not reached"]
    assert "- kernels: not reached" in shown
    assert process.returncode == 1
    wait_for_end([child])


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_script_for_a_gpu_runs_whole_on_a_cpu(tmp_path):
    command = on_a_cpu(tmp_path / "gpu.json", "--limit=400", "--minutes=24")
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {part["state"] for part in report["parts"].values()} == {"completed"}
    assert report["environment"]["torch"] == version("torch")
    of = {name: [r for r in report["rows"] if r["part"] == name] for name in report["parts"]}
    assert [row["differ"] for row in of["correct"]] == [0] * 4
    assert of["tests"][0]["tests"] > 40
    for part, loops in LOOPS.items():
        assert [row["loop"] for row in of[part]] == list(loops) * 2
        assert all(r["images_per_second"] > 0 or "not installed" in r["error"] for r in of[part])
    assert all(row["kernels"] > 400 for row in of["kernels"])
    assert [row["method"] for row in of["train"]] == ["sam", "sgd"]
    assert all(0 <= row["accuracy"] <= 1 and row["seconds"] > 0 for row in of["train"])
    assert (tmp_path / "gpu.json.md").read_text() == markdown(report)


def test_tables_guess_nothing():
    speed = {"part": "speed", "model": "resnet18", "batch": 512, "loop": "this project"}
    error = {**speed, "loop": "pytorch-optimizer", "error": "it is not installed"}
    report = {
        "device": "cuda",
        "environment": {"gpu": "NVIDIA H200"},
        "parts": {"speed": {"state": "killed at its limit of 9 s", "seconds": 9.0}},
        "rows": [{**speed, "images_per_second": 21234.5}, error],
    }
    lines = markdown(report).splitlines()
    assert "Measured on: gpu NVIDIA H200." in lines
    none = " | ".join(["not reached"] * 6)
    cells = "not reached | not reached | it is not installed | 21,234 | not reached | not reached"
    assert f"| ResNet-18, batch 512 | {cells} |" in lines
    assert f"| WRN-28-10, batch 256 | {none} |" in lines
    assert lines[-1] == "- speed: killed at its limit of 9 s, 9 s"


def test_a_seed_without_its_sgd_is_in_no_mean():
    runs = [("sam", 0, 0.95), ("sgd", 0, 0.94), ("sam", 1, 0.97), ("sgd", 1, 0.92), ("sam", 2, 0.1)]
    of_time = {"part": "train", "seconds": 80.0, "images_per_second": 2e4}
    rows = [{"method": m, "seed": s, "accuracy": a, **of_time} for m, s, a in runs]
    parts = {"train": {"state": "stopped"}}
    shown = markdown({"device": "cuda", "environment": {}, "parts": parts, "rows": rows})
    assert "| test accuracy, %, sam: mean (of each seed) | 96.00 (95.00, 97.00) |" in shown
    assert "| test accuracy, %, sgd: mean (of each seed) | 93.00 (94.00, 92.00) |" in shown


# ------------------------------------------------------------------------------- the limit


@pytest.mark.slow
def test_an_update_is_counted():
    width, batch, side = 4, 2, 32
    update = counted(batch, width)
    assert [*update] == [
        *("gather, augment", "pass 1: forward", "losses, accuracies", "pass 1: backward"),
        *("perturb", "pass 2: forward", "pass 2: backward", "restore, clip, step, log"),
    ]
    first, second = update["pass 1: forward"], update["pass 2: forward"]
    assert first.kernels - second.kernels == 20  # BatchNorms count their batches in pass 1 alone
    model = SAMResNet18(width=width)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(batch, 3, side, side))
    assert first.flops == second.flops == counter.get_total_flops()
    stem = 2 * batch * 3 * 9 * width * side**2  # nobody asks for the gradient of the images
    assert update["pass 2: backward"].flops == 2 * first.flops - stem
    # Norm: 1 read. Copy: 1 read, 1 written. Perturb: 2 read, 1 written. All float32.
    weights = sum(p.numel() for p in model.parameters())
    assert update["perturb"].bytes == pytest.approx(6 * 4 * weights, rel=0.02)


def test_the_largest_time_is_the_bound():
    image = Count(bytes=50_000_000, flops=6_600_000_000)
    rows = bounds(1e9, image, host=0.01)
    memory = 512 / ((1e9 + 512 * 5e7) / 3.35e12)
    assert rows[1] == (
        f"| H100 SXM, batch 512 | {989e12 / 6.6e9:,.0f} | {memory:,.0f} | 51,200 | host |"
    )
    assert bounds(1e9, image, host=0.001)[0].endswith("| memory |")


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
