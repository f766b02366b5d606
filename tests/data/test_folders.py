"""Folders of photographs as people have them: layouts, names, what is left out, splits."""

import json
import os
import pickle
import shutil
import unicodedata
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from image_files import one_line_error, write_images
from sam_lightning.config.arguments import parse
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.hydra_errors import with_quoted_places
from sam_lightning.data import image_folder
from sam_lightning.data.source import Names, read_splits
from sam_lightning.data.splitting import split_names
from sam_lightning.studies import cost
from sam_lightning.studies.plan import configuration


def classes(folder, counts, seed=0):
    """Noise in a folder for each class."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
    return folder


def nfc(name):
    return unicodedata.normalize("NFC", name)


def counts(source):
    splits = {name: getattr(source, name) for name in ("train", "val", "test")}
    return {name: len(split) for name, split in splits.items() if split is not None}


# ----------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (("train", "test"), {"train": 7, "test": 7}),
        (("Train", "Valid"), {"train": 7, "test": 7}),
        (("training", "validation", "TEST"), {"train": 7, "val": 7, "test": 7}),
        (("train",), {"train": 7}),
    ],
)
def test_folders_of_splits_have_the_names_that_people_give_them(tmp_path, folders, found):
    for folder in folders:
        classes(tmp_path / folder, {"a": 3, "b": 4})
    source = image_folder(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert counts(source) == found
    assert source.train.names[0] == f"{folders[0]}/a/000.png"
    assert source.left_out == {}


@pytest.mark.parametrize(
    ("folders", "options", "said"),
    [
        (("train", "Train"), {}, "Train and train are both there"),
        (("train", "val", "valid"), {}, "val and valid are both there"),
        (("a", "b"), {}, "no folder {root}/train; need train/<class>/* and test/<class>/*"),
        (("train", "test"), {"split": [0.8, 0.2]}, "has a folder train of classes already"),
    ],
)
def test_what_could_be_meant_in_two_ways_is_refused(tmp_path, folders, options, said):
    for folder in folders:
        classes(tmp_path / folder, {"a": 3, "b": 4})
    assert said.format(root=tmp_path) in one_line_error(image_folder, str(tmp_path), **options)


def test_what_is_no_image_is_left_out_and_counted(tmp_path):
    for split in ("train", "test"):
        classes(tmp_path / split, {"a": 2, "b": 2})
    train = tmp_path / "train"
    for junk in (".ipynb_checkpoints/x.png", "a/.DS_Store", "a/._000.png", "b/__MACOSX/x.png"):
        (train / junk).parent.mkdir(exist_ok=True)
        (train / junk).write_bytes(b"junk")
    for junk in ("a/@eaDir/000.png/THUMB.png", "lost+found/x.png"):
        (train / junk).parent.mkdir(parents=True)
        (train / junk).write_bytes(b"junk")
    for junk in ("a/Thumbs.db", "a/notes.txt", "b/x.TXT", "b/x.heic", "b/README", "x.png"):
        (train / junk).write_bytes(b"junk")
    (tmp_path / "unlabelled").mkdir()
    (train / "a" / "again").symlink_to(train, target_is_directory=True)
    (train / "a" / "more.JPG").symlink_to(train / "b" / "000.png")
    source = image_folder(str(tmp_path))
    assert source.classes == ["a", "b"]
    assert [*source.train.names] == [
        *(f"train/a/{n}" for n in ("000.png", "001.png", "more.JPG")),
        *(f"train/b/{n}.png" for n in ("000", "001")),
    ]
    assert source.left_out == {
        **{"hidden": 7, ".txt": 2, "other folders": 1, ".heic": 1, "without suffix": 1},
        "beside the class folders": 1,
    }
    for file in (train / "b").glob("0*"):
        file.rename(file.with_suffix(".heic"))
    said = one_line_error(image_folder, str(tmp_path))
    assert "no image of class 'b' in it; left out: " in said
    assert "3 .heic" in said
    assert said.endswith("(convert HEIC to JPEG)")


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    """As one without permission, which tests that run as root cannot have."""
    for split in ("train", "test"):
        classes(tmp_path / split, {"a": 2, "b": 2})
    here = os.open(tmp_path / "train" / "a", os.O_RDONLY)
    for _ in range(50):  # a path longer than systems allow
        os.mkdir("d" * 100, dir_fd=here)
        above, here = here, os.open("d" * 100, os.O_RDONLY, dir_fd=here)
        os.close(above)
    os.close(here)
    said = one_line_error(image_folder, str(tmp_path))
    assert said.startswith(f"data.root={str(tmp_path)!r}: cannot be read ([Errno 36] File name")
    shutil.rmtree(tmp_path / "train")


def test_class_names_in_two_forms_of_unicode_are_one(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    classes(tmp_path / "train", {nfc: 2, "z": 2})
    classes(tmp_path / "test", {nfd: 2, "z": 2})
    source = image_folder(str(tmp_path))
    assert source.classes == ["z", nfc]
    classes(tmp_path / "train", {nfd: 2})
    assert "two folders in" in (said := one_line_error(image_folder, str(tmp_path)))
    assert "two forms of Unicode" in said


def test_class_names_that_cannot_be_told_or_differ_in_case(tmp_path):
    classes(tmp_path / "train", {"Cat": 2, "dog": 2})
    classes(tmp_path / "test", {"cat": 2, "dog": 2})
    assert "upper and lower case count" in one_line_error(image_folder, str(tmp_path))
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "Cat")
    os.mkdir(os.fsencode(tmp_path / "train") + b"/caf\xe9")
    said = one_line_error(image_folder, str(tmp_path))
    assert "class folder b'caf\\xe9'" in said
    assert "is not UTF-8; rename it" in said


# ------------------------------------------------------------------------------------------ splits


def names_of(source):
    return {name: [*getattr(source, name).names] for name in counts(source)}


def test_one_folder_is_divided_by_its_names_alone(tmp_path):
    sizes = {"a": 50, "b": 30, "c": 5}
    classes(tmp_path / "one", sizes)
    for name in reversed(sizes):  # another root, in another order
        classes(tmp_path / "home of bob" / "two", {name: sizes[name]}, seed=1)
    drawn = [
        names_of(image_folder(str(tmp_path / root), split=[0.6, 0.2, 0.2], split_seed=seed))
        for root, seed in (("one", 0), ("home of bob/two", 0), ("one", 1))
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0]["test"] != drawn[2]["test"]
    assert sorted(n for of in drawn[0].values() for n in of) == sorted(
        f"{name}/{i:03}.png" for name, count in sizes.items() for i in range(count)
    )
    assert {name: len(of) for name, of in drawn[0].items()} == {"train": 51, "val": 17, "test": 17}
    for of in drawn[0].values():
        shares = [sum(n.startswith(c) for n in of) * 85 / len(of) / s for c, s in sizes.items()]
        assert max(shares) < 1.3
        assert min(shares[:2]) > 0.7
    assert counts(image_folder(str(tmp_path / "one"), split=0.1)) == {"train": 77, "test": 8}


def test_a_stored_split_is_taken_again_after_images_were_added(tmp_path):
    classes(tmp_path / "photos", {"a": 20, "b": 20})
    before = names_of(image_folder(str(tmp_path / "photos"), split=0.25))
    file = tmp_path / "split.json"
    file.write_text(json.dumps(before))
    for i in range(9):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a" / f"new{i}.png")
    source = image_folder(str(tmp_path / "photos"), split=str(file))
    assert names_of(source) == before
    assert source.left_out == {"not in data.split": 9}
    (tmp_path / "photos" / before["test"][0]).unlink()
    said = one_line_error(image_folder, str(tmp_path / "photos"), split=str(file))
    assert f"1 of its images are not there, such as {before['test'][0]!r}" in said


def test_names_in_two_forms_of_unicode_keep_their_splits(tmp_path):
    root = classes(tmp_path / "photos", {"a": 8, "b": 8})
    accented = root / "b" / "e\u0301 1.png"  # as macOS writes it
    (root / "b" / "000.png").rename(accented)
    for i in range(8):  # two files that look the same
        (root / "a" / f"{i:03}.png").rename(root / "a" / f"\u00e9{i}.png")
        Image.new("RGB", (8, 8)).save(root / "a" / f"e\u0301{i}.png")
    of_b = sorted(f"b/{file.name}" for file in (root / "b").iterdir())
    before = {  # and each in its own split
        "train": [*of_b[:4], *(f"a/\u00e9{i}.png" for i in range(8))],
        "test": [*(f"a/e\u0301{i}.png" for i in range(8)), *of_b[4:]],
    }
    before = {split: sorted(names) for split, names in before.items()}
    assert f"b/{accented.name}" in before["test"]
    file = tmp_path / "split.json"
    file.write_text(json.dumps(split_names(before)))
    assert names_of(image_folder(str(root), split=str(file))) == before
    accented.rename(root / "b" / "\u00e9 1.png")  # a copy on Linux
    taken = names_of(image_folder(str(root), split=str(file)))
    assert {s: [*map(nfc, of)] for s, of in taken.items()} == {
        s: [*map(nfc, of)] for s, of in before.items()
    }
    name = next(n for n in before["test"] if n.startswith("a/e\u0301"))
    (root / name).unlink()
    said = one_line_error(image_folder, str(root), split=str(file))  # and not the other one
    assert f"1 of its images are not there, such as {name!r}" in said
    before["train"].append(before["test"][0])
    file.write_text(json.dumps(before))
    said = one_line_error(image_folder, str(root), split=str(file))
    assert f"has {before['test'][0]!r} more than once" in said


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ([0.5, 0.4], "which are 1 together"),
        ([1.0], "must be the fraction of test images"),
        (0.001, "leaves a part of the 12 images empty"),
        ([0.1, 0.9], "leaves no training image of class"),
        ("gone.json", "cannot be read"),
    ],
)
def test_splits_that_cannot_be_are_refused(tmp_path, split, said):
    classes(tmp_path, {"a": 6, "b": 5, "c": 1})
    assert said in one_line_error(image_folder, str(tmp_path), split=split)


def test_parts_of_a_split_share_its_images(tmp_path):
    write_images(tmp_path)
    source = image_folder(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    first, second = (source.train.take(torch.tensor(i)) for i in ([7, 2, 3], [0, 3]))
    one, other = read_splits(first, second.take(torch.tensor([1])))
    assert one.stored.data_ptr() == other.stored.data_ptr()
    assert len(one.stored) == 3  # and no more was decoded
    assert torch.equal(other.images, one.images[2:])
    whole = source.train.images
    assert torch.equal(one.images, whole[[7, 2, 3]])
    assert [*one.names] == [source.train.names[i] for i in (7, 2, 3)]
    taken = one.take(torch.tensor([2, 0]))
    assert torch.equal(taken.images, whole[[3, 7]])
    assert taken.labels.tolist() == source.train.labels[[3, 7]].tolist()


def test_an_index_takes_forty_bytes_an_image(tmp_path):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(1000):
            (tmp_path / name / f"{i:06}.jpg").touch()
    source = image_folder(str(tmp_path), 224)
    assert len(pickle.dumps(source.train)) < 2000 * 40 + 4000


def test_names_are_those_given():
    given = ["", "a", "b/照片.png", os.fsdecode(b"caf\xe9"), "x" * 300]
    names = Names.of(given)
    assert [*names] == given
    assert names[-1] == given[-1]
    assert names[1:3] == given[1:3]
    assert [*names.take(torch.tensor([3, 0, 3])).take(torch.tensor([2, 1]))] == [given[3], ""]


# ----------------------------------------------------------------------------------- command lines

NAMES = [
    "照片",
    "photos (1)",
    "bob's",
    "#1",
    "a,b",
    "a=b",
    "[x]",
    "{y}",
    'say "hi"',
    "2020",
    "null",
]


@pytest.mark.parametrize("name", [*NAMES, "~/été", "back\\", "a ", "$HOME", "a&b"])
def test_a_folder_of_any_name_is_given_as_it_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / os.path.expanduser(name))
    if name == "null":
        name = f"./{name}"
    cfg = configuration(["data=image_folder", f"data.root={name}", "test=false"])
    assert cfg.data.root == name
    given = [f"data.root={name}"]
    assert with_quoted_places(with_quoted_places(given)) == with_quoted_places(given)
    assert counts(image_folder(cfg.data.root)) == {"train": 12, "test": 12}


@pytest.mark.parametrize("name", ["~/x", "photos (1)", "bob's", "#1"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError) as caught:
        configuration(["data=image_folder", f"data.root={name}"])
    assert str(caught.value) == f"data.root={name}: no such folder"


def test_lists_of_folders_stay_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [
        "data.root=a,b",
        "data.root='x y'",
        "rho=0.1",
        "data.split=[0.8,0.2]",
        "ckpt_path=last",
    ]
    assert with_quoted_places(given) == given


def test_the_cost_of_photographs_is_known_before_they_are_decoded(tmp_path):
    for split in ("train", "val", "test"):
        classes(tmp_path / split, {"a": 5, "b": 4})
    for file in tmp_path.glob("*/a/*.png"):
        file.write_bytes(b"not decoded")
    options = ["data=image_folder", f"data.root={tmp_path}", "data.image_size=16", "model.width=4"]
    small, large = (
        cost.estimate(configuration([*options, f"data.image_size={s}"])) for s in (16, 32)
    )
    assert small.images == large.images == 9
    assert large.forward / small.forward == pytest.approx(4, rel=0.01)
    assert cost.estimate(configuration([*options, "data.subset=4"])).images == 4


def test_commands_take_paths_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = {"ckpt_path": ("???", Any), "out": (None, str | None), "top_k": (1, int)}
    for name in [*({*NAMES} - {"null"}), "a: b", "[1]", "'x", "-", "*"]:
        (tmp_path / name).touch()
        options = parse(keys, [f"ckpt_path={name}", f"out={name}", "top_k=2"])
        assert (options.ckpt_path, options.out, options.top_k) == (name, name, 2)
    for text, value in [("'a b','c'", ["a b", "c"]), ("'a b'", "a b"), ("[a,b]", ["a", "b"])]:
        assert parse(keys, [f"ckpt_path={text}"]).ckpt_path == value
    assert parse(keys, ["ckpt_path=x", "out=null"]).out is None


def test_photographs_without_image_folder_are_not_taken_for_cifar(tmp_path):
    write_images(tmp_path / "photos")
    classes(tmp_path / "one", {"a": 1, "b": 1})
    for root in ("photos", "one"):
        with pytest.raises(ConfigError, match=r"has photographs, .* add data=image_folder"):
            configuration([f"data.root={tmp_path / root}"])
    (tmp_path / "photos" / "cifar-10-batches-py").mkdir()
    configuration([f"data.root={tmp_path / 'photos'}"])
