"""Exported files, run without this project's code, against the checkpoint they are of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from sam_lightning.config.errors import ConfigError, TrainingError
from sam_lightning.inference import export as exporting
from sam_lightning.inference.export import main
from sam_lightning.inference.load import data_of, load
from sam_lightning.runs.checkpoint import read
from trained_runs import changed, digits_run, folder_run, hostile, last


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_run(tmp_path_factory.getbasetemp())


def compare(folder: Path, logits_of, normalized: bool, batches=(1, 4, 10)) -> None:
    """Logits of the run's test images, in batches of several sizes."""
    model, data = load(last(folder)), data_of(read(last(folder))["hyper_parameters"])
    for n in batches:
        pixels = data.test.images[:n]
        with torch.no_grad():
            expected = model(model.preprocess(pixels))
        images = model.preprocess(pixels) if normalized else pixels / 255
        torch.testing.assert_close(logits_of(images), expected, rtol=1e-4, atol=1e-4)


def run_pt2(path: Path, **extra: str):
    module = torch.export.load(path, extra_files=extra).module()
    return module, extra


def test_pt2_takes_pixels_and_batches_of_any_size(photos, tmp_path, capsys):
    out = tmp_path / "new" / "a.pt2"
    main([f"ckpt_path={photos}", "format=pt2", f"out={out}"])
    assert [p.name for p in out.parent.iterdir()] == ["a.pt2"]
    size, difference = capsys.readouterr().out.splitlines()
    assert size == f"{out}: {out.stat().st_size:,} bytes"
    assert (
        float(difference.removeprefix("largest difference from the checkpoint's logits: ")) < 1e-3
    )
    module, extra = run_pt2(out, classes="", images="", mean="", std="")
    compare(photos, module, normalized=False)
    assert json.loads(extra["classes"]) == ["blue", "red", "yellow"]
    assert extra["images"] == "pixels in 0..1"
    model = load(last(photos))
    assert json.loads(extra["mean"]) == list(model.mean)
    assert json.loads(extra["std"]) == list(model.std)


def test_pt2_of_one_batch_size_beside_the_checkpoint(run, tmp_path):
    path = tmp_path / "alone.ckpt"
    path.write_bytes(last(run).read_bytes())
    main([f"ckpt_path={path}", "format=pt2", "batch=4", "normalize=false", "image_size=32"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone.ckpt", "alone.pt2"]
    module, extra = run_pt2(tmp_path / "alone.pt2", images="")
    compare(run, module, normalized=True, batches=(4,))
    assert extra["images"] == "(pixels in 0..1 - mean) / std"
    with pytest.raises(Exception, match="4"):
        module(torch.zeros(5, 1, 32, 32))


@pytest.mark.parametrize("normalize", [True, False])
def test_images_of_another_size_than_those_of_the_run(run, tmp_path, normalize):
    out = tmp_path / "a.pt2"
    keys = ["format=pt2", "batch=2", "image_size=48", f"normalize={normalize}".lower()]
    main([f"ckpt_path={run}", *keys, f"out={out}"])
    module, _ = run_pt2(out)
    model, pixels = load(last(run)), torch.rand(2, 1, 48, 48)
    normalised = (pixels - model.mean[0]) / model.std[0]
    found = module(pixels if normalize else normalised)
    torch.testing.assert_close(found, model(normalised), rtol=1e-4, atol=1e-4)


def test_an_old_torch_is_said_before_anything_is_written(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0"))
    with pytest.raises(ConfigError, match=r"format=onnx: needs torch 2\.7, here is 2\.6\.0"):
        main([f"ckpt_path={photos}", "format=onnx", f"out={tmp_path / 'a.onnx'}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.__version__ < "2.7", reason="ONNX needs torch 2.7")
def test_onnx_runs_in_onnxruntime_and_names_the_classes(photos, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "a.onnx"
    main([f"ckpt_path={photos}", "format=onnx", f"out={out}"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])

    def logits_of(images):
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    compare(photos, logits_of, normalized=False)
    assert session.get_inputs()[0].shape == ["batch", 3, 24, 24]
    assert session.get_outputs()[0].shape == ["batch", 3]
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == ["blue", "red", "yellow"]
    assert metadata["images"] == "pixels in 0..1"
    view = {"size": [24, 24], "fraction": 1.0, "interpolation": "bilinear", "mode": "center"}
    assert json.loads(metadata["view"]) == view


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_file_with_other_logits_is_not_written(photos, tmp_path, monkeypatch, factor):
    out = tmp_path / "a.pt2"
    out.write_text("old")

    def saved(model, path, *_):
        torch.save(model, path)
        return lambda images: torch.load(path, weights_only=False)(images) * factor

    monkeypatch.setattr(exporting, "_pt2", saved)
    with pytest.raises(TrainingError, match="logits of the exported file differ by up to"):
        main([f"ckpt_path={photos}", "format=pt2", f"out={out}"])
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.pt2", "old")]


def test_packages_that_are_missing_are_named_with_the_command(photos, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if "onnxr" in name else name)
    with pytest.raises(ConfigError) as caught:
        main([f"ckpt_path={photos}", "format=onnx"])
    assert str(caught.value) == "format=onnx: needs onnxruntime; run pip install onnxruntime"


def test_wrong_arguments_are_refused_in_one_line(run, tmp_path):
    unsized = changed(
        last(run), tmp_path / "a.ckpt", lambda c: c["hyper_parameters"].pop("image_size", None)
    )
    for arguments, says in [
        ([f"ckpt_path={run}"], "format: must be given, as in format=..."),
        ([f"ckpt_path={run}", "format=tflite"], "format=tflite: allowed is onnx, pt2"),
        ([f"ckpt_path={run}", "format=pt2", "batch=0"], "batch=0: allowed is dynamic, or a whole"),
        ([f"ckpt_path={run}", "format=pt2", "out=a.onnx"], r"out=a.onnx: must be .* ends in \.pt2"),
        (
            [f"ckpt_path={run}", "format=pt2", "out=2025"],
            "out=2025: must be a file that ends",
        ),
        (["ckpt_path=none", "format=pt2"], "ckpt_path=none: no such file or folder"),
        ([f"ckpt_path={unsized}", "format=pt2"], "image_size=null: .*give image_size=32"),
    ]:
        with pytest.raises(ConfigError, match=says):
            main(arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_hostile_checkpoint_ends_with_one_line(run, tmp_path):
    made = tmp_path / "made"
    for path in hostile(last(run), tmp_path, made):
        with pytest.raises(ConfigError, match=f"ckpt_path={path}: "):
            main([f"ckpt_path={path}", "format=pt2"])
        assert not made.exists()


def test_a_process_ends_with_exit_code_2_and_one_line():
    ended = subprocess.run(
        [sys.executable, "-m", "sam_lightning", "export", "ckpt_path=none", "format=pt2"],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert (ended.stdout, ended.stderr) == ("", "error: ckpt_path=none: no such file or folder\n")
