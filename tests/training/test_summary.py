"""What a run says at its start, and the presets, loggers and stops that can be chosen."""

import re
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from runs import SMALL, command, configuration, run, summary
from sam_lightning.config.errors import ConfigError
from sam_lightning.data import Split
from sam_lightning.training.callbacks.summary import images

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.mark.slow
def test_the_summary_says_what_is_trained(capsys, tmp_path):
    run(tmp_path / "run", "data.val_size=50", "trainer.accumulate_grad_batches=2", "test=false")
    printed = capsys.readouterr().out.splitlines()[:7]
    lines = dict(re.split(" +", line, maxsplit=1) for line in printed)
    model = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    names = [k for k in model["state_dict"] if "running" not in k and "tracked" not in k]
    count = sum(model["state_dict"][k].numel() for k in names)
    assert lines["folder"].endswith("/run")
    assert lines["train"] == "100 images, 10 in each of 10 classes"
    assert lines["val"] == "50 images, 5 in each of 10 classes"
    assert lines["test"] == "359 images, 35 to 37 in each of 10 classes"
    assert lines["model"] == f"SAMResNet18, {count:,} parameters"
    assert lines["device"] == "1 x cpu, 32-true"
    assert lines["steps"] == "2 in all, 1 in an epoch of 2 batches of 50 images"


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (["cat", "d\x1bog\udcff"], "8 images, 3 cat, 5 d og "),
        (list("abcdef"), "8 images, 0 to 5 in each of 6 classes"),
    ],
)
def test_images_in_each_class(classes, text):
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1])
    assert images(Split(torch.zeros(8, 1, 1, 1), labels), classes) == text


class Recorder(DummyLogger):
    """A logger that is no file in the run's folder."""

    settings: ClassVar[list] = []

    def log_hyperparams(self, params, *others):
        self.settings.append(params)


def test_other_loggers_get_the_settings(tmp_path):
    run(tmp_path, f"+logger.mine._target_={__name__}.Recorder", "epochs=1", "rho=0.3")
    (settings,) = Recorder.settings
    assert settings["method"]["rho"] == 0.3
    assert settings["seed"] == 0


# ------------------------------------------------------------ choices that the configuration has


def test_early_stopping_needs_validation_data(tmp_path):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, "callbacks=early_stopping")
    assert str(caught.value) == (
        "callbacks.early_stopping.monitor=val/loss: there is no validation data; set data.val_size"
    )


def test_early_stopping_stops(tmp_path):
    chosen = ["callbacks=early_stopping", "data.val_size=50", "epochs=9", "test=false"]
    chosen += ["callbacks.early_stopping.min_delta=100", "callbacks.early_stopping.patience=1"]
    run(tmp_path, *chosen)
    assert summary(tmp_path)["epochs"] == 2


@pytest.mark.parametrize(("name", "package"), [("mlflow", "mlflow"), ("comet", "comet-ml")])
def test_a_logger_whose_package_is_missing_is_refused(tmp_path, name, package):
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, f"logger={name}")
    assert str(caught.value).startswith(f"logger.{name}: ")
    assert "pip install" in str(caught.value)
    assert package in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_fast_runs_three_batches_of_everything(tmp_path):
    small = ["debug=fast", "batch_size=10", "data.eval_batch_size=10", "data.val_size=100"]
    cfg = configuration("data=digits", "model.width=4", "trainer=cpu", *small)
    assert (cfg.epochs, cfg.task_name) == (2, "debug")
    metrics = run(tmp_path, *small)
    assert summary(tmp_path)["updates"] == 6
    for name in ("val/acc", "test/acc"):
        assert metrics[name] * 30 == pytest.approx(round(metrics[name] * 30), abs=1e-4)


@pytest.mark.slow
def test_overfit_ends_once_all_images_are_learned(tmp_path, capsys):
    from sam_lightning.training.run import train

    cfg = configuration("experiment=quickstart", "debug=overfit", "data.val_size=100")
    cfg.output_dir = str(tmp_path)
    metrics = train(cfg)
    assert metrics["train/acc"] == 1
    assert summary(tmp_path)["epochs"] < 200
    said = capsys.readouterr().out
    assert "train   32 images" in said
    assert re.search("stopped after epoch .*train/acc", said)


@pytest.mark.long
@pytest.mark.slow
def test_profile_prints_one_table(tmp_path):
    done = command(tmp_path, *SMALL, "debug=profile", "data.subset=50", "hydra.run.dir=run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Profiler Report") == 1
    assert re.search(r"\|  run_training_batch +\s\|  [\d.e-]+ +\s\|  2 ", done.stdout)
