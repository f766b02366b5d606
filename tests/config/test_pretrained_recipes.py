"""Recipes with timm's models: their settings, figures and costs, and a short run of each."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from image_files import write_cifar
from runs import column, configuration, summary
from sam_lightning.config.conf import CONF, top_level
from sam_lightning.config.schema import check
from sam_lightning.studies import cost
from sam_lightning.training.run import train

PAGE = (CONF.parent / "docs" / "results.md").read_text()
SECTION = PAGE[PAGE.index("## EfficientNet from") : PAGE.index("## How to start a row")]
EFFICIENTNET, VIT = SECTION.split("## ViT-S/16 on ImageNet")
ROWS = re.findall(r"`(experiment=.*?)` \| ([\d.]+) \|$", SECTION, re.M)
FIGURE = r"\d+\.\d+(?: ± \d\.\d+)?"
FINETUNE, VIT_S16 = (
    (CONF / "experiment" / f"{name}.yaml").read_text()
    for name in ("finetune_efficientnet", "vit_s16")
)


def commands(file):
    """The arguments of each command in the head of an experiment, without those of its sweep."""
    head = re.sub(r"\\\n# +", "", file)
    lines = re.findall(r"^#   python train.py (?:-m sweep=seeds )?(.*)", head, re.M)
    return [shlex.split(line) for line in lines]


def composed(arguments):
    cfg = configuration(*arguments, "output_dir=run", "data.root=.")
    check(cfg, top_level())
    return cfg


def per_step(cfg):
    return cfg.batch_size * cfg.trainer.accumulate_grad_batches


# ------------------------------------------------------------------------------------ EfficientNet


@pytest.mark.parametrize(("method", "rho", "passes"), [("sam", 0.05, 2), ("sgd", 0, 1)])
def test_efficientnet_is_trained_as_in_appendix_c2(method, rho, passes):
    cfg = composed(["experiment=finetune_efficientnet", f"method={method}"])
    optimizer, data, model = cfg.optimizer, cfg.data, cfg.model
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.016, 0.9, 1e-5)
    assert (per_step(cfg), round(50_000 / 1024 * cfg.epochs, -2)) == (1024, 5000)
    assert cfg.batch_size == 1024 // 64  # images of a core, which are perturbed together
    assert (cfg.method.rho, cost.passes_per_step(cfg.method)) == (rho, passes)
    assert (cfg.scheduler.warmup_epochs, cfg.scheduler.final, cfg.label_smoothing) == (0, 0, 0)
    assert cfg.finetune.freeze_batchnorm
    assert (model.pretrained, model.drop_rate, model.drop_path_rate) == (True, 0.5, 0.2)
    augment = cfg.augment
    assert (augment.crop.padding, augment.flip.p, augment.policy) == (0, 0.5, None)
    assert (data.view, [*data.crop_scale]) == ("random_resized_crop", [0.08, 1])
    # The weights say: 600 pixels, the central 0.949 of them, mean and deviation.
    assert {data[key] for key in ("image_size", "crop_fraction", "mean", "std")} == {None}


def test_the_commands_of_efficientnet():
    photos, cifar, sgd, l2 = commands(FINETUNE)
    cfg = composed(l2)
    assert (per_step(cfg), cfg.batch_size, cfg.lr) == (512, 512 // 128, 0.008)
    cfg = composed(cifar)
    assert (cfg.augment.policy.policy, cfg.augment.crop.padding) == ("cifar10", 4 * 600 // 32)
    assert (cfg.data.view, cfg.data.crop_fraction, cfg.epochs) == ("resize", 1, 102)
    assert composed(sgd).method.name == "sgd"
    assert {" ".join(one) for one in (photos, cifar, sgd, l2)} <= {row[0] for row in ROWS}


def test_cifar_becomes_files(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", EFFICIENTNET, re.M | re.S)
    _, written = write_cifar(tmp_path / "data", monkeypatch, datasets.CIFAR10, "labels")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert len([*Path("cifar10_png").rglob("*.png")]) == 24
    for split, files in {"train": "train_list", "test": "test_list"}.items():
        pixels = np.concatenate([data for data, _ in written[files]]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([labels for _, labels in written[files]])
        for i, label in enumerate(labels):
            image = np.asarray(Image.open(f"cifar10_png/{split}/class{label}/{i:05}.png"))
            assert np.array_equal(image.transpose(2, 0, 1), pixels[i])


# ---------------------------------------------------------------------------------------- ViT-S/16


def test_vit_is_trained_as_in_the_tables_of_its_sources():
    chen, adamw, trinh = map(composed, commands(VIT_S16))
    for cfg, together, *settings in [
        (chen, 64, 4096, 300, 3e-3, 0.3, 0.1, 0.01),
        (adamw, 64, 4096, 300, 3e-3, 0.3, 0.0, 0.01),
        (trinh, 128, 1024, 100, 1e-3, 0.1, 0.6, 0),
    ]:
        optimizer, data, augment = cfg.optimizer, cfg.data, cfg.augment
        found = [per_step(cfg), cfg.epochs, optimizer.lr, optimizer.weight_decay, cfg.method.rho]
        assert [*found, cfg.scheduler.final] == settings
        assert cfg.batch_size // cfg.trainer.devices == together
        steps = 1_281_167 / per_step(cfg) * cfg.scheduler.warmup_epochs
        assert steps == pytest.approx(10_000, 2e-3)
        assert optimizer._target_ == "torch.optim.AdamW"
        assert (cfg.trainer.gradient_clip_val, cfg.model.pretrained) == (1, False)
        assert not cfg.finetune.decay_norm_and_bias
        assert (augment.crop.padding, augment.policy, augment.mixup.alpha) == (0, None, 0)
        assert (data.image_size, [*data.crop_scale], [*data.mean]) == (224, [0.05, 1], [0.5] * 3)
    assert (chen.method.name, adamw.method.name) == ("sam", "sgd")


# -------------------------------------------------------------------------------------------- both


def test_files_and_page_agree_on_what_is_published():
    rows = re.findall(rf"^\| ([\w -]+?) \| ((?:{FIGURE} \| ){{4}}{FIGURE}) \|$", EFFICIENTNET, re.M)
    lines = re.findall(rf"^#   ([\w-]+(?: \w+)?) +({FIGURE} .*)", FINETUNE, re.M)
    on_page, in_file = (
        {name: re.findall(FIGURE, figures) for name, figures in of} for of in (rows, lines)
    )
    assert in_file == on_page
    assert len(on_page) == 8
    row = rf"^\| (\w+) et al\. \| (\d+) \| [\d.]+ \| ({FIGURE}) \| ({FIGURE}) \|"
    line = rf"^#   (\w+) et al\., (\d+) epochs +({FIGURE}) +({FIGURE})$"
    assert len(found := re.findall(row, VIT, re.M)) == 2
    assert found == re.findall(line, VIT_S16, re.M)


def photographs(root, n):
    rng = np.random.default_rng(0)
    for folder in [root / split / name for split in ("train", "val") for name in ("cat", "dog")]:
        folder.mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (50, 60 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.mark.long
def test_hours_are_those_of_the_cost(tmp_path):
    photographs(tmp_path, 1)
    forward = {}
    assert len(ROWS) == 7
    for arguments, hours in ROWS:
        kept = [a for a in arguments.split() if a != "epochs=500"]
        cfg = cost.configuration([*kept, f"data.root={tmp_path}", "data.drop_last=false"])
        if cfg.model.name not in forward:
            forward[cfg.model.name] = cost.estimate(cfg).forward
        images = 1_281_167 if "vit_s16" in arguments else 50_000
        passes = 3 * cost.passes_per_step(cfg.method)
        flops = forward[cfg.model.name] * passes * images * cfg.epochs
        assert f"{flops / 2e13 / 3600:.1f}" == hours, arguments


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "model", "side"),
    [("finetune_efficientnet", "test_efficientnet", 64), ("vit_s16", "test_vit", 160)],
)
def test_two_steps_of_a_small_model(recipe, model, side, tmp_path):
    """Each of three micro-batches, which have perturbations of their own."""
    photographs(tmp_path / "photos", 6)
    cfg = configuration(
        *(f"experiment={recipe}", f"model.name={model}", "model.pretrained=false", "trainer=cpu"),
        *(f"data.root={tmp_path / 'photos'}", f"data.image_size={side}", "data.num_workers=0"),
        *("epochs=1", "batch_size=2", "trainer.accumulate_grad_batches=3", "rho=0.01"),
        *("scheduler.warmup_epochs=0", f"output_dir={tmp_path / 'run'}"),
    )
    train(cfg)
    found = summary(tmp_path / "run")
    assert (found["status"], found["updates"]) == ("completed", 2)
    assert column(tmp_path / "run", "train/skipped_steps") == [0]
    assert np.isfinite(column(tmp_path / "run", "train/sharpness")).all()
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    running = [v for name, v in state["state_dict"].items() if name.endswith("running_var")]
    assert bool(running) == (recipe == "finetune_efficientnet")
    assert all(torch.equal(v, torch.ones_like(v)) for v in running)  # as they were made
