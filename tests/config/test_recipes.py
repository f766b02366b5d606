"""Recipes: their settings and costs against the papers', and two steps of each at full size."""

import gzip
import hashlib
import pickle
import re
import struct
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from hydra import compose, initialize_config_dir
from torchvision import datasets

from runs import column, configuration, summary
from sam_lightning.config.conf import CONF, DEFAULTS, top_level
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.schema import check
from sam_lightning.data import digits, svhn
from sam_lightning.studies import cost
from sam_lightning.training.run import train

NOWHERE = "http://127.0.0.1:9/"
CLASSES = {"cifar10": 10, "cifar100": 100, "fashion_mnist": 10, "svhn": 10}


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


# ------------------------------------------------------- files in the layout of the original ones


def write_cifar(root, monkeypatch, name, n):
    dataset, key = {
        "cifar10": (datasets.CIFAR10, "labels"),
        "cifar100": (datasets.CIFAR100, "fine_labels"),
    }[name]
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for files in ("train_list", "test_list"):
        sums = []
        for file, _ in getattr(dataset, files)[:1]:
            labels = rng.integers(0, CLASSES[name], n).tolist()
            content = {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), key: labels}
            (folder / file).write_bytes(pickle.dumps(content, protocol=2))
            sums.append([file, md5(folder / file)])
        monkeypatch.setattr(dataset, files, sums)
    meta = folder / dataset.meta["filename"]
    names = [f"class{i}" for i in range(CLASSES[name])]
    meta.write_bytes(pickle.dumps({dataset.meta["key"]: names}))
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5(meta)})
    monkeypatch.setattr(dataset, "url", NOWHERE)


def write_fashion_mnist(root, monkeypatch, name, n):
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng, sums = np.random.default_rng(0), []
    for file, _ in datasets.FashionMNIST.resources:
        shape = (n, 28, 28) if "images" in file else (n,)
        values = rng.integers(0, 10 if len(shape) == 1 else 256, shape, dtype=np.uint8)
        magic = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
        (raw / file).write_bytes(gzip.compress(magic + values.tobytes()))
        sums.append((file, md5(raw / file)))
    monkeypatch.setattr(datasets.FashionMNIST, "resources", sums)
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [NOWHERE])


def write_svhn(root, monkeypatch, name, n):
    """As published: X is 32 x 32 x 3 x N, and y is N x 1 with 10 for the digit 0."""
    root.mkdir(parents=True, exist_ok=True)
    rng, written, parts = np.random.default_rng(0), {}, {}
    for part, (_, file, _) in datasets.SVHN.split_list.items():
        count = n + 3 if part == "test" else n
        images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = rng.permutation(np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
        scipy.io.savemat(root / file, {"X": images, "y": labels})
        parts[part] = [NOWHERE + file, file, md5(root / file)]
        written[part] = images, labels
    monkeypatch.setattr(datasets.SVHN, "split_list", parts)
    return written


WRITERS = {
    "cifar10": write_cifar,
    "cifar100": write_cifar,
    "fashion_mnist": write_fashion_mnist,
    "svhn": write_svhn,
}


# ------------------------------------------------------------------------------------------- SVHN


@pytest.mark.parametrize("extra", [False, True])
def test_svhn_has_the_pixels_and_digits_of_its_files(tmp_path, monkeypatch, extra):
    written = write_svhn(tmp_path, monkeypatch, "svhn", 12)
    read = svhn(str(tmp_path), extra=extra, download=False)
    assert read.classes == list("0123456789")
    assert read.val is None
    parts = {"train": ["train", "extra"] if extra else ["train"], "test": ["test"]}
    for name, of in parts.items():
        split = getattr(read, name)
        images = np.concatenate([written[part][0] for part in of], axis=3)
        labels = np.concatenate([written[part][1] for part in of])[:, 0]
        assert split.images.dtype == torch.uint8
        assert split.images.is_contiguous()
        assert split.images.shape == (len(labels), 3, 32, 32)
        for image in range(len(labels)):
            for channel in range(3):
                assert np.array_equal(split.images[image, channel], images[:, :, channel, image])
        assert split.labels.dtype == torch.int64
        assert split.labels.tolist() == [int(label) % 10 for label in labels]


@pytest.mark.parametrize("download", [False, True])
def test_damaged_or_missing_svhn_files(tmp_path, monkeypatch, download):
    write_svhn(tmp_path, monkeypatch, "svhn", 4)
    (tmp_path / "extra_32x32.mat").unlink()
    assert len(svhn(str(tmp_path), download=download).train) == 4
    advice = "check the network" if download else "data.download=true"
    with pytest.raises(ConfigError, match=advice):
        svhn(str(tmp_path), extra=True, download=download)
    file = tmp_path / "train_32x32.mat"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ConfigError) as caught:
        svhn(str(tmp_path), download=download)
    message = str(caught.value)
    assert "\n" not in message
    assert f"data.root={str(tmp_path)!r}: cannot load SVHN" in message
    assert f"{file} has MD5 {md5(file)} and must have " in message
    assert advice in message
    with pytest.raises(ConfigError, match=advice):
        svhn(str(tmp_path / "new"), download=download)
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------- docs/results.md and conf/experiment

PAGE = (CONF.parent / "docs" / "results.md").read_text()
ROW = re.compile(
    r"^\| (?:(?P<model>WRN-28-10|PyramidNet-110|ResNet-18) \| )?"
    r"(?P<data>CIFAR-10|CIFAR-100|SVHN|Fashion-MNIST) \| (?P<augmentation>\w+) "
    r"\| (?P<epochs>[\d,]+) (?:\| (?P<published>\S.*?) \| (?P<sgd>\S.*?) )?"
    r"\| (?P<hours>[\d.]+) \| `(?P<arguments>.*?)` \|$",
    re.M,
)
SAM_ROWS = [match.groupdict() for match in ROW.finditer(PAGE)]
# Those that name no model stand under its heading, and have a published figure.
ROWS, OTHERS = ([row for row in SAM_ROWS if bool(row["model"]) == other] for other in (0, 1))


def sgd_of(arguments, epochs):
    """What the page says of a row of SGD: the arguments of SAM's, but for rho and epochs."""
    kept = [a for a in arguments.split() if not a.startswith(("rho=", "epochs="))]
    n = int(epochs.replace(",", ""))
    return " ".join([*kept, "method=sgd", f"epochs={n},{2 * n}"])


SGD_ROWS = [
    {**row, "published": row["sgd"], "arguments": sgd_of(row["arguments"], row["epochs"])}
    for row in SAM_ROWS
]
ALL_ROWS = [*SAM_ROWS, *SGD_ROWS]
NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN"}
NAMES |= {"fashion_mnist": "Fashion-MNIST"}
IMAGES = {"CIFAR-10": 50_000, "CIFAR-100": 50_000, "Fashion-MNIST": 60_000}
IMAGES["SVHN"] = 73_257 + 531_131
AUGMENTATIONS = {"basic": (0, None), "Cutout": (16, None), "AutoAugment": (16, "cifar10")}

# Learning rate, weight decay and rho of SAM by model, data and epochs: Foret et al. 2021, tables 6
# and 7; for 300 epochs and for ResNet-18, ESAM's run.sh; for what is in no paper, see below.
SETTINGS = {
    ("WideResNet", "CIFAR-10", 200): (0.1, 0.0005, 0.05),
    ("WideResNet", "CIFAR-100", 200): (0.1, 0.0005, 0.1),
    ("WideResNet", "CIFAR-10", 1800): (0.05, 0.001, 0.05),
    ("WideResNet", "CIFAR-100", 1800): (0.05, 0.001, 0.1),
    ("WideResNet", "SVHN", 200): (0.01, 0.0005, 0.01),
    ("WideResNet", "Fashion-MNIST", 200): (0.1, 0.0005, 0.05),
    ("PyramidNet", "CIFAR-10", 1800): (0.02, 0.0005, 0.05),
    ("PyramidNet", "CIFAR-100", 1800): (0.05, 0.0005, 0.05),
    ("PyramidNet", "CIFAR-10", 300): (0.05, 0.0005, 0.2),
    ("PyramidNet", "CIFAR-100", 300): (0.05, 0.0005, 0.2),
    ("SAMResNet18", "CIFAR-10", 200): (0.05, 0.001, 0.05),
    ("SAMResNet18", "CIFAR-100", 200): (0.05, 0.001, 0.05),
}
for name, known, epochs in (("PyramidNet", 1800, 200), ("SAMResNet18", 200, 1800)):
    for data in ("CIFAR-10", "CIFAR-100"):
        SETTINGS[name, data, epochs] = SETTINGS[name, data, known]
for name in ("WideResNet", "PyramidNet", "SAMResNet18"):
    for epochs in (200, 1800):
        as_cifar10 = SETTINGS[name, "CIFAR-10", epochs]
        SETTINGS.setdefault((name, "Fashion-MNIST", epochs), as_cifar10)
        SETTINGS.setdefault((name, "SVHN", epochs), (0.01, as_cifar10[1], 0.01))
FRIENDLY_SAM_LOG = ("SAMResNet18", "CIFAR-100", 200, "Cutout"), 0.2  # with another rho


def last_name(target):
    return target.rpartition(".")[2]


def epochs_of(row):
    return int(row["epochs"].replace(",", ""))


@pytest.fixture(scope="module")
def composed():
    """The rows of SAM with their configurations."""
    found, known = [], top_level()
    with initialize_config_dir(str(CONF), **DEFAULTS):
        for row in SAM_ROWS:
            cfg = compose("train", row["arguments"].split())
            cfg.output_dir = "run"
            check(cfg, known)
            found.append((row, cfg))
    return found


def test_every_row_of_a_table_is_read():
    assert len(SAM_ROWS) == len(re.findall(r"^\|.*\| `experiment=[^`]*` \|$", PAGE, re.M)) > 70
    assert all(row["published"] for row in ROWS)
    assert len({row["arguments"] for row in ALL_ROWS}) == len(ALL_ROWS)


def name_of(model):
    shakes = model.get("p_last", 0.5) < 1
    names = {"WideResNet": "WRN-28-10", "SAMResNet18": "ResNet-18"}
    names["PyramidNet"] = f"PyramidNet-{model.get('depth')}{'' if shakes else ' unshaken'}"
    return names[last_name(model._target_)]


@pytest.mark.slow
def test_every_combination_has_one_row(composed):
    models = "WRN-28-10", "PyramidNet-110", "ResNet-18"
    wanted = [*product(models, NAMES.values(), AUGMENTATIONS, (200, 1800))]
    rows = Counter(
        (name_of(cfg.model), row["data"], row["augmentation"], cfg.epochs) for row, cfg in composed
    )
    assert {one: rows[one] for one in wanted} == dict.fromkeys(wanted, 1)
    for row, cfg in composed:
        assert row["model"] in (None, name_of(cfg.model)), row["arguments"]


@pytest.mark.slow
def test_each_row_is_what_its_arguments_run(composed):
    for row, cfg in composed:
        said = row["arguments"]
        assert NAMES[last_name(cfg.data.source._target_)] == row["data"], said
        cutout, policy = AUGMENTATIONS[row["augmentation"]]
        of_svhn = policy is not None and row["data"] == "SVHN"
        expected = (cutout, "svhn" if of_svhn else policy)
        found = cfg.augment
        assert (found.cutout.side, (found.policy or {}).get("policy")) == expected, said
        assert (found.crop.padding, found.flip.p) == ((0, 0) if of_svhn else (4, 0.5)), said
        assert (cfg.method.name, cfg.epochs) == ("sam", epochs_of(row)), said


@pytest.mark.slow
def test_settings_are_those_of_the_papers(composed):
    used = set()
    for row, cfg in composed:
        said = row["arguments"]
        model = last_name(cfg.model._target_)
        used.add(key := (model, row["data"], cfg.epochs))
        expected = SETTINGS[key]
        if (*key, row["augmentation"]) == FRIENDLY_SAM_LOG[0]:
            expected = (*expected[:2], FRIENDLY_SAM_LOG[1])
        assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.method.rho) == expected, said
        assert cfg.batch_size == (128 if model == "SAMResNet18" else 256), said
        of_the_paper = model != "SAMResNet18" and cfg.epochs != 300
        assert cfg.optimizer.nesterov == of_the_paper, said
        assert cfg.method.decay_in_ascent == of_the_paper, said
        assert cfg.data.drop_last == of_the_paper, said
        assert cfg.trainer.gradient_clip_val == (5.0 if of_the_paper else None), said
        assert (cfg.optimizer.momentum, cfg.label_smoothing, cfg.data.val_size) == (0.9, 0, 0)
        assert last_name(cfg.scheduler._target_) == "cosine"
        assert cfg.scheduler.warmup_epochs == 0
        assert cfg.data.source.get("extra", True)  # all images of SVHN
    assert used == SETTINGS.keys()


@pytest.mark.slow
def test_hours_are_those_of_the_cost(composed):
    hand = {"WideResNet": wide_resnet_flops, "PyramidNet": pyramidnet_flops}
    hand["SAMResNet18"] = resnet18_flops
    for row, cfg in composed:
        options = dict(cfg.model)
        options["channels"], options["side"] = (1, 28) if "Fashion" in row["data"] else (3, 32)
        options["classes"] = 100 if row["data"] == "CIFAR-100" else 10
        forward = hand[last_name(options.pop("_target_"))](**options)
        images = IMAGES[row["data"]]
        images -= images % cfg.batch_size if cfg.data.drop_last else 0
        hours = 3 * forward * 2 * images * cfg.epochs / 2e13 / 3600
        assert row["hours"] == f"{hours:.1f}", row["arguments"]


def test_files_and_page_agree_on_what_is_published():
    figure = re.compile(r"\d+\.\d+(?: ± <?\d\.\d+)?")
    for name in ("wrn28_10", "pyramidnet", "resnet18"):
        text = (CONF / "experiment" / f"{name}.yaml").read_text()
        lines = [line for line in text.splitlines() if re.match(r"#  .*( ± .*){2}$", line)]
        in_file = sorted(f for line in lines for f in figure.findall(line.partition("  ")[2]))
        rows = [row for row in ALL_ROWS if f"experiment={name} " in row["arguments"] + " "]
        on_page = sorted(row["published"] for row in rows if row["published"] not in (None, "–"))
        single = [published for published in on_page if "±" not in published]
        assert all(published in text for published in single)
        assert in_file == [published for published in on_page if "±" in published]
        assert len(in_file) >= 4
        commands = re.findall(r"train.py -m sweep=seeds (.*)", text.replace("\\\n#     ", ""))
        assert {*commands} <= {row["arguments"] for row in ALL_ROWS}
        assert len(commands) >= 4


@pytest.mark.parametrize("experiment", ["wrn28_10", "pyramidnet", "resnet18"])
def test_a_row_of_sgd_takes_one_pass(experiment):
    row = next(row for row in SGD_ROWS if f"experiment={experiment} " in row["arguments"])
    cfg = cost.configuration(row["arguments"].rpartition(",")[0].split())
    assert (cfg.method.name, cfg.method.rho, cfg.epochs) == ("sgd", 0, epochs_of(row))


def test_five_seeds():
    assert configuration("sweep=seeds").seed == 0
    with initialize_config_dir(str(CONF), **DEFAULTS):
        cfg = compose("train", ["sweep=seeds"], return_hydra_config=True)
    assert cfg.hydra.sweeper.params == {"seed": "0,1,2,3,4"}


def test_the_job_of_slurm(tmp_path):
    script, submits = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    (tmp_path / "row.sh").write_text(script)
    # What SLURM is given as options is left out, and the arguments are printed instead of used.
    (tmp_path / "srun").write_text('#!/bin/bash\n[[ $1 == --cpus-per-task=9 ]] && "${@:2}"\n')
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    for name in ("srun", "python"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "4"}
    assert "--array=0-4 " in script
    runs, folders = set(), set()
    with initialize_config_dir(str(CONF), **DEFAULTS):
        for line in submits.splitlines():
            submitted = ["bash", *line.split()[1:]]
            printed = subprocess.check_output(submitted, cwd=tmp_path, env=environment, text=True)
            file, *arguments = printed.split()
            cfg = compose("train", arguments, return_hydra_config=True)
            assert (file, cfg.seed, cfg.ckpt_path) == ("train.py", 4, "last")
            assert cfg.hydra.run.dir.startswith(f"logs/{cfg.task_name}/")
            folders.add(cfg.hydra.run.dir)
            runs.add(" ".join(arguments[: arguments.index("seed=4")]))
    on_page = {
        re.sub(r"(\d+),(\d+)$", kept, row["arguments"])
        for row in ALL_ROWS
        for kept in (r"\1", r"\2")
    }
    assert runs <= on_page
    assert len(folders) == len(runs) == 3


def test_the_data_sets_can_be_fetched_beforehand(tmp_path, monkeypatch):
    (code,) = re.findall(r'^python -c "(.*)"$', PAGE, re.M)
    assert {*re.findall(r"(\w+)\(", code)} == {*WRITERS}
    monkeypatch.chdir(tmp_path)
    for name, write in WRITERS.items():
        write(Path("data"), monkeypatch, name, 4)
    exec(code, {})
    Path("data/extra_32x32.mat").unlink()
    with pytest.raises(ConfigError, match="cannot load SVHN"):
        exec(code, {})


# ------------------------------------------------------------------------------------------- cost


def wide_resnet_flops(depth, widen_factor, classes, channels, side, **_):
    """Two FLOPs for each weight of a convolution at each pixel it puts out."""
    total, width = 9 * channels * 16 * side**2, 16
    for stage in range(3):
        planes = 16 * 2**stage * widen_factor
        for block in range((depth - 4) // 6):
            side = (side + 1) // 2 if stage and not block else side
            total += (9 * width * planes + 9 * planes * planes) * side**2
            total += width * planes * side**2 if width != planes else 0
            width = planes
    return 2 * (total + width * classes)


def pyramidnet_flops(depth, alpha, bottleneck, classes, channels, side, **_):
    blocks = (depth - 2) // (3 if bottleneck else 2)
    total, width = 9 * channels * 16 * side**2, 16
    for k in range(1, blocks + 1):
        planes, before = round(16 + alpha * k / blocks), side
        side = (side + 1) // 2 if k - 1 in (blocks // 3, 2 * blocks // 3) else side
        if bottleneck:
            total += width * planes * before**2 + (9 + 4) * planes**2 * side**2
        else:
            total += 9 * (width + planes) * planes * side**2
        width = planes * (4 if bottleneck else 1)
    return 2 * (total + width * classes)


def resnet18_flops(width, classes, channels, side, **_):
    total = 9 * channels * width * side**2
    for stage in range(4):
        planes, before = width * 2**stage, width * 2 ** max(stage - 1, 0)
        side = (side + 1) // 2 if stage else side
        total += (9 * before * planes + 3 * 9 * planes**2) * side**2
        total += before * planes * side**2 if stage else 0
    return 2 * (total + planes * classes)


WRN = {"depth": 28, "widen_factor": 10}
SVHN_IMAGES = 73_257
COSTS = [
    (
        "experiment=wrn28_10 data=cifar100 epochs=1800",
        wide_resnet_flops(**WRN, classes=100, channels=3, side=32),
        (2, 49_920, 1800),
    ),
    (
        "experiment=wrn28_10 data=fashion_mnist method=sgd",
        wide_resnet_flops(**WRN, classes=10, channels=1, side=28),
        (1, 60_000 - 60_000 % 256, 200),
    ),
    (
        "model=wide_resnet28_10 data=svhn data.val_size=0.1 method.every=4",
        wide_resnet_flops(**WRN, classes=10, channels=3, side=32),
        (1.25, SVHN_IMAGES - 7_326, 200),
    ),
    (
        "model=pyramidnet110 data.subset=1000 method.ascent_fraction=0.5 epochs=7",
        pyramidnet_flops(110, 270, False, classes=10, channels=3, side=32),
        (1.5, 1000, 7),
    ),
    (
        "experiment=pyramidnet rho=0 data=svhn data.source.extra=true",
        pyramidnet_flops(272, 200, True, classes=10, channels=3, side=32),
        (1, (SVHN_IMAGES + 531_131) // 256 * 256, 1800),
    ),
    (
        "experiment=resnet18 data=digits data.subset=0.5",
        resnet18_flops(64, classes=10, channels=1, side=32),
        (2, 719, 200),
    ),
]


@pytest.mark.parametrize(("arguments", "forward", "rest"), COSTS, ids=[c[0] for c in COSTS])
def test_cost_is_counted_by_hand(arguments, forward, rest):
    found = cost.estimate(cost.configuration(arguments.split()))
    assert found.forward == forward
    assert (found.passes, found.images, found.epochs) == rest


def test_cost_multiplies(capsys):
    arguments = "experiment=wrn28_10 model.depth=10 model.widen_factor=1 flops_per_second=1e12"
    cost.main(arguments.split())
    lines = dict(re.split(r"  +", line) for line in capsys.readouterr().out.splitlines())
    forward = wide_resnet_flops(10, 1, classes=10, channels=3, side=32)
    flops = 3 * forward * 2 * 49_920 * 200
    assert lines == {
        "a forward pass of one image": f"{forward / 1e9:.3f} GFLOPs",
        "forward and backward": "x 3",
        "passes of an update": "x 2",
        "images of an epoch": "x 49,920",
        "epochs": "x 200",
        "in all": f"{flops:.3g} FLOPs",
        "at 1e+12 FLOPs/s": f"{flops / 1e12 / 3600:.2f} hours",
    }


def test_known_numbers_of_images_are_right():
    assert cost.SHAPES["digits"] == (len(digits().train), 1, 32, 10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("flops_per_second=0", "flops_per_second=0: allowed is a number > 0"),
        ("experiment=wrn", "experiment=wrn: allowed are "),
        ("modle=resnet18", "modle=resnet18: no such key; did you mean model?"),
        ("model.p_last=2", "model.p_last=2: no such key"),
        ("-m experiment=wrn28_10", "-m: no such flag"),
        ("rho=0.1,0.2", "rho=0.1,0.2: several values are a sweep, python train.py -m; a list is"),
        ("model=pyramidnet110 model.p_last=2", "model.p_last=2: allowed is a number from 0 to 1"),
        ("data=image_folder data.root=.", "data.root='.': no folder ./train; need train/<class>"),
        ("data=digits data.source._target_=a.b", "the number of images is known of cifar10, "),
        ("data.val_size=60000", "data.val_size=60000: leaves nothing of 50000 images"),
    ],
)
def test_cost_refuses_in_one_line(arguments, said):
    with pytest.raises(ConfigError) as caught:
        cost.main(arguments.split())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cost_of_a_run_that_is_there(tmp_path, capsys):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text("[data=digits, epochs=7]")
    cost.main([f"ckpt_path={tmp_path}", "model.width=8"])
    shown = capsys.readouterr().out
    assert "x 7\n" in shown
    assert "x 1,438\n" in shown


def test_cost_as_a_command(tmp_path):
    def command(*arguments):
        words = [sys.executable, "-X", "importtime", "-m", "sam_lightning", "cost", *arguments]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    done = command("epochs=0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: epochs=0: allowed is a whole number >= 1"
    assert not re.search(r"\| +torch$", done.stderr, re.M)
    done = command("--help")
    assert done.returncode == 0
    assert "flops_per_second=null" in done.stdout
    assert not re.search(r"\| +torch$", done.stderr, re.M)
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------- two steps of each

# Of model, data set and augmentation every pair that is on the page.
RECIPES = [
    "experiment=wrn28_10",
    "experiment=wrn28_10 data=cifar100 rho=0.1 augment.cutout.side=16",
    "experiment=wrn28_10 data=svhn data.source.extra=true lr=0.01 rho=0.01 "
    "augment=autoaugment_svhn data.flip=0 augment.crop.padding=0 augment.cutout.side=16",
    "experiment=wrn28_10 data=fashion_mnist",
    "experiment=pyramidnet model=pyramidnet110 augment.cutout.side=16",
    "experiment=pyramidnet data=cifar100 model=pyramidnet110 lr=0.05 "
    "augment=autoaugment augment.cutout.side=16",
    "experiment=pyramidnet data=svhn model=pyramidnet110 data.source.extra=true lr=0.01 rho=0.01",
    "experiment=pyramidnet data=fashion_mnist model=pyramidnet110 augment.cutout.side=16",
    "experiment=resnet18 augment=autoaugment augment.cutout.side=16",
    "experiment=resnet18 data=cifar100",
    "experiment=resnet18 data=svhn data.source.extra=true lr=0.01 rho=0.01 augment.cutout.side=16",
    "experiment=resnet18 data=fashion_mnist augment=autoaugment augment.cutout.side=16",
    "experiment=pyramidnet augment=autoaugment augment.cutout.side=16",
    "experiment=pyramidnet data=cifar100 lr=0.05 augment.cutout.side=16",
]
SMALL = {
    "wide_resnet28_10": ["model.depth=10", "model.widen_factor=1"],
    "pyramidnet272": ["model.depth=11", "model.alpha=6"],
    "pyramidnet110": ["model.depth=8", "model.alpha=6"],
    "resnet18": ["model.width=4"],
}


def model_of(recipe):
    chosen = re.search(r"model=(\w+)", recipe)
    default = {"wrn28_10": "wide_resnet28_10", "pyramidnet": "pyramidnet272"}
    experiment = re.search(r"experiment=(\w+)", recipe)[1]
    return chosen[1] if chosen else default.get(experiment, experiment)


def two_steps(recipe, root, monkeypatch, *options):
    """Run a recipe for two updates, of two images each, from files of its data set."""
    cfg = configuration(*recipe.split(), *options, "epochs=1", "batch_size=2", "trainer=cpu")
    cfg.data.root, cfg.output_dir, cfg.test = str(root / "data"), str(root / "run"), False
    name = last_name(cfg.data.source._target_)
    WRITERS[name](root / "data", monkeypatch, name, 2 if name == "svhn" else 4)  # SVHN has two
    train(cfg)
    found = summary(root / "run")
    assert (found["status"], found["updates"]) == ("completed", 2)
    assert column(root / "run", "train/skipped_steps") == [0]
    assert np.isfinite(column(root / "run", "train/sharpness")).all()
    return root / "run" / "checkpoints" / "last.ckpt"


def test_every_pair_of_model_data_and_augmentation_is_here():
    def pairs(recipes):
        triples = [
            (model_of(r), re.search(r"data=(\w+)|$", r)[1], ("augment=" in r, "cutout" in r))
            for r in recipes
        ]
        return {pair for triple in triples for pair in combinations(triple, 2)}

    on_page = {row["arguments"].replace(" data.num_workers=8", "") for row in ALL_ROWS}
    assert {*RECIPES} <= on_page
    basic_of_272 = ("pyramidnet272", (False, False))  # PyramidNet-110 has it
    assert pairs(RECIPES) == pairs(on_page) - {basic_of_272}


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_of_a_small_model(recipe, tmp_path, monkeypatch):
    file = two_steps(recipe, tmp_path, monkeypatch, *SMALL[model_of(recipe)])
    checkpoint = torch.load(file, weights_only=True)
    grey = "fashion_mnist" in recipe
    assert checkpoint["hyper_parameters"]["image_size"] == ([28, 28] if grey else [32, 32])
    assert checkpoint["hyper_parameters"]["model"]["in_channels"] == (1 if grey else 3)
    assert checkpoint["hyper_parameters"]["model"]["num_classes"] == (
        100 if "cifar100" in recipe else 10
    )


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_at_full_size(recipe, tmp_path, monkeypatch):
    two_steps(recipe, tmp_path, monkeypatch, "~callbacks")


# --------------------------------------------------------------------------------------- fast


@pytest.mark.parametrize("val_size", [0, 5000])
def test_the_fast_recipe_evaluates_for_less_than_a_hundredth_of_its_passes(val_size):
    cfg = configuration("experiment=cifar10_fast", f"data.val_size={val_size}")
    evaluations = cfg.epochs // cfg.trainer.check_val_every_n_epoch
    evaluated = cost.SHAPES["cifar10"][0] // 5 + val_size * evaluations  # the test set, once
    estimate = cost.estimate(cfg)
    # Forward and backward are three forward passes.
    trained = 3 * estimate.passes * estimate.images * estimate.epochs
    assert evaluated / trained < 0.01


def test_the_fast_recipe_runs_on_a_cpu_with_what_its_error_names(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"^data\.device=cuda: there is no CUDA device here; set"):
        two_steps("experiment=cifar10_fast", tmp_path / "gpu", monkeypatch)
    two_steps("experiment=cifar10_fast data.device=null", tmp_path, monkeypatch, "model.width=4")
