"""Evaluation of a checkpoint against the run itself, scikit-learn and plain loops."""

import csv
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    top_k_accuracy_score,
)

from sam_lightning.config.errors import ConfigError
from sam_lightning.data.corruptions import CORRUPTIONS
from sam_lightning.inference import evaluate as command
from sam_lightning.inference.evaluate import evaluate, main
from sam_lightning.inference.load import data_of, load
from sam_lightning.runs.checkpoint import read
from trained_runs import changed, digits_run, folder_run, hostile, last


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_run(tmp_path_factory.getbasetemp())


def written(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def probabilities_of(model, images) -> np.ndarray:
    with torch.no_grad():
        return model(model.preprocess(images)).double().softmax(1).numpy()


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Guo et al. 2017, equation 5, one image at a time."""
    members: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for row, label in zip(probabilities, labels, strict=True):
        confidence = row.max()
        members[min(int(confidence * bins), bins - 1)].append((confidence, row.argmax() == label))
    error = 0.0
    for entries in members:
        if entries:
            confidence, right = (
                sum(column) / len(entries) for column in zip(*entries, strict=True)
            )
            error += len(entries) / len(labels) * abs(right - confidence)
    return error


# ------------------------------------------------------------------------------ the numbers


def test_it_equals_the_test_of_the_run_exactly(run, tmp_path):
    main([f"ckpt_path={run}", f"out={tmp_path}"])
    trained = json.loads((run / "metrics.json").read_text())["metrics"]
    found = written(tmp_path)["metrics"]
    for name in ("test/loss", "test/acc", "test/acc5", "test/error"):
        assert found[name] == trained[name]


def test_it_equals_the_last_validation_of_the_run_exactly(run, tmp_path):
    main([f"ckpt_path={last(run)}", f"out={tmp_path}", "split=val"])
    trained = json.loads((run / "metrics.json").read_text())["metrics"]
    found = written(tmp_path)
    assert (found["split"], found["images"]) == ("val", 200)
    for name in ("val/loss", "val/acc", "val/acc5", "val/error"):
        assert found["metrics"][name] == trained[name]


@pytest.mark.parametrize("split", ["test", "train"])
def test_every_figure_is_that_of_another_implementation(run, tmp_path, split):
    main([f"ckpt_path={run}", f"out={tmp_path}", f"split={split}", "batch_size=97"])
    found = written(tmp_path)
    model, data = (
        load(last(run)),
        data_of(read(last(run))["hyper_parameters"]),
    )  # labels of train with their noise
    images, labels = getattr(data, split).images, getattr(data, split).labels.numpy()
    probabilities = probabilities_of(model, images)
    predicted = probabilities.argmax(1)
    metrics = {name.removeprefix(f"{split}/"): v for name, v in found["metrics"].items()}
    assert metrics == pytest.approx(
        {
            "loss": log_loss(labels, probabilities, labels=range(10)),
            "acc": np.mean(predicted == labels),
            "error": np.mean(predicted != labels),
            "balanced_acc": balanced_accuracy_score(labels, predicted),
            "macro_f1": f1_score(labels, predicted, average="macro"),
            "acc5": top_k_accuracy_score(labels, probabilities, k=5, labels=range(10)),
            "calibration_error": calibration_error(probabilities, labels),
        },
        rel=1e-5,
    )
    for k, entry in enumerate(found["classes"]):
        of_class = labels == k
        assert entry["class"] == str(k)
        assert entry["images"] == of_class.sum()
        assert entry["acc"] == pytest.approx(np.mean(predicted[of_class] == k))
    with open(tmp_path / "confusion_matrix.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["true class", *"0123456789"]
    assert [row[0] for row in rows] == list("0123456789")
    counts = np.array([row[1:] for row in rows], int)
    assert np.array_equal(counts, confusion_matrix(labels, predicted, labels=range(10)))
    head, rows = predictions(tmp_path)
    assert head == ["index", "label", "prediction", "probability", *(f"p({k})" for k in range(10))]
    assert [row[:3] for row in rows] == [
        [str(i), str(label), str(k)]
        for i, (label, k) in enumerate(zip(labels, predicted, strict=True))
    ]
    found = np.array([row[3:] for row in rows], float)
    assert found[:, 0] == pytest.approx(probabilities.max(1), rel=1e-5)
    assert found[:, 1:] == pytest.approx(probabilities, rel=1e-4, abs=1e-9)


def predictions(folder: Path) -> tuple[list[str], list[list[str]]]:
    with open(folder / "predictions.csv", newline="") as file:
        head, *rows = csv.reader(file)
    return head, rows


def test_predictions_have_the_names_of_files(photos, tmp_path):
    main([f"ckpt_path={photos}", f"out={tmp_path}"])
    head, rows = predictions(tmp_path)
    assert head[:4] == ["file", "label", "prediction", "probability"]
    files = sorted((photos / "photos" / "test").rglob("*.png"))
    assert [row[0] for row in rows] == [str(f.relative_to(photos / "photos")) for f in files]
    assert [row[1] for row in rows] == [f.parent.name for f in files]
    model = load(last(photos))
    for file, row in zip(files, rows, strict=True):
        with Image.open(file) as image:
            (each,) = probabilities_of(model, image)
        assert row[2] == model.classes[each.argmax()]
        assert [float(p) for p in row[4:]] == pytest.approx(each, rel=1e-3, abs=1e-6)


def test_names_are_cleaned_for_spreadsheets(photos, tmp_path):
    def rename(checkpoint):
        checkpoint["hyper_parameters"]["classes"] = ["=1+1", "r\x1bed", "yellow"]

    (tmp_path / "photos").mkdir()
    for split in ("train", "test"):
        for old, new in (("blue", "=1+1"), ("red", "r\x1bed"), ("yellow", "yellow")):
            shutil.copytree(photos / "photos" / split / old, tmp_path / "photos" / split / new)
    changed(last(photos), tmp_path / "x.ckpt", rename)
    main([f"ckpt_path={tmp_path / 'x.ckpt'}", f"data.root={tmp_path / 'photos'}"])
    head, rows = predictions(tmp_path)
    assert head[4:] == ["p(=1+1)", "p(r ed)", "p(yellow)"]
    assert {row[1] for row in rows} == {"'=1+1", "r ed", "yellow"}
    assert rows[5][0] == "test/r ed/0.png"


def test_of_many_classes_predictions_have_the_most_likely(run, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "EACH", 9)
    main([f"ckpt_path={run}", f"out={tmp_path}"])
    head, rows = predictions(tmp_path)
    assert head[4:8] == ["class_1", "probability_1", "class_2", "probability_2"]
    probabilities = probabilities_of(
        load(last(run)), data_of(read(last(run))["hyper_parameters"]).test.images
    )
    order = (-probabilities).argsort(1)[:, :5]
    assert [[int(k) for k in row[4::2]] for row in rows] == order.tolist()
    found = np.array([row[5::2] for row in rows], float)
    assert found == pytest.approx(np.take_along_axis(probabilities, order, 1), rel=1e-4)


def test_logits_between_0_and_1_are_not_taken_for_probabilities(run):
    model = load(last(run))
    test = data_of(read(last(run))["hyper_parameters"]).test
    logits = torch.rand(len(test), 10, generator=torch.Generator().manual_seed(0))
    batches = iter(logits.split(100))
    model.forward = lambda images: next(batches)  # type: ignore[method-assign]
    found = evaluate(model, test, batch_size=100)
    expected = calibration_error(logits.double().softmax(1).numpy(), test.labels.numpy())
    assert found["calibration_error"] == pytest.approx(expected, rel=1e-5)


def test_fewer_classes_have_no_top_5_and_one_without_images_no_accuracy(photos, tmp_path):
    main([f"ckpt_path={photos}", f"out={tmp_path}"])
    assert set(written(tmp_path)["metrics"]) == {
        f"test/{name}"
        for name in ("loss", "acc", "error", "balanced_acc", "macro_f1", "calibration_error")
    }
    model, test = load(last(photos)), data_of(read(last(photos))["hyper_parameters"]).test
    kept = test.take((test.labels != 1).nonzero().squeeze(1))
    found = evaluate(model, kept)
    assert found["confusion"][1] == [0, 0, 0]
    # A class without images counts in the F1 score only if it was predicted, as in scikit-learn.
    seen = kept.labels.numpy(), found["predicted"].numpy()
    for predicted in (seen[1], np.where(seen[0] == 0, 1, seen[1])):
        model.forward = lambda images, p=predicted: 9.0 * torch.eye(3)[torch.from_numpy(p)]
        found = evaluate(model, kept)
        with pytest.warns(UserWarning, match="not in y_true") if 1 in predicted else nullcontext():
            expected = balanced_accuracy_score(seen[0], predicted)
        assert found["balanced_acc"] == pytest.approx(expected)
        assert found["macro_f1"] == pytest.approx(f1_score(seen[0], predicted, average="macro"))


# ------------------------------------------------------------------------------- corruptions


def write_corruptions(folder, labels, shape=(16, 20), seed=0):
    """The published layout: for each corruption all images at severity 1, then at 2, up to 5."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(labels.numpy().astype(np.uint8), 5))
    for name in CORRUPTIONS:
        pixels = rng.integers(0, 256, (5 * len(labels), *shape, 3), dtype=np.uint8)
        np.save(folder / f"{name}.npy", pixels)
    return folder


def test_accuracy_under_corruption_is_that_of_the_files_images_one_by_one(photos, tmp_path, capsys):
    model, labels = load(last(photos)), data_of(read(last(photos))["hyper_parameters"]).test.labels
    folder = write_corruptions(tmp_path / "CIFAR-10-C", labels)
    out = tmp_path / "out"
    main([f"ckpt_path={photos}", f"corruptions={folder}", f"out={out}", "batch_size=4"])
    found = written(out)
    assert len(found["corruptions"]) == 15
    for name in ("gaussian_noise", "jpeg_compression"):
        pixels = np.load(folder / f"{name}.npy")
        for severity, accuracy in enumerate(found["corruptions"][name]):
            right = 0
            for i, label in enumerate(labels.tolist()):
                image = Image.fromarray(pixels[severity * len(labels) + i])
                right += probabilities_of(model, image).argmax() == label
            assert accuracy == right / len(labels)
    errors = [1 - np.mean(accuracies) for accuracies in found["corruptions"].values()]
    assert found["metrics"]["test/mean_corruption_error"] == pytest.approx(np.mean(errors))
    row = f"jpeg_compression .* {found['corruptions']['jpeg_compression'][4]:.2%}"
    printed = capsys.readouterr().out.splitlines()
    assert any(all(part in line for part in row.split(" .* ")) for line in printed)


def test_corrupted_files_that_do_not_fit_are_refused_in_one_line(photos, tmp_path):
    labels = data_of(read(last(photos))["hyper_parameters"]).test.labels
    folder = write_corruptions(tmp_path / "C", labels)

    def refused(*arguments, given=folder):
        with pytest.raises(ConfigError) as caught:
            main([f"ckpt_path={photos}", f"corruptions={given}", f"out={tmp_path}", *arguments])
        assert str(caught.value).startswith(f"corruptions={given}: ")
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"corruptions={given}: ")

    assert refused("split=train") == "needs split=test"
    assert refused(given=tmp_path / "none") == "there is no labels.npy in it"
    other = write_corruptions(tmp_path / "other", (labels + 1) % 3)
    assert refused(given=other).startswith("labels.npy does not have the 15 labels of the run's")
    np.save(folder / "fog.npy", np.zeros((75, 16, 20), np.uint8))
    assert refused().startswith("fog.npy is uint8 (75, 16, 20), not uint8 (75, height, width, 3)")
    (folder / "fog.npy").write_bytes(b"fog")
    assert refused().startswith("cannot read fog.npy (")
    (folder / "fog.npy").unlink()
    assert refused() == "there is no fog.npy in it"
    assert not (tmp_path / "evaluation.json").exists()


# --------------------------------------------------------------------------------- command


def test_it_writes_into_the_folder_of_the_run_and_prints_tables(photos, tmp_path, capsys):
    before = {p.name for p in photos.iterdir()}
    main([f"ckpt_path={last(photos)}"])
    assert {p.name for p in photos.iterdir()} - before == {
        "evaluation.json",
        "confusion_matrix.csv",
        "predictions.csv",
    }
    found = written(photos)
    (photos / "evaluation.json").unlink()
    (photos / "confusion_matrix.csv").unlink()
    (photos / "predictions.csv").unlink()
    printed = capsys.readouterr().out
    for line in (
        f"test/acc .* {found['metrics']['test/acc']:.2%}",
        f"yellow .* 5 .* {found['classes'][2]['acc']:.2%}",
    ):
        assert any(all(part in row for part in line.split(" .* ")) for row in printed.splitlines())
    # a checkpoint that lies alone has its results beside it
    (tmp_path / "alone.ckpt").write_bytes(last(photos).read_bytes())
    main([f"ckpt_path={tmp_path / 'alone.ckpt'}"])
    assert written(tmp_path)["ckpt_path"] == str(tmp_path / "alone.ckpt")


def test_images_may_have_moved(photos, tmp_path):
    (tmp_path / "moved").symlink_to(photos / "photos")
    out = tmp_path / "out"
    main([f"ckpt_path={photos}", f"data.root={tmp_path / 'moved'}", f"out={out}"])
    assert written(out)["images"] == 15
    with pytest.raises(ConfigError, match=r"data\.root=.*nowhere"):
        main([f"ckpt_path={photos}", f"data.root={tmp_path / 'nowhere'}", f"out={out}"])


def test_results_are_shown_also_where_they_cannot_be_written(photos, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"out=.*file/x/.*: cannot be written"):
        main([f"ckpt_path={photos}", f"out={tmp_path / 'file' / 'x'}"])
    assert "test/acc" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_wrong_arguments_are_refused_in_one_line(run, photos, tmp_path):
    (tmp_path / "file").touch()
    for arguments, says in [
        (["ckpt_path=none"], "ckpt_path=none: no such file or folder"),
        (["ckpt_path=${nope}"], r"ckpt_path=\$\{nope\}: .*'nope' not found"),
        ([f"ckpt_path={tmp_path}"], f"ckpt_path={tmp_path}: there is no checkpoints/last.ckpt"),
        ([f"ckpt_path={run}", "split=vals"], "split=vals: allowed is test, val, train"),
        ([f"ckpt_path={run}", "batch_size=0"], "batch_size=0: allowed is a whole number >= 1"),
        ([f"ckpt_path={run}", "device=tpu"], "device=tpu: allowed is auto, cpu, cuda"),
        ([f"ckpt_path={run}", f"out={tmp_path / 'file'}"], "is not a folder"),
        ([f"ckpt_path={run}", "out=[a]"], "out=.*a.*: allowed is a folder, as in ./figures"),
        ([f"ckpt_path={run}", "data.root=x"], "data.root=x: sam_lightning.data.digits has"),
        ([f"ckpt_path={photos}", "split=val"], "split=val: the run held out no validation data"),
    ]:
        with pytest.raises(ConfigError, match=says):
            main(arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_hostile_checkpoint_ends_with_one_line(run, tmp_path):
    made = tmp_path / "made"
    for path in hostile(last(run), tmp_path, made):
        with pytest.raises(ConfigError, match=f"ckpt_path={path}: "):
            main([f"ckpt_path={path}"])
        assert not made.exists()


def test_a_process_ends_with_exit_code_2_and_one_line():
    ended = subprocess.run(
        [sys.executable, "-m", "sam_lightning", "evaluate", "ckpt_path=none"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert (ended.stdout, ended.stderr) == ("", "error: ckpt_path=none: no such file or folder\n")
