"""Pictures of the loss: their numbers against closed forms and plain loops, and their files."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from runs import run
from sam_lightning.analysis import landscape
from sam_lightning.analysis.landscape_plots import bounds, draw, ticks
from sam_lightning.analysis.loss_surface import LossSurface
from sam_lightning.config.errors import ConfigError
from sam_lightning.inference.load import data_of, load

SMALL = ["images=999", "points=3"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    keys = ["data.subset=40", "batch_size=20", "epochs=1", "test=false", "model.width=2"]
    for name, rho in (("sgd", 0), ("sam", 0.1)):
        run(base / name, f"rho={rho}", *keys)
    return base


def result(folder):
    return json.loads((folder / "landscape.json").read_text())


# ----------------------------------------------------------------------- grid and directions


def test_the_grid_of_a_quadratic_is_the_closed_form():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    inputs, targets = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    batches = [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    surface = LossSurface(model, batches, nn.functional.mse_loss)
    directions = [torch.randn(surface.size, dtype=torch.float64) for _ in range(2)]
    where = [-1.0, 0.0, 0.5, 2.0]
    grid = surface.along(directions, where)
    # The residual is linear in the coordinates, so the mean of its squares has six coefficients.
    ones = torch.cat([inputs, torch.ones(8, 1).double()], 1)
    weights = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    moves = [torch.cat([d[:6].view(2, 3), d[6:, None]], 1) for d in directions]
    r, p, q = (ones @ m.T for m in (weights, *moves))
    r = r - targets
    for i, a in enumerate(where):
        for j, b in enumerate(where):
            expected = (
                (r * r).mean()
                + (a * a * p * p + b * b * q * q).mean()
                + 2 * (a * r * p + b * r * q + a * b * p * q).mean()
            )
            assert grid[i, j] == pytest.approx(expected.item(), rel=1e-12)
    row = surface.along(directions[:1], where)
    torch.testing.assert_close(row, grid[:, 1])
    assert row[1] == surface.value()


def test_directions_have_the_norms_of_the_filters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))
    model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        model[0].weight[1] *= 100
        model[0].weight[2] = 0
    surface = LossSurface(model, [])
    first, second = (surface.filter_normalised(g) for g in (generator(), generator()))
    assert torch.equal(first, second)
    assert not torch.equal(first, surface.filter_normalised(generator(1)))
    conv, conv_bias, scale, shift, linear, linear_bias = surface.split(first)
    for d, w in ((conv, model[0].weight), (linear, model[3].weight)):
        for unit in range(len(w)):
            assert d[unit].norm().item() == pytest.approx(w[unit].norm().item(), rel=1e-5)
    for fixed in (conv_bias, scale, shift, linear_bias):
        assert not fixed.any()
    # The draw is Gaussian and the same for another model of these shapes, whatever its weights.
    with torch.no_grad():
        model[3].weight *= 7
    *_, again, _ = surface.split(surface.filter_normalised(generator()))
    torch.testing.assert_close(again, 7 * linear)


# ------------------------------------------------------------------------------- the command


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["stored", "batch"])
def test_around_checkpoints(trained, tmp_path, capsys, batch_norm):
    paths = f"{trained}/sgd,{trained}/sam/checkpoints/last.ckpt"
    before = (trained / "sgd" / "checkpoints" / "last.ckpt").read_bytes()
    arguments = [*SMALL, "batch_size=40", "span=0.5", "seed=4", f"batch_norm={batch_norm}"]
    landscape.main([f"ckpt_path={paths}", "labels=A,B", f"out={tmp_path}", *arguments])
    found = result(tmp_path)
    assert found["labels"] == ["A", "B"]
    assert found["coordinates"] == [-0.5, 0, 0.5]
    assert found["images"] == 40
    assert (trained / "sgd" / "checkpoints" / "last.ckpt").read_bytes() == before
    for name, losses in zip(("sgd", "sam"), found["loss"], strict=True):
        model = load(trained / name / "checkpoints" / "last.ckpt")
        split = data_of(model.config).train
        images = model.preprocess(split.images)
        for module in model.modules():
            module.train(batch_norm == "batch" and isinstance(module, nn.BatchNorm2d))
        g = generator(4)
        moves = []
        for _ in range(2):
            moves.append([])
            for p in model.parameters():
                d = torch.randn(p.shape, generator=g)
                for unit, filters in zip(d, p.detach(), strict=True):
                    unit *= filters.norm() / (unit.norm() + 1e-10) if p.ndim > 1 else 0
                moves[-1].append(d)
        start = [p.detach().clone() for p in model.parameters()]
        for i, a in enumerate(found["coordinates"]):
            for j, b in enumerate(found["coordinates"]):
                with torch.no_grad():
                    for p, w, d1, d2 in zip(model.parameters(), start, *moves, strict=True):
                        p.copy_(w + a * d1 + b * d2)
                    expected = cross_entropy(model(images), split.labels).item()
                assert losses[i][j] == pytest.approx(expected, rel=2e-3)
    printed = capsys.readouterr().out.split()
    names = ["landscape.json"]
    names += [f"landscape{n}.{form}" for n in ("", "_3d") for form in ("png", "svg")]
    assert [p.rpartition("/")[2] for p in printed] == names
    assert {p.name for p in tmp_path.iterdir()} == {*names}


def test_the_line_between_two_ends_at_their_own_losses(trained, tmp_path):
    paths = f"ckpt_path={trained}/sgd,{trained}/sam"
    landscape.main([paths, "kind=line", *SMALL, f"out={tmp_path}"])
    found = result(tmp_path)
    assert found["coordinates"] == [0, 0.5, 1]
    assert found["labels"] == ["base optimizer", "SAM, rho 0.1"]
    models = [load(trained / name / "checkpoints" / "last.ckpt") for name in ("sgd", "sam")]
    middle = load(trained / "sgd" / "checkpoints" / "last.ckpt")
    states = [model.state_dict() for model in models]
    middle.load_state_dict({k: (v + states[1][k]) / 2 for k, v in states[0].items()})
    split = data_of(middle.config).train
    with torch.no_grad():
        expected = [
            cross_entropy(model(model.preprocess(split.images)), split.labels).item()
            for model in (models[0], middle, models[1])
        ]
    assert found["loss"] == [pytest.approx(expected, rel=1e-4)]
    assert (tmp_path / "landscape_line.png").stat().st_size > 1000


def test_one_direction_into_the_folder_of_the_run(trained):
    landscape.main([f"ckpt_path={trained}/sam", "kind=1d", *SMALL, "split=test", "images=20"])
    folder = trained / "sam" / "landscape"
    names = {"landscape.json", "landscape_1d.png", "landscape_1d.svg"}
    assert {p.name for p in folder.iterdir()} == names
    assert len(result(folder)["loss"][0]) == 3


def test_a_tensorboard_that_cannot_be_written_is_said_in_a_line(trained, tmp_path, capsys):
    blocked = trained / "sgd" / "tensorboard" / "landscape"
    shutil.rmtree(blocked, ignore_errors=True)
    blocked.touch()
    landscape.main([f"ckpt_path={trained}/sgd", "kind=1d", *SMALL, f"out={tmp_path}"])
    error = capsys.readouterr().err
    assert error.startswith(f"warning: {blocked}: gets no pictures (")
    assert error.count("\n") == 1
    assert (tmp_path / "landscape_1d.png").is_file()
    blocked.unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ckpt_path=RUN/sgd", "points=4"], "points=4: allowed is an odd number >= 3"),
        (["ckpt_path=RUN/sgd", "kind=3d"], "kind=3d: allowed is 2d, 1d, line"),
        (["ckpt_path=RUN/sgd", "spam=2"], "spam=2: no such key; did you mean span?"),
        (["ckpt_path=RUN/sgd", "kind=line"], "kind=line: needs two checkpoints in ckpt_path"),
        (["ckpt_path=RUN/sgd,RUN/other", "kind=line"], "are of different models"),
        (["ckpt_path=RUN/sgd", "out=/proc/x"], "out=/proc/x: cannot be made (No such file or d"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(trained, arguments, message):
    if "other" in arguments[0] and not (trained / "other").exists():
        keys = ["data.subset=40", "batch_size=40", "epochs=1", "test=false", "model.width=1"]
        run(trained / "other", *keys)
    with pytest.raises(ConfigError) as raised:
        landscape.main([a.replace("RUN", str(trained)) for a in arguments])
    assert message in str(raised.value)
    assert not (trained / "sgd" / "landscape").exists()


# ------------------------------------------------------------------------------- the pictures


def picture(loss, kind="2d"):
    return {
        "kind": kind,
        "labels": ["A", "B"][: len(loss)],
        "split": "train",
        "images": 100,
        "guessing": math.log(10),
        "coordinates": [-1.0, -0.5, 0.0, 0.5, 1.0],
        "loss": loss,
    }


def bowl(height):
    x = np.linspace(-1, 1, 5)
    return (0.1 + height * (x[:, None] ** 2 + x**2)).tolist()


def test_one_scale_that_is_cut_where_the_loss_explodes():
    assert bounds(picture([bowl(1.0), bowl(2.0)])) == (0.1, pytest.approx(4.1))
    exploded = bowl(1e6)
    exploded[0][0] = None  # was not finite
    low, high = bounds(picture([bowl(1.0), exploded]))
    assert (low, high) == (0.1, 10 * math.log(10))
    low, high = bounds(picture([[[0.5] * 5] * 5]))
    assert 0 < low < high
    assert bounds(picture([[[0.0] * 5] * 5]))[0] > 0


def test_ticks_are_round_numbers_in_range():
    assert ticks(0.15, 23) == pytest.approx([0.2, 0.5, 1, 2, 5, 10, 20])


@pytest.mark.parametrize("kind", ["2d", "1d", "line"])
def test_pictures_are_the_same_from_the_same_numbers(tmp_path, kind):
    exploded = bowl(1e6)
    exploded[0][0] = None
    loss = {"2d": [bowl(1.0), exploded], "1d": [bowl(1.0)[0], exploded[0]], "line": [bowl(1.0)[0]]}
    numbers = picture(loss[kind], kind)
    numbers["labels"] = ["$a_{$", "B"]  # no formula, which would be an unfinished one
    files = draw(numbers, tmp_path / "first")
    assert all(file.stat().st_size > 1000 for file in files)
    for file in draw(numbers, tmp_path / "second"):
        assert file.read_bytes() == (tmp_path / "first" / file.name).read_bytes()


def test_the_callers_style_stays():
    import matplotlib

    from sam_lightning import plotting as plots

    before = dict(matplotlib.rcParams)
    with plots.style():
        assert matplotlib.rcParams["svg.hashsalt"] == "sam-lightning"
    assert dict(matplotlib.rcParams) == before
