"""Runs that start from weights: what they load, record and need again."""

import hashlib
import itertools
import json
import shutil
import zipfile

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import sam_lightning
from commands import serve
from runs import command, configuration, summary, weights
from sam_lightning.config.errors import ConfigError
from sam_lightning.data import digits
from sam_lightning.inference import evaluate, export, predict
from sam_lightning.models.pretrained import published
from sam_lightning.runs.checkpoint import read
from sam_lightning.training.run import train
from sam_lightning.training.weights import prepare_as_weights, weights_preprocessing
from trained_runs import changed

SMALL = ["data=digits", "data.subset=100", "trainer=cpu", "epochs=1", "batch_size=50"]
STILL = ["lr=1e-30", "weight_decay=0"]  # training changes no weight
RESNET = ["model=timm", "model.name=test_resnet"]
CLOSED = "http://127.0.0.1:9"  # nobody listens


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    return path


def run(folder, *overrides):
    cfg = configuration(*SMALL, *overrides)
    cfg.output_dir = str(folder)
    return train(cfg)


@pytest.fixture(scope="module")
def started(file, tmp_path_factory):
    """A run from the file, which is gone afterwards."""
    folder = tmp_path_factory.mktemp("started")
    copy = shutil.copy(file, folder / "mine.safetensors")
    run(folder / "run", *RESNET, *STILL, f"model.weights={copy}")
    copy.unlink()
    return folder / "run"


def test_a_run_starts_from_a_file_and_says_so(started, file):
    ours = weights(started)
    overlay = {"file": str(file), "custom_load": False}
    theirs = timm.create_model(
        "test_resnet", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1
    )
    moved = ("running_mean", "running_var", "num_batches_tracked")  # by the first pass
    for name, value in theirs.state_dict().items():
        if not name.endswith(moved) and not name.startswith("fc."):
            torch.testing.assert_close(ours[f"model.{name}"], value, rtol=0, atol=1e-20)
    assert ours["model.fc.weight"].shape == (10, 96)
    assert ours["model.fc.weight"].abs().max() < 1e-20
    found = summary(started)
    assert found["weights"]["from"].endswith("mine.safetensors")
    assert found["weights"]["new"] == ["fc.weight", "fc.bias"]
    assert len(found["weights"]["sha256"]) == 64
    assert found["metrics"]["train/loss"] == pytest.approx(torch.tensor(10.0).log().item())


@pytest.mark.slow
def test_a_run_continues_without_the_file(started, tmp_path):
    folder = shutil.copytree(started, tmp_path / "run")
    before = summary(folder)["weights"]
    last = str(folder / "checkpoints" / "last.ckpt")
    again = [*RESNET, *STILL, "epochs=2", f"ckpt_path={last}"]
    with pytest.raises(ConfigError, match=r"^model\.weights=other: may not change within a run"):
        run(folder, *again, "model.weights=other")
    run(folder, *again, f"model.weights={started.parent / 'mine.safetensors'}")
    assert summary(folder)["weights"] == before
    assert summary(folder)["epochs"] == 2


@pytest.mark.slow
def test_a_run_that_continues_compares_the_bytes_of_its_checkpoint_once(
    started, tmp_path, monkeypatch
):
    compared, original = [], zipfile.ZipFile.testzip

    def testzip(archive):
        compared.append(str(archive.filename))
        return original(archive)

    monkeypatch.setattr(zipfile.ZipFile, "testzip", testzip)
    last = shutil.copytree(started, tmp_path / "run") / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    weights = f"model.weights={started.parent / 'mine.safetensors'}"
    run(last.parents[1], *RESNET, *STILL, weights, "epochs=2", f"ckpt_path={last}")
    assert compared == [str(last)]
    last.write_bytes(content)
    assert read(last)["global_step"] == 2
    content[len(content) // 2] ^= 4
    last.write_bytes(content)  # of the same size
    with pytest.raises(ConfigError, match="is damaged"):
        read(last)


@pytest.mark.slow
def test_a_checkpoint_needs_no_other_weights(started, tmp_path):
    last = started / "checkpoints" / "last.ckpt"
    stored = torch.load(last, weights_only=True)["hyper_parameters"]["model"]
    assert (stored["pretrained"], stored["weights"], stored["name"]) == (False, None, "test_resnet")
    model = sam_lightning.load(last)
    assert model(model.preprocess(Image.new("L", (8, 8)))).shape == (1, 10)
    evaluate.main([f"ckpt_path={last}"])
    assert json.loads((started / "evaluation.json").read_text())["split"] == "test"
    Image.new("L", (8, 8), 99).save(tmp_path / "x.png")
    out = tmp_path / "predictions.csv"
    predict.main([f"ckpt_path={last}", f"input={tmp_path}", "format=csv", f"out={out}"])
    assert len(out.read_text().splitlines()) >= 2
    export.main([f"ckpt_path={last}", "format=pt2", f"out={tmp_path / 'model.pt2'}"])
    assert (tmp_path / "model.pt2").is_file()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "hf-hub:timm/resnet18"},
        {"name": "local-dir:/tmp"},
        {"name": "test_resnet", "pretrained": True, "weights": "/etc/passwd"},
    ],
)
def test_a_strangers_checkpoint_fetches_nothing(started, tmp_path, change, monkeypatch):
    def fetch(*args, **kwargs):
        raise AssertionError("something was fetched")

    for name in ("load_model_config_from_hf", "load_model_config_from_path"):
        monkeypatch.setattr(f"timm.models._factory.{name}", fetch)
    last = started / "checkpoints" / "last.ckpt"
    path = changed(
        last, tmp_path / "x.ckpt", lambda c: c["hyper_parameters"]["model"].update(change)
    )
    if change["name"] == "test_resnet":  # neither is looked at
        assert sam_lightning.load(path)(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    else:
        with pytest.raises(ConfigError, match="timm has no such model"):
            sam_lightning.load(path)


def test_a_run_starts_from_a_run(started, tmp_path):
    run(tmp_path / "next", *RESNET, *STILL, f"model.weights={started}")
    found = summary(tmp_path / "next")["weights"]
    assert (found["from"], found["new"]) == (str(started), [])
    before, after = weights(started), weights(tmp_path / "next")
    for name, value in before.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-20)
    about = weights_preprocessing(
        {"_target_": "sam_lightning.models.timm_model", "weights": str(started)}
    )
    assert about["image_size"] == [32, 32]
    assert len(about["mean"]) == 1
    other = ["model=timm", "model.name=test_efficientnet", f"model.weights={started}"]
    with pytest.raises(ConfigError, match=r"model.weights=.*: weights of test_resnet, not of"):
        run(tmp_path / "other", *other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model.weights=.*: there is no checkpoint of a run"):
        run(tmp_path / "other", *RESNET, f"model.weights={tmp_path / 'empty'}")


def test_a_folder_of_the_hub_is_one_of_weights(file, tmp_path):
    shutil.copy(file, tmp_path / "model.safetensors")
    run(tmp_path / "run", *RESNET, *STILL, f"model.weights={tmp_path}")
    assert len(summary(tmp_path / "run")["weights"]["sha256"]) == 64
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(ConfigError, match=r"weights of resnet18, not of test_resnet; if they do"):
        run(tmp_path / "other", *RESNET, f"model.weights={tmp_path}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("volo_d4_448", r"data.crop_fraction=null: the weights were trained with 1.15, which is"),
        ("deepseek_vit_412m", r"data.crop_mode=null: .* with border, .*; give center or squash"),
        ("vit_base_patch16_sapiens2", r"data.image_size=null: .* \[1024, 768\], .*; give one num"),
    ],
)
def test_a_preparation_that_there_is_none_of_is_named(name, message):
    options = ["data=image_folder", "data.root=photos", "model=timm", "model.pretrained=true"]
    with pytest.raises(ConfigError, match=message):
        prepare_as_weights(configuration(*options, f"model.name={name}"))


class Own(nn.Module):
    """Has an argument of its own with the name of ours."""

    def __init__(self, weights):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
        self.scale = weights[0]

    def forward(self, x):
        return self.net(x) * self.scale


def test_an_argument_of_a_models_own_stays_as_given(tmp_path):
    own = ["model=custom", f"model._target_={Own.__module__}.Own", "+model.weights=[3,4]"]
    run(tmp_path / "run", *own)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert sam_lightning.load(last, trust=[f"{Own.__module__}.Own"]).model.scale == 3


@pytest.mark.parametrize("weights", ["weights=DEFAULT", "pretrained=True"])
def test_torchvisions_weights_come_by_the_model_that_needs_them_once(weights):
    options = ["model=custom", "model._target_=torchvision.models.resnet18", f"+model.{weights}"]
    message = rf"^model\.{weights}: give model=torchvision model.name=resnet18 and model.pretrain"
    with pytest.raises(ConfigError, match=message):
        prepare_as_weights(configuration(*options))


@pytest.mark.slow
def test_our_models_start_from_runs_and_files(tmp_path):
    ours = ["model=resnet18", "model.width=4"]
    run(tmp_path / "first", *ours, *STILL)
    run(tmp_path / "next", *ours, *STILL, f"model.weights={tmp_path / 'first'}", "seed=1")
    first, then = weights(tmp_path / "first"), weights(tmp_path / "next")
    assert torch.equal(first["model.layer4.1.conv2.weight"], then["model.layer4.1.conv2.weight"])
    state = {k.removeprefix("model."): v for k, v in first.items()}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=r"model.weights=\S+x.pth: weights of another model: it"):
        run(
            tmp_path / "wrn",
            "model=wide_resnet28_10",
            "model.depth=10",
            "model.widen_factor=1",
            f"model.weights={tmp_path / 'x.pth'}",
        )


@pytest.mark.slow
def test_a_transformer_is_built_for_the_images(tmp_path):
    images = iter(digits().train.images[:, 0].numpy())
    for split, name in itertools.product(("train", "test"), "abc"):
        (tmp_path / split / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(next(images)).convert("RGB").save(tmp_path / split / name / f"{i}.png")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "x.safetensors")
    options = ["data=image_folder", f"data.root={tmp_path}", "data.cache_dir=null"]
    options += ["data.subset=1.0", "batch_size=4", "model=timm", "model.name=test_vit"]
    options += [*STILL, f"model.weights={tmp_path / 'x.safetensors'}"]
    run(tmp_path / "run", *options, "data.image_size=48")
    overlay = {"file": str(tmp_path / "x.safetensors"), "custom_load": False}
    theirs = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay=overlay, img_size=48, num_classes=3
    )
    nn.init.zeros_(theirs.head.weight)
    nn.init.zeros_(theirs.head.bias)
    ours = sam_lightning.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for name, value in theirs.state_dict().items():
        found = ours.model.state_dict()[name]
        torch.testing.assert_close(found, value, rtol=0, atol=1e-20)
    with pytest.raises(ConfigError, match=r"cannot be built for images of 40 x 40, as its patches"):
        run(tmp_path / "refused", *options, "data.image_size=40")
    again = f"ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'}"
    with pytest.raises(
        ConfigError, match=r"last.ckpt: is of images of \[48, 48\], not \[64, 64\]$"
    ):
        run(tmp_path / "run", *options, "data.image_size=64", "epochs=2", again)
    with pytest.raises(ConfigError, match=r"^image_size: the model takes no 40 x 40 \("):
        export.export(ours, tmp_path / "x.onnx", image_size=(40, 40))


def test_the_head_of_other_classes_is_new(started, tmp_path):
    path = changed(
        started / "checkpoints" / "last.ckpt",
        tmp_path / "other.ckpt",
        lambda c: c["hyper_parameters"].update(classes=[f"other {i}" for i in range(10)]),
    )
    run(tmp_path / "next", *RESNET, *STILL, f"model.weights={path}")
    assert summary(tmp_path / "next")["weights"]["new"] == ["fc.weight", "fc.bias"]
    assert weights(tmp_path / "next")["model.fc.weight"].abs().max() < 1e-20


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("timm_model", "resnet18"),
        ("timm_model", "gcvit_xxtiny"),
        ("torchvision_model", "resnet18"),
        ("SAMResNet18", None),
    ],
)
def test_published_weights_without_a_network(target, name, tmp_path, monkeypatch):
    for variable in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(variable, CLOSED)
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = {"_target_": f"sam_lightning.models.{target}", **({"name": name} if name else {})}
    with pytest.raises(ValueError, match=r"pretrained=true: the weights are not on this machine"):
        published(config)


@pytest.mark.long
def test_published_weights_that_are_here_need_no_network(file, tmp_path, monkeypatch):
    # As Hugging Face's hub and torch.hub keep what they downloaded.
    monkeypatch.setenv("HTTPS_PROXY", CLOSED)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--timm--test_resnet.r160_in1k"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    (kept / "snapshots" / ("0" * 40)).mkdir(parents=True)
    shutil.copy(file, kept / "snapshots" / ("0" * 40) / "model.safetensors")
    run(tmp_path / "timm", *RESNET, "model.pretrained=true")
    found = summary(tmp_path / "timm")["weights"]
    assert found["from"] == "timm test_resnet.r160_in1k"
    assert found["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    options = ["model=resnet18", "model.stem=imagenet", "model.pretrained=true", *STILL]
    run(tmp_path / "ours", *options)
    assert summary(tmp_path / "ours")["weights"]["from"] == "torchvision resnet18.IMAGENET1K_V1"
    found, expected = weights(tmp_path / "ours"), theirs.layer3[0].conv1.weight
    torch.testing.assert_close(found["model.layer3.0.conv1.weight"], expected, rtol=0, atol=1e-20)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """``train.py`` where nothing was downloaded before, and nothing can be."""
    variables = dict.fromkeys(("https_proxy", "HTTPS_PROXY"), CLOSED)
    variables |= dict.fromkeys(("HF_HOME", "TORCH_HOME"), str(tmp_path_factory.mktemp("hub")))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield from serve("sam_lightning.training.run", "sklearn.datasets", "timm")


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.pretrained=true"], "model.pretrained=true: the weights are not on this machine"),
        (["model.weights=nothing.pth"], "model.weights=nothing.pth: no such file"),
        (["model.name=hf-hub:timm/x"], "model.name=hf-hub:timm/x: allowed is a name of letters"),
        (["model.name=nosuch"], "model.name=nosuch: timm has no such model"),
        (["model.drop_path_rate=1"], "model.drop_path_rate=1: allowed is "),
        (["model.weights_of=x"], "model.weights_of=x: is about model.weights"),
    ],
)
def test_what_cannot_be_loaded_ends_in_one_line(offline, arguments, message, tmp_path):
    options = [*SMALL, "model=timm", "model.name=resnet18", *arguments]
    result = offline(tmp_path, *options)
    assert (result.code, result.left) == (2, [])
    assert result.err.startswith(f"error: {message}")
    assert result.err.count("\n") == 1


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_start_from_the_same_weights(file, tmp_path):
    options = [*SMALL, *RESNET, *STILL, f"model.weights={file}", "hydra.run.dir=run"]
    done = command(tmp_path, *options, "trainer=ddp_cpu", "trainer.devices=2")
    assert done.returncode == 0, done.stderr
    one = json.loads((tmp_path / "run" / "metrics.json").read_text())["weights"]
    assert one["new"] == ["fc.weight", "fc.bias"]


@pytest.mark.slow
def test_photographs_are_prepared_as_the_weights_want_them(tmp_path):
    """What is null is the weights'; a given value stays; the checkpoint keeps all of it."""
    about = timm.models.get_pretrained_cfg("test_vit").to_dict() | {"crop_mode": "squash"}
    file = tmp_path / "model.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file)
    described = {"architecture": "test_vit", "pretrained_cfg": about}
    (tmp_path / "config.json").write_text(json.dumps(described))
    for i, place in enumerate(itertools.product(("train", "test"), "ab", range(4))):
        photo = tmp_path / "photos" / place[0] / place[1] / f"{place[2]}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(256, (200 + 7 * i, 300, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize((230, 310 + i)).save(photo)
    data = ["data=image_folder", f"data.root={tmp_path / 'photos'}", "data.subset=1.0"]
    options = [
        *data,
        "model=timm",
        "model.name=test_vit",
        "batch_size=4",
        f"data.cache_dir={tmp_path}",
    ]
    run(tmp_path / "run", *options, f"model.weights={file}", "data.std=[0.3,0.3,0.3]")
    made = sam_lightning.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert (made.image_size, made.mean, made.std) == ((160, 160), (0.5,) * 3, (0.3,) * 3)
    wanted = timm.data.resolve_data_config({}, pretrained_cfg=about) | {"std": (0.3,) * 3}
    transform = timm.data.create_transform(**wanted)
    with Image.open(photo) as image:
        difference = made.preprocess(image)[0] - transform(image)
    assert difference.abs().max() * 0.3 <= 1 / 255 + 1e-6
    file.unlink()  # a run that continues keeps what it had
    again = [f"ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'}", f"model.weights={file}"]
    run(tmp_path / "run", *options, *again, "data.std=[0.3,0.3,0.3]", "epochs=2")
    assert summary(tmp_path / "run")["epochs"] == 2
