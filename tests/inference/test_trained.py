"""A checkpoint as a module: the logits, pixels and data of its run, and no code but ours."""

import copy
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import sam_lightning
from runs import configuration
from sam_lightning.config.errors import ConfigError
from sam_lightning.data.views import CenterCrop
from sam_lightning.inference.load import data_of, torch_device
from sam_lightning.runs.checkpoint import read
from sam_lightning.training.build import make_module, prepare_data
from trained_runs import NOISY, changed, digits_run, folder_run, hostile, last, targets


def make_data(cfg):
    data = prepare_data(cfg)
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def digits_ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return last(digits_run(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="module")
def folder_ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return last(folder_run(tmp_path_factory.getbasetemp()))


def test_three_lines_name_the_class_of_a_picture(folder_ckpt):
    model = sam_lightning.load(folder_ckpt)
    yellow = Image.new("RGB", (50, 35), (200, 200, 0))
    assert model.classes[model(model.preprocess(yellow)).argmax()] == "yellow"


def test_logits_are_those_of_the_training_module(digits_ckpt):
    checkpoint = read(digits_ckpt)
    cfg = configuration("data=digits", "model.width=4", "trainer=cpu")
    data = make_data(cfg)
    module = make_module(cfg, data, L.Trainer(accelerator="cpu", max_epochs=1, logger=False))
    module.load_state_dict(checkpoint["state_dict"])
    module.eval()
    model = sam_lightning.load(digits_ckpt)
    images = model.preprocess(data.test.images)
    with torch.no_grad():
        assert torch.equal(model(images), module(images))
    assert model.memory_format == module.memory_format == torch.channels_last


def test_weights_keep_the_memory_layout_they_were_trained_in(digits_ckpt, tmp_path):
    def contiguous(c):
        c["state_dict"] = {k: v.contiguous() for k, v in c["state_dict"].items()}

    model = sam_lightning.load(changed(digits_ckpt, tmp_path / "a.ckpt", contiguous))
    assert model.memory_format == torch.contiguous_format
    assert all(p.is_contiguous() for p in model.parameters())


def test_weights_of_a_run_in_float64_are_rounded_to_float32(digits_ckpt, tmp_path):
    shift = 2**-40  # what float64 has and float32 has not

    def double(c):
        floating = {k: v for k, v in c["state_dict"].items() if v.is_floating_point()}
        c["state_dict"] |= {k: v.double() * (1 + shift) for k, v in floating.items()}

    wide = changed(digits_ckpt, tmp_path / "a.ckpt", double)
    assert {w.dtype for w in read(wide)["state_dict"].values()} == {torch.float64, torch.int64}
    model, expected = sam_lightning.load(wide), sam_lightning.load(digits_ckpt)
    assert model.memory_format == expected.memory_format == torch.channels_last
    images = model.preprocess(torch.randint(256, (3, 1, 32, 32), dtype=torch.uint8))
    assert torch.equal(model(images), expected(images))


def test_it_is_an_ordinary_module_in_eval_mode_on_the_cpu(digits_ckpt):
    before = torch.get_rng_state()
    model = sam_lightning.load(digits_ckpt)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(m.training for m in model.modules())
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    pixels = torch.randint(256, (3, 1, 32, 32), dtype=torch.uint8)
    assert torch.equal(other(other.preprocess(pixels)), model(model.preprocess(pixels)))
    assert model.in_channels == 1
    assert model.classes == list("0123456789")


# ------------------------------------------------------------------------------ preprocessing


def test_pixels_are_normalised_bit_for_bit_as_in_evaluation(digits_ckpt):
    model = sam_lightning.load(digits_ckpt)
    data = make_data(configuration("data=digits", *NOISY))
    pixels = data.test.images[:40]
    expected, _ = data.on_after_batch_transfer((pixels, None), 0)
    pictures = [Image.fromarray(image[0].numpy()) for image in pixels]
    assert torch.equal(model.preprocess(pixels), expected)
    assert torch.equal(model.preprocess(pictures), expected)
    assert torch.equal(model.preprocess(list(pixels)), expected)
    assert torch.equal(model.preprocess(pictures[7]), expected[7:8])
    assert torch.equal(model.preprocess(pixels[7]), expected[7:8])


def test_files_of_another_size_are_read_bit_for_bit_as_in_evaluation(folder_ckpt):
    model = sam_lightning.load(folder_ckpt)
    assert (model.in_channels, model.image_size) == (3, (24, 24))
    data = data_of(read(folder_ckpt)["hyper_parameters"])
    files = sorted((folder_ckpt.parent.parent / "photos" / "test").rglob("*.png"))
    expected = data.normalize(data.test.images)
    assert len(files) == 15
    assert torch.equal(model.preprocess([Image.open(f) for f in files]), expected)
    # bytes of a tensor are resized as those of a picture
    tensors = [torch.tensor(np.asarray(Image.open(f))).permute(2, 0, 1) for f in files]
    assert torch.equal(model.preprocess(torch.stack(tensors)), expected)


def test_channels_become_those_that_were_trained_on(digits_ckpt, folder_ckpt):
    grey, colour = sam_lightning.load(digits_ckpt), sam_lightning.load(folder_ckpt)
    rgb = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]  # ITU-R 601-2
    expected = ((rgb * luma).sum(0) / 255 - grey.mean[0]) / grey.std[0]
    half_a_step = 0.51 / 255 / grey.std[0]
    picture = Image.fromarray(rgb.permute(1, 2, 0).numpy())
    for image in (rgb, picture, picture.convert("RGBA")):
        assert grey.preprocess(image).shape == (1, 1, 32, 32)
        assert (grey.preprocess(image)[0, 0] - expected).abs().max() <= 2 * half_a_step
    one = torch.randint(256, (1, 24, 24), dtype=torch.uint8)
    out = colour.preprocess(one)
    mean, std = (torch.tensor(v)[:, None, None] for v in (colour.mean, colour.std))
    torch.testing.assert_close(out[0], (one / 255 - mean) / std)


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (24, 24), (7, 100), (25, 24), (333, 500)])
@pytest.mark.parametrize("side", [24, 31])
def test_a_square_is_covered_as_torchvision_does(size, side):
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side)])(image)
    assert np.array_equal(CenterCrop((side, side))(image), expected)


@pytest.mark.parametrize(
    ("size", "window"),
    [
        ((20, 30), (slice(None), slice(None))),
        ((20, 40), (slice(None), slice(5, 35))),
        ((44, 30), (slice(12, 32), slice(None))),
    ],
)
def test_a_rectangle_is_cut_out_of_the_centre(size, window):
    noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    assert np.array_equal(CenterCrop((20, 30))(Image.fromarray(noise)), noise[window])
    doubled = noise.repeat(2, 0).repeat(2, 1)
    expected = Image.fromarray(doubled).resize(size[::-1], Image.Resampling.BILINEAR)
    found = CenterCrop((20, 30))(Image.fromarray(doubled))
    assert np.array_equal(found, np.asarray(expected)[window])


def test_a_recorded_size_of_images_is_used(digits_ckpt, tmp_path):
    def record(c):
        c["hyper_parameters"]["image_size"] = [20, 30]

    model = sam_lightning.load(changed(digits_ckpt, tmp_path / "a.ckpt", record))
    assert model.image_size == (20, 30)
    assert model.preprocess(Image.new("L", (64, 64))).shape == (1, 1, 20, 30)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.rand(2, 1, 32, 32), "uint8.*not torch.float32"),
        (torch.zeros(32, 32, dtype=torch.uint8), "uint8, C x H x W.*shape \\(32,\\)"),
        ([], "must be some"),
        (np.zeros((1, 32, 32), np.uint8), "PIL images or uint8 tensors, not .*ndarray"),
        ("photo.jpg", "PIL images or uint8 tensors, not .*str"),
    ],
)
def test_what_is_no_image_is_refused(digits_ckpt, images, says):
    with pytest.raises(ValueError, match=says):
        sam_lightning.load(digits_ckpt).preprocess(images)


def test_sizes_may_not_differ_where_none_is_recorded(digits_ckpt, tmp_path):
    path = changed(
        digits_ckpt, tmp_path / "a.ckpt", lambda c: c["hyper_parameters"].pop("image_size", None)
    )
    model = sam_lightning.load(path)
    assert model.image_size is None
    assert model.preprocess(Image.new("L", (9, 5))).shape == (1, 1, 5, 9)
    with pytest.raises(ValueError, match=r"one size, not \[\(5, 9\), \(6, 9\)\]"):
        model.preprocess([Image.new("L", (9, 5)), Image.new("L", (9, 6))])


# --------------------------------------------------------------------------------- bad files


def test_files_that_are_no_checkpoints_are_named(tmp_path, digits_ckpt):
    with pytest.raises(ConfigError, match=r"ckpt_path=.*none\.ckpt: no such file"):
        sam_lightning.load(tmp_path / "none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match=r"ckpt_path=.*other\.ckpt: not a readable checkpoint"):
        sam_lightning.load(tmp_path / "other.ckpt")
    content = bytearray(digits_ckpt.read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "damaged.ckpt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"ckpt_path=.*damaged\.ckpt: "):
        sam_lightning.load(tmp_path / "damaged.ckpt")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: h.pop("classes"), "KeyError: 'classes'"),
        (lambda h: h.pop("mean"), "KeyError: 'mean'"),
        (lambda h: h["mean"].append(0.5), "2 means do not fit a model of 10 classes and 1 channel"),
        (lambda h: h["classes"].pop(), "9 classes and 1 means do not fit"),
        (lambda h: h.update(std=[0.0]), r"data.std=\[0.0\]"),
        (lambda h: h.update(model=3), "hyper_parameters: TypeError"),
        (lambda h: h["model"].pop("_target_"), "model._target_: must be given"),
        (lambda h: h["model"].update(width=8), "weights are not of .*'width': 8"),
        (lambda h: h["model"].update(stem="${oc.env:HOME}"), r"without \$\{...\}"),
    ],
)
def test_a_checkpoint_that_is_incomplete_is_refused_in_one_line(
    digits_ckpt, tmp_path, change, says
):
    path = changed(digits_ckpt, tmp_path / "a.ckpt", lambda c: change(c["hyper_parameters"]))
    with pytest.raises(ConfigError, match=rf"^ckpt_path=.*a\.ckpt: .*{says}") as caught:
        sam_lightning.load(path)
    assert "\n" not in str(caught.value)


def test_a_hostile_checkpoint_runs_nothing(digits_ckpt, tmp_path):
    made = tmp_path / "made"
    paths = hostile(digits_ckpt, tmp_path, made)
    torch.load(paths[0], weights_only=False)  # what a careless reader would do
    assert made.exists()
    made.unlink()
    for path in paths:
        with pytest.raises(ConfigError, match="ckpt_path="):
            sam_lightning.load(path)
        assert not made.exists()


def test_hostile_data_run_nothing(digits_ckpt, tmp_path):
    made = tmp_path / "made"
    for target in targets(made):
        checkpoint = read(digits_ckpt)
        checkpoint["hyper_parameters"]["data"]["source"] = target
        with pytest.raises(ConfigError, match="_target_"):
            data_of(checkpoint["hyper_parameters"])
        assert not made.exists()


# --------------------------------------------------------------------------------------- data


def test_the_data_are_those_of_the_run(digits_ckpt):
    overrides = ["data=digits", "batch_size=50", *NOISY]
    expected = make_data(configuration(*overrides))
    data = data_of(read(digits_ckpt)["hyper_parameters"])
    assert data.val is not None
    assert expected.val is not None
    for split in ("train", "val", "test"):
        for part in ("images", "labels"):
            mine, other = (getattr(getattr(d, split), part) for d in (data, expected))
            assert torch.equal(mine, other)
    clean = make_data(configuration(*overrides, "data.label_noise=0"))
    assert (data.train.labels != clean.train.labels).float().mean() == pytest.approx(0.2, abs=1e-3)
    assert (data.mean, data.std, data.classes) == (expected.mean, expected.std, expected.classes)
    assert (data.batch_size, data.seed) == (50, 0)


def test_overrides_change_the_data_but_not_their_normalisation(digits_ckpt):
    checkpoint = read(digits_ckpt)
    data = data_of(checkpoint["hyper_parameters"], val_size=100, label_noise=0.0)
    assert data.val is not None
    assert len(data.val) == 100
    assert list(data.mean or []) == checkpoint["hyper_parameters"]["mean"]
    checkpoint["hyper_parameters"]["data"].update(device="cuda", num_workers=3)  # of the run
    assert (
        data_of(checkpoint["hyper_parameters"]).device,
        data_of(checkpoint["hyper_parameters"]).num_workers,
    ) == (None, 0)
    for key in ("root", "vl_size"):
        with pytest.raises(ConfigError, match=f"data.{key}=3: "):
            data_of(checkpoint["hyper_parameters"], **{key: 3})


def test_images_that_have_moved_are_found_and_others_refused(folder_ckpt, tmp_path):
    checkpoint = read(folder_ckpt)
    photos = folder_ckpt.parent.parent / "photos"
    (tmp_path / "moved").symlink_to(photos)
    checkpoint["hyper_parameters"]["data"]["source"]["root"] = str(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"data\.root=.*gone"):
        data_of(checkpoint["hyper_parameters"])
    moved = data_of(checkpoint["hyper_parameters"], root=str(tmp_path / "moved"))
    assert torch.equal(
        moved.test.images, data_of(read(folder_ckpt)["hyper_parameters"]).test.images
    )
    for split in ("train", "test"):
        for name in ("blue", "green", "red"):
            source = photos / split / name.replace("green", "yellow")
            (tmp_path / "other" / split / name).mkdir(parents=True)
            (tmp_path / "other" / split / name / "0.png").symlink_to(source / "0.png")
    with pytest.raises(ConfigError, match="has the classes blue, green, red; those of the"):
        data_of(checkpoint["hyper_parameters"], root=str(tmp_path / "other"))


# --------------------------------------------------------------------------------------- other


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device=cuda: there is no CUDA device"):
        torch_device("cuda")
    with pytest.raises(ConfigError, match="device=cuda: there is no CUDA device"):
        sam_lightning.load("not read.ckpt", device="cuda")


def test_importing_the_package_loads_no_torch():
    code = "import sam_lightning, sys; assert 'load' in sam_lightning.__all__; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.long
def test_commands_on_checkpoints_do_not_load_lightning(folder_ckpt, tmp_path):
    code = """
import sys
import sam_lightning
from sam_lightning.inference import evaluate, export, predict
ckpt, photos, out = sys.argv[1:]
sam_lightning.load(ckpt)
evaluate.main([f"ckpt_path={ckpt}", f"out={out}"])
predict.main([f"ckpt_path={ckpt}", f"input={photos}", f"out={out}/predictions.txt"])
export.main([f"ckpt_path={ckpt}", "format=pt2", f"out={out}/model.pt2"])
assert "lightning" not in sys.modules
"""
    photos = folder_ckpt.parents[1] / "photos" / "test"
    command = [sys.executable, "-c", code, str(folder_ckpt), str(photos), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    written = {"confusion_matrix.csv", "evaluation.json", "predictions.csv"}
    written |= {"model.pt2", "predictions.txt"}
    assert {path.name for path in tmp_path.iterdir()} == written
