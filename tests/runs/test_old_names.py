"""Checkpoints and run folders of earlier versions, whose classes had other names."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import sam_lightning
from runs import command, configuration, equal, rows, run, weights
from sam_lightning.config.conf import top_level
from sam_lightning.runs.old_names import OLD_NAMES, with_current_names
from sam_lightning.runs.parts import changes
from sam_lightning.runs.resume import replayable
from sam_lightning.studies.report.runs import read_runs

# A run of one epoch: digits, friendly_sam, ResNet-18 of width 1.
BEFORE = Path(__file__).parent / "before_rooms"
NAMES = {
    "callbacks": ["MetricsCSV", "progress"],
    "dashboard": ["Dashboard"],
    "data.sources": ["cifar10", "cifar100", "digits", "fashion_mnist", "image_folder", "svhn"],
    "methods.esam": ["RandomSubsetAscent"],
    "methods.friendly": ["FriendlyAscent"],
    "methods.gsam": ["SurrogateGap"],
    "methods.linf": ["SignAscent"],
    "methods.looksam": ["Reuse"],
    "methods.msam": ["MomentumAscent"],
    "models": ["PyramidNet", "SAMResNet18", "SAMResNet34", "SAMResNet50", "WideResNet"],
    "optim": ["Reuse"],
    "perturbations": ["AdaptiveAscent", "GradientAscent"],
    "saving": ["LastCheckpoint"],
    "schedules": ["constant", "cosine", "multistep"],
    "sharpness_monitor": ["SharpnessMonitor"],
}
TARGETS = [f"sam_lightning.{module}.{name}" for module, names in NAMES.items() for name in names]


@pytest.fixture
def before(tmp_path):
    return shutil.copytree(BEFORE, tmp_path / "before")


@pytest.mark.parametrize("target", TARGETS)
def test_every_name_that_a_configuration_had_leads_to_an_object(target):
    module, _, name = with_current_names(target).rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


def test_no_entry_of_the_table_is_left_over():
    assert {f"sam_lightning.{module}" for module in NAMES} >= {*OLD_NAMES}


def test_only_names_are_replaced():
    kept = ["sam_lightning.callbacks", "my.sam_lightning.saving.X", "a text", 3, None]
    assert with_current_names({"x": kept}) == {"x": kept}


def test_a_checkpoint_is_loaded(before):
    model = sam_lightning.load(before / "checkpoints" / "last.ckpt")
    stored = torch.load(before / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, stored[f"model.{name}"])
    assert model.config["data"]["source"]["_target_"] == "sam_lightning.data.digits"


@pytest.mark.long
def test_a_run_is_continued(before):
    shutil.copy(before / "checkpoints" / "last.ckpt", before / "first.ckpt")
    done = command(before, "ckpt_path=last", "hydra.run.dir=.", "epochs=2")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((before / "metrics.json").read_text())
    assert metrics["epochs"] == 2
    assert metrics["config"]["method"]["name"] == "friendly_sam"
    assert rows(before)


@pytest.mark.parametrize("value", ["true", "True", "false"])
def test_debug_was_the_name_of_traceback(before, value):
    (before / ".hydra" / "overrides.yaml").write_text(f"[debug={value}, lr=0.2]")
    kept = replayable(before / ".hydra" / "overrides.yaml", top_level())
    assert kept == [f"traceback={value}", "lr=0.2"]
    (before / ".hydra" / "overrides.yaml").write_text("[debug=fast]")
    assert replayable(before / ".hydra" / "overrides.yaml", top_level()) == ["debug=fast"]


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("data.crop_padding=0", "augment.crop.padding=0"),
        ("++data.cutout=16", "++augment.cutout.side=16"),
        ("data.flip=false", "data.flip=0"),
        ("data.flip=True", "data.flip=0.5"),
        ("data.policy=null", "augment.policy=null"),
        ("data.policy=randaugment", "augment=randaugment"),
        ("mydata.policy=randaugment", "mydata.policy=randaugment"),
    ],
)
def test_augmentation_was_a_part_of_data(before, now):
    assert with_current_names([before]) == [now]


def test_a_stored_augmentation_is_as_one_of_today(tmp_path):
    data = {"flip": True, "crop_padding": 4, "cutout": 16, "policy": "autoaugment", "subset": 1.0}
    stored = with_current_names({"data": data, "seed": 0})
    cfg = configuration("augment=autoaugment", "augment.cutout.side=16")
    today = OmegaConf.to_container(cfg.augment, resolve=True)
    assert stored["augment"] == {name: today[name] for name in stored["augment"]}
    assert stored["data"] == {"flip": 0.5, "subset": 1.0}
    assert with_current_names(stored) == stored


@pytest.mark.slow
def test_a_checkpoint_from_before_augment_was_a_group_continues_within_an_epoch(tmp_path):
    run(tmp_path / "first", "epochs=1", "test=false", "checkpoint_every_n_steps=1")
    path = tmp_path / "first" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    settings = checkpoint["settings"]
    kept = {k: v for k, v in settings.items() if not k.startswith(("augment", "loss"))}
    del kept["data.sampler"], kept["data.repeats"]
    old = {"data.flip": False, "data.crop_padding": 4, "data.cutout": 0, "data.policy": None}
    checkpoint["settings"] = {**kept, **old}
    loop = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    loop["ready"] = loop["processed"] + 1  # within an epoch
    torch.save(checkpoint, tmp_path / "old.ckpt")
    changed, _ = changes(str(tmp_path / "old.ckpt"), {**settings, "lr": 0.2, "epochs": 2})
    assert changed.keys() == {"lr", "epochs"}


def test_a_report_names_its_classes_as_they_are_now(before):
    (run,), _, _ = read_runs([before])
    targets = {key: value for key, value in run.settings.items() if key.endswith("_target_")}
    assert targets
    for target in targets.values():
        assert with_current_names(target) == target


@pytest.mark.slow
def test_per_rank_state_is_read_under_its_former_key_too(tmp_path):
    run(tmp_path / "first", "epochs=1", "test=false")
    checkpoint = torch.load(tmp_path / "first" / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["per_rank_state"]["running_stats"] += 1  # shows whether it was taken up
    ends = []
    for name in ("per_rank_state", "by_rank", "unread"):
        stored = {**checkpoint, name: checkpoint["per_rank_state"]}
        if name != "per_rank_state":
            del stored["per_rank_state"]
        torch.save(stored, tmp_path / f"{name}.ckpt")
        run(tmp_path / name, f"ckpt_path={tmp_path / name}.ckpt", "epochs=2", "test=false")
        ends.append(weights(tmp_path / name))
    assert equal(ends[0], ends[1])
    assert not equal(ends[0], ends[2])
