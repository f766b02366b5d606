"""Predictions for image files: probabilities, forms of output, and files that are no images."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sam_lightning.config.errors import ConfigError
from sam_lightning.inference.load import data_of, load
from sam_lightning.inference.predict import find, main, predict
from sam_lightning.runs.checkpoint import read
from trained_runs import changed, digits_run, folder_run, hostile, last


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_run(tmp_path_factory.getbasetemp())


def expected_of(folder: Path) -> np.ndarray:
    """Softmax, in float64, of the logits of the test images, in the order of their files."""
    model, data = load(last(folder)), data_of(read(last(folder))["hyper_parameters"])
    with torch.no_grad():
        logits = model(model.preprocess(data.test.images)).double().numpy()
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_probabilities_are_those_of_the_runs_evaluation(photos, tmp_path):
    out = tmp_path / "new" / "a.json"
    folder = photos / "photos" / "test"
    main([f"ckpt_path={photos}", f"input={folder}", "format=json", f"out={out}", "batch_size=4"])
    rows = json.loads(out.read_text())
    assert [row["file"] for row in rows] == [str(f) for f in sorted(folder.rglob("*.png"))]
    for row, probabilities in zip(rows, expected_of(photos), strict=True):
        order = np.argsort(-probabilities)
        names = [row["class"] for row in row["predictions"]]
        assert names == [("blue", "red", "yellow")[i] for i in order]  # all, for there are three
        found = [row["probability"] for row in row["predictions"]]
        assert found == pytest.approx(probabilities[order], rel=1e-4, abs=1e-12)


def test_grey_images_too_and_the_likeliest_classes_alone(run, tmp_path):
    images = data_of(read(last(run))["hyper_parameters"]).test.images[:20]
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i:02}.png")
    files = sorted(tmp_path.iterdir())
    rows = list(predict(load(last(run)), files, top_k=3, batch_size=7))
    for row, probabilities in zip(rows, expected_of(run)[:20], strict=True):
        order = np.argsort(-probabilities)[:3]
        assert [entry["class"] for entry in row["predictions"]] == [str(i) for i in order]
        found = [entry["probability"] for entry in row["predictions"]]
        assert found == pytest.approx(probabilities[order], rel=1e-4)
    one_by_one = [row for f in files for row in predict(load(last(run)), [f], top_k=3)]
    for row, alone in zip(rows, one_by_one, strict=True):
        for entry, other in zip(row["predictions"], alone["predictions"], strict=True):
            assert entry["class"] == other["class"]
            assert entry["probability"] == pytest.approx(other["probability"], rel=1e-4)


@pytest.mark.parametrize("sized", [True, False])
def test_images_may_be_of_many_sizes(run, tmp_path, sized):
    def record(c):
        c["hyper_parameters"]["image_size"] = [32, 32] if sized else None

    model = load(changed(last(run), tmp_path / "a.ckpt", record))
    for i, size in enumerate([(64, 64), (32, 32), (45, 99)]):
        Image.new("RGB", size, (i * 50, 90, 20)).save(tmp_path / f"{i}.jpg")
    rows = list(predict(model, find(str(tmp_path)), top_k=1))
    with torch.no_grad():
        for i, row in enumerate(rows):
            logits = model(model.preprocess(Image.open(tmp_path / f"{i}.jpg")))
            assert row["predictions"][0]["class"] == model.classes[logits.argmax()]
            assert row["predictions"][0]["probability"] == pytest.approx(
                logits.softmax(1).max().item(), rel=1e-4
            )


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_photograph_is_seen_as_the_upright_one(run, tmp_path, mode, orientation):
    pixels = np.random.default_rng(0).integers(256, size=(4, 3, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / ("a.png" if mode == "RGBA" else "a.jpg")
    Image.fromarray(pixels).resize((60, 80)).convert(mode).save(file, exif=exif)
    model = load(last(run))
    with Image.open(file) as image, torch.no_grad():
        stored = image.copy()
        stored.info = {}
        seen = [model.preprocess(i) for i in (ImageOps.exif_transpose(image), stored)]
        upright, unturned = (model(images).softmax(1)[0].tolist() for images in seen)
    (row,) = predict(model, [file], top_k=10)
    found = {entry["class"]: entry["probability"] for entry in row["predictions"]}
    assert [found[name] for name in model.classes] == upright != unturned


# -------------------------------------------------------------------------- damaged images


@pytest.fixture
def mixed(photos: Path, tmp_path: Path) -> Path:
    """Two good images; one cut off, an empty one and a text between them."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = (photos / "photos" / "test" / "yellow" / "0.png").read_bytes()
    (folder / "a.png").write_bytes(good)
    (folder / "b.png").write_bytes(good[: len(good) // 2])
    (folder / "c.jpg").touch()
    (folder / "d.png").write_bytes(good)
    (folder / "e.JPEG").write_text("not an image")
    (folder / "notes.txt").write_text("not listed")
    return folder


def test_a_damaged_image_is_named_and_does_not_lose_the_others(photos, mixed, capsys):
    with pytest.raises(SystemExit) as ended:
        main([f"ckpt_path={photos}", f"input={mixed}", "format=json"])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    names = [Path(row["file"]).name for row in rows]
    assert names == ["a.png", "b.png", "c.jpg", "d.png", "e.JPEG"]
    assert rows[0]["predictions"][0]["class"] == "yellow"
    # The same image; the rounding of its logits may depend on its place in the batch.
    one, other = (
        {found["class"]: found["probability"] for found in rows[i]["predictions"]} for i in (0, 3)
    )
    assert one == pytest.approx(other, rel=1e-3)
    errors = [row for row in rows if "error" in row]
    assert [Path(row["file"]).name for row in errors] == ["b.png", "c.jpg", "e.JPEG"]
    lines = [f"error: {row['file']}: {row['error']}" for row in errors]
    assert printed.err.splitlines() == [f"input={mixed}; left out: 1 .txt", *lines]


def test_a_batch_without_a_good_image_is_no_trouble(photos, mixed):
    files = [mixed / "b.png", mixed / "c.jpg"]
    assert ["error" in row for row in predict(load(last(photos)), files)] == [True, True]


def test_csv_has_a_row_for_each_class_and_each_error(photos, mixed, tmp_path):
    out = tmp_path / "a.csv"
    with pytest.raises(SystemExit):
        main([f"ckpt_path={photos}", f"input={mixed}", "format=csv", "top_k=2", f"out={out}"])
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "", "", "1", "2", ""]
    assert rows[0]["class"] == "yellow"
    assert 0.5 < float(rows[0]["probability"]) <= 1
    assert rows[2]["error"].startswith("cannot identify") or "truncated" in rows[2]["error"]


def test_the_table_names_files_classes_and_errors(photos, mixed, capsys, monkeypatch):
    monkeypatch.chdir(mixed)
    with pytest.raises(SystemExit):
        main([f"ckpt_path={last(photos)}", "input=./[a-c].*"])
    rows = capsys.readouterr().out.splitlines()
    assert any("a.png" in row and "yellow 100.0%" in row for row in rows)
    assert any("c.jpg" in row and "cannot identify image file" in row for row in rows)
    assert not any("d.png" in row for row in rows)


@pytest.mark.parametrize("form", ["csv", "json", "table"])
def test_names_that_are_not_utf_8_come_out_as_they_are(
    photos, tmp_path, monkeypatch, capsysbinary, form
):
    monkeypatch.chdir(tmp_path)
    content = (photos / "photos" / "test" / "yellow" / "0.png").read_bytes()
    try:
        Path(os.fsdecode(b"\xe9.png")).write_bytes(content)
    except OSError:
        pytest.skip("names of files are UTF-8 here")
    arguments = [f"ckpt_path={photos}", "input=.", f"format={form}", "top_k=1"]
    main(arguments)
    printed = capsysbinary.readouterr().out
    main([*arguments, "out=out"])
    assert (tmp_path / "out").read_bytes() == printed
    if form == "json":
        assert os.fsencode(json.loads(printed)[0]["file"]) == b"\xe9.png"
    else:
        assert b"\xe9.png" in printed


@pytest.mark.long
def test_a_process_ends_with_exit_code_1_after_a_damaged_image(photos, mixed):
    command = [
        sys.executable,
        "-m",
        "sam_lightning",
        "predict",
        f"ckpt_path={photos}",
        "format=csv",
    ]
    ended = subprocess.run([*command, f"input={mixed}"], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stdout.startswith("file,rank,class,probability,error\n")
    assert [line[:6] for line in ended.stderr.splitlines()] == ["input=", *["error:"] * 3]


# -------------------------------------------------------------------------------- arguments


def test_files_are_found_by_name_folder_and_pattern(tmp_path, monkeypatch):
    names = ["b.png", "a.jpg", "deep/er/c.webp", "deep/d.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(given):
        return [str(p.relative_to(tmp_path)) for p in find(given)]

    assert found(str(tmp_path)) == ["a.jpg", "b.png", "deep/er/c.webp"]
    assert found(f"{tmp_path}/*.png") == ["b.png"]
    assert found(f"{tmp_path}/**/*.*") == ["a.jpg", "b.png", "deep/d.txt", "deep/er/c.webp"]
    assert found(f"{tmp_path}/deep/d.txt") == ["deep/d.txt"]
    (tmp_path / "[1].png").touch()  # a name, though it reads as a pattern
    assert found(f"{tmp_path}/[1].png") == ["[1].png"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/b.png") == ["b.png"]


def test_wrong_arguments_are_refused_in_one_line(photos, tmp_path):
    image = photos / "photos" / "test" / "red" / "0.png"
    for arguments, says in [
        ([f"ckpt_path={photos}"], "input: must be given, as in input=..."),
        (["ckpt_path=none", f"input={image}"], "ckpt_path=none: no such file or folder"),
        ([f"ckpt_path={photos}", "input=none.png"], "input=none.png: is no file, no pattern"),
        ([f"ckpt_path={photos}", f"input={tmp_path}"], "is no file, no pattern of one, no folder"),
        ([f"ckpt_path={photos}", f"input={image}", "top_k=0"], "top_k=0: allowed is a whole"),
        ([f"ckpt_path={photos}", f"input={image}", "format=xml"], "format=xml: allowed is table"),
        ([f"ckpt_path={photos}", f"input={image}", f"out={tmp_path}"], "is a folder; name a file"),
        ([f"ckpt_path={photos}", f"input={image}", f"out={image}/a.csv"], "cannot be written"),
    ]:
        with pytest.raises(ConfigError, match=says):
            main(arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_replaced_stays(photos, tmp_path, monkeypatch):
    out = tmp_path / "a.json"
    out.write_text("old")

    def full(self, *_, **__):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"out=.*a\.json: cannot be written \(.*No space left"):
        main([f"ckpt_path={photos}", f"input={photos / 'photos' / 'test'}", f"out={out}"])
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]


def test_a_hostile_checkpoint_ends_with_one_line(run, photos, tmp_path):
    made = tmp_path / "made"
    for path in hostile(last(run), tmp_path, made):
        with pytest.raises(ConfigError, match=f"ckpt_path={path}: "):
            main([f"ckpt_path={path}", f"input={photos / 'photos'}"])
        assert not made.exists()
