"""The measuring instrument: its order, its statistic, and that its parts run and report."""

import gc
import json
import operator
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision import transforms

from benchmarks.__main__ import PARTS, table
from benchmarks.loaders import datasets_loader, installed, webdataset_loader
from benchmarks.peers import PlainLoop, implementations
from benchmarks.photographs import extracted, write_photographs
from benchmarks.timing import Measurement, interleave, ratio, summary, turns
from sam_lightning.data import image_folder
from sam_lightning.data.listing import list_images
from sam_lightning.data.packing import Packing, pack

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


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
