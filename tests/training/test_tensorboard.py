"""A sweep in a real TensorBoard: what its server answers to the pages that people look at."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inject import forked
from runs import WITH_DASHBOARD, rows, summary
from sam_lightning.analysis import landscape
from sam_lightning.training.callbacks.tensorboard import CHARTS, MONITORED

pytestmark = pytest.mark.slow

OPTIONS = [*WITH_DASHBOARD, "data.val_size=100", "data.label_noise=0.2"]
RUNS = {"0_rho=0,seed=0": 0, "1_rho=0,seed=1": 0, "2_rho=0.2,seed=0": 0.2, "3_rho=0.2,seed=1": 0.2}


class Server:
    """A TensorBoard on a free port, and its answers."""

    def __init__(self, folder):
        command = [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}", "--port=0"]
        self.process = subprocess.Popen(
            [*command, "--host=127.0.0.1"], stderr=subprocess.PIPE, text=True
        )
        printed = []
        for line in self.process.stderr:
            printed.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                self.url = f"{found[0]}/data/plugin"
                return
        raise AssertionError("".join(printed))

    def raw(self, path, **query):
        separator = "&" if "?" in path else "?"
        with urlopen(f"{self.url}/{path}{separator}{urlencode(query)}", timeout=20) as answer:
            return answer.read()

    def get(self, path, **query):
        return json.loads(self.raw(path, **query))

    def post(self, path, **content):
        headers = {"Content-Type": "application/json"}
        request = Request(f"{self.url}/{path}", json.dumps(content).encode(), headers)
        with urlopen(request, timeout=20) as answer:
            return json.loads(answer.read())

    def scalars(self, run, tag):
        points = self.get("scalars/scalars", run=f"{run}/tensorboard", tag=tag)
        return {step: value for _, step, value in points}

    def sessions(self):
        everything = {"allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 100}
        found = self.post("hparams/session_groups", experimentName="", colParams=[], **everything)
        return {
            group["name"].removesuffix("/tensorboard"): group for group in found["sessionGroups"]
        }


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A sweep of four runs."""
    folder = tmp_path_factory.mktemp("logs")
    names = "hydra.sweep.subdir='${hydra.job.num}_rho=${rho},seed=${seed}'"
    sweep = ["-m", "rho=0,0.2", "seed=0,1", f"hydra.sweep.dir={folder}", names]
    done = forked(folder, *OPTIONS, *sweep)
    assert done.returncode == 0, done.stderr
    return folder


DRAWN = ["0_rho=0,seed=0", "2_rho=0.2,seed=0"]


@pytest.fixture(scope="module")
def pictures(logs, tmp_path_factory):
    """The landscapes of two of the runs; that along one direction was drawn twice."""
    out = tmp_path_factory.mktemp("pictures")
    subjects = "ckpt_path=" + ",".join(str(logs / run) for run in DRAWN)
    for kind, seed in (("2d", 0), ("1d", 0), ("1d", 1)):
        few = ["images=10", "points=3", f"kind={kind}", f"seed={seed}", f"out={out}"]
        landscape.main([subjects, *few])
    return out


@pytest.fixture(scope="module")
def server(logs, pictures):
    server = Server(logs)
    try:
        deadline = time.monotonic() + 60
        while len(server.sessions()) < len(RUNS) or len(server.get("images/tags")) < 6:
            assert time.monotonic() < deadline, "TensorBoard has not read the runs"
            time.sleep(0.1)
        yield server
    finally:
        server.process.terminate()
        server.process.wait(20)
        server.process.stderr.close()


@pytest.mark.parametrize("run", RUNS)
def test_curves_are_those_of_the_table(server, logs, run):
    tags = {tag for tag in server.get("scalars/tags")[f"{run}/tensorboard"] if "/" in tag}
    names = {name for name in rows(logs / run)[0] if "/" in name}
    assert tags == names | {"train/images_per_second", "accuracy/test", "accuracy/val"}
    for split in ("test", "val"):
        accuracy = summary(logs / run)["metrics"][f"{split}/acc"]
        assert server.scalars(run, f"accuracy/{split}") == {4: pytest.approx(accuracy, rel=1e-6)}
    assert ("train/cosine" in names) == (RUNS[run] > 0)
    for name in names:
        expected = {int(r["step"]): float(r[name]) for r in rows(logs / run) if r[name]}
        assert server.scalars(run, name) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_images_per_second_add_up_to_the_time_of_training(server, logs, run):
    points = server.scalars(run, "train/images_per_second")
    assert list(points) == [2, 4]
    seconds = sum(100 / speed for speed in points.values())
    assert seconds == pytest.approx(summary(logs / run)["train_seconds"], rel=1e-5)


def test_the_layout_has_each_chart_with_its_curves(server):
    found = {
        page["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in page["chart"]}
        for page in server.get("custom_scalars/layout")["category"]
    }
    wanted = {
        page: {title: [f"^{tag}$"] for title, tag in charts.items()}
        for page, charts in CHARTS.items()
        if page != MONITORED
    }
    assert found == wanted
    for page in wanted:
        for tag in CHARTS[page].values():
            query = {"run": "2_rho=0.2,seed=0/tensorboard", "tag": f"^{tag}$"}
            matches = server.get("custom_scalars/scalars", **query)["tag_to_events"]
            assert list(matches) == [tag]


@pytest.mark.parametrize("run", RUNS)
def test_each_image_is_there_once(server, run):
    found = server.get("images/tags")[f"{run}/tensorboard"]
    assert set(found) == {"train/first_batch", "test/confusion", "test/most_wrong"}
    for tag in found:
        (entry,) = server.get("images/images", run=f"{run}/tensorboard", tag=tag, sample=0)
        assert entry["step"] == (0 if tag == "train/first_batch" else 4)
        png = server.raw(f"images/individualImage?{entry['query']}")
        with Image.open(io.BytesIO(png)) as image:
            assert image.format == "PNG"
            assert len(image.convert("RGB").getcolors(10**6)) > 50
            if tag == "train/first_batch":
                assert image.size == (8 * 34 + 2, 7 * 34 + 2)  # 50 images of 32 x 32


def test_landscapes_are_at_the_update_of_their_checkpoint(server, pictures):
    found = server.get("images/tags")
    names = {"2d": "landscape", "3d": "landscape_3d", "1d": "landscape_1d"}
    assert {run for run in found if run.endswith("/landscape")} == {
        f"{run}/tensorboard/landscape" for run in DRAWN
    }
    for run in (f"{run}/tensorboard/landscape" for run in DRAWN):
        assert set(found[run]) == {f"landscape/{name}" for name in names}
        for name, file in names.items():
            tag = f"landscape/{name}"
            (entry,) = server.get("images/images", run=run, tag=tag, sample=0)
            assert entry["step"] == 4
            png = server.raw(f"images/individualImage?{entry['query']}")
            with (
                Image.open(io.BytesIO(png)) as shown,
                Image.open(pictures / f"{file}.png") as drawn,
            ):
                assert shown.convert("RGB").tobytes() == drawn.convert("RGB").tobytes()


def test_the_graph_has_the_layers_of_the_model(server):
    found = server.get("graphs/info")
    assert {name.removesuffix("/tensorboard") for name in found} == {*RUNS}
    assert all(info["run_graph"] for info in found.values())
    graph = server.raw("graphs/graph", run="0_rho=0,seed=0/tensorboard", conceptual="false")
    assert b'name: "SAMResNet18/Sequential[layer4]/' in graph
    assert graph.count(b'op: "aten::_convolution"') == 20
    assert graph.count(b'op: "aten::linear"') == 1


def test_hparams_show_what_differs_first_with_the_final_metrics(server, logs):
    experiment = server.post("hparams/experiment", experimentName="")
    names = [info["name"] for info in experiment["hparamInfos"]]
    assert names[:3] == ["Rho", "seed", "Method"]  # the last does not differ
    assert {"lr", "model.width", "method.ascent_fraction", "optimizer.momentum"} <= {*names}
    metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
    # The page shows the first five before one chooses.
    assert metrics[:2] == ["accuracy/test", "accuracy/val"]
    sessions = server.sessions()
    assert sessions.keys() == {*RUNS}
    for run, rho in RUNS.items():
        settings = sessions[run]["hparams"]
        assert settings["Rho"] == rho
        assert settings["seed"] == int(run[-1])
        assert settings["Method"] == "sam"
        assert settings["model.width"] == 4
        values = {v["name"]["tag"]: v["value"] for v in sessions[run]["metricValues"]}
        for name, value in summary(logs / run)["metrics"].items():
            assert values[name] == pytest.approx(value, rel=1e-6)


@pytest.mark.slow
def test_a_resumed_run_has_each_image_and_point_once(tmp_path):
    folder = tmp_path / "run"
    options = [*OPTIONS, f"hydra.run.dir={folder}", "ckpt_path=last"]
    killed = forked(tmp_path, *options, fault=("SIGKILL", "pass:8"))  # in the second epoch
    assert killed.returncode == -signal.SIGKILL
    landscape.main([f"ckpt_path={folder}", "kind=1d", "images=10", "points=3"])
    assert forked(tmp_path, *options).returncode == 0
    events = EventAccumulator(str(folder / "tensorboard" / "landscape")).Reload()
    assert [e.step for e in events.Images("landscape/1d")] == [2]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert events.Graph().node
    for tag, step in (("train/first_batch", 0), ("test/confusion", 4), ("test/most_wrong", 4)):
        assert [e.step for e in events.Images(tag)] == [step]
    for name in ("train/cosine", "val/acc", "train/images_per_second"):
        steps = [1, 2, 3, 4] if name == "train/cosine" else [2, 4]
        assert [e.step for e in events.Scalars(name)] == steps
