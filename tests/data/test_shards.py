"""Photographs in tar shards: packed, read, shuffled, and refused if they are not as packed."""

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import CROPS, data_of, epoch, packed, photographs

from image_files import one_line_error, write_images
from sam_lightning.config.conf import CONF
from sam_lightning.data import image_folder
from sam_lightning.data.index import Index
from sam_lightning.data.listing import Files, Listing, list_images
from sam_lightning.data.packing import Packing, pack
from sam_lightning.data.source import Names
from sam_lightning.studies.pack import main


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_size": 0.25, "subset": 10, "label_noise": 0.3, "sampler": "balanced", "repeats": 2},
    ],
)
def test_packed_images_are_those_of_the_folder_in_the_same_order(tmp_path, options):
    root = photographs(tmp_path / "photos")
    out = packed(root, tmp_path / "packed", "shard_mb=0.02")
    plain, ours = (data_of(where, tmp_path, **options) for where in (root, out))
    assert ours.classes == plain.classes
    assert ours.left_out == plain.left_out == {".txt": 4}
    assert ours.sizes == plain.sizes or options  # those of all images are known
    assert [*ours.train.names] == [*plain.train.names]
    assert torch.equal(ours.test.images, plain.test.images)
    for number in (0, 1):
        assert epoch(ours, number) == epoch(plain, number)


def test_one_folder_of_classes_is_divided_as_it_was_before(tmp_path):
    root = photographs(tmp_path / "photos") / "train"
    out = packed(root, tmp_path / "packed")
    plain, ours = (data_of(where, tmp_path, split=[0.6, 0.2, 0.2]) for where in (root, out))
    for name, split in plain.splits.items():
        assert [*ours.splits[name].names] == [*split.names]
    assert epoch(ours) == epoch(plain)
    assert "give data.split=" in one_line_error(data_of, out, tmp_path)
    divided = packed(tmp_path / "photos", tmp_path / "divided")
    said = one_line_error(data_of, divided, tmp_path, split=0.2)
    assert said.startswith("data.split=0.2: ")


@pytest.mark.parametrize("kind", ["jpeg", "raw"])
def test_smaller_images_are_packed_with_their_shape(tmp_path, kind):
    root = photographs(tmp_path / "photos")
    out = packed(root, tmp_path / "packed", "side=16", f"format={kind}")
    before, after = (image_folder(str(where), **CROPS).train for where in (root, out))
    for i in range(len(before)):
        large, small = (
            Image.open(io.BytesIO(split.stored.files.content(i))) for split in (before, after)
        )
        assert min(small.size) == 16
        assert small.width / small.height == pytest.approx(large.width / large.height, abs=0.05)
        assert small.format == {"jpeg": "JPEG", "raw": "PPM"}[kind]
    again = packed(out, tmp_path / "again", "shard_mb=0.01")  # shards are an input, too
    last = image_folder(str(again), **CROPS).train
    assert [*last.names] == [*before.names]
    assert last.labels.tolist() == before.labels.tolist()
    for i in range(len(last)):
        assert last.stored.files.content(i) == after.stored.files.content(i)


def test_the_same_input_gives_the_same_bytes(tmp_path):
    root = photographs(tmp_path / "photos")
    one = packed(root, tmp_path / "one", "shard_mb=0.03")
    shutil.copytree(root, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.*"):
        os.utime(path, (0, 0))
    two = packed(tmp_path / "copy", tmp_path / "two", "shard_mb=0.03")
    assert files(one) == files(two)
    index = Index.read(one)
    for split in index.splits.values():
        for shard in split.shards:
            content = (one / shard.name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            assert shard == (shard.name, len(content), digest)
            assert len(content) <= 30_000
    with tarfile.open(one / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
    keys = [m.name.partition(".")[0] for m in members]
    assert keys[::2] == keys[1::2]


class OfOnePixel(Files):
    """Images that are in no files, so that there can be many."""

    def content(self, index):
        return b"P6\n1 1\n255\n" + bytes([index % 251, 1, 2])


@pytest.mark.long
def test_packing_takes_few_bytes_of_memory_an_image(tmp_path):
    peaks = []
    for count in (100, 1000, 5000):  # the first one loads what is needed
        names = Names.of(f"train/{i * 2 // count}/{i:012}.ppm" for i in range(count))
        files = OfOnePixel("/", names, torch.arange(count) * 2 // count, np.arange(count), 15.0)
        (tmp_path / str(count)).mkdir()
        tracemalloc.start()
        index = pack(
            Listing({"train": files}, ["0", "1"], {}), tmp_path / str(count), Packing(shard_mb=0.2)
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(index.splits["train"].arrays["label"]) == count
    assert (peaks[2] - peaks[1]) / 4000 < 250


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [0, 3, 20, 40])
def test_packing_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, monkeypatch, at):
    root = photographs(tmp_path / "photos")
    whole = packed(root, tmp_path / "whole", "shard_mb=0.03")
    listing, how, out = list_images(str(root)), Packing(shard_mb=0.03), tmp_path / "out"
    seen = []

    def encoded(self, listed, index, original=Packing.encoded):
        seen.append(listed.names[index])
        if len(seen) > at:
            raise Killed
        return original(self, listed, index)

    monkeypatch.setattr(Packing, "encoded", encoded)
    with pytest.raises(Killed):
        pack(listing, out, how)
    monkeypatch.undo()
    if at < 4:
        assert not out.exists()  # no shard was complete
    else:
        assert "is not packed to its end" in one_line_error(image_folder, str(out), **CROPS)
        assert "other images or settings" in one_line_error(pack, listing, out, Packing())
        done = sorted(path.name for path in out.glob("*.tar"))
        assert done == [*files(whole)][2 : 2 + len(done)] or done
        if at == 40:  # one that was damaged since is packed again
            (out / done[0]).write_bytes(b"damaged")
    pack(listing, out, how)
    assert files(out) == files(whole)


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path):
    root = photographs(tmp_path / "photos", 150)
    whole = packed(root, tmp_path / "whole", "shard_mb=0.05")
    command = [sys.executable, "-m", "sam_lightning", "pack", f"input={root}"]
    command += [f"out={tmp_path / 'out'}", "shard_mb=0.05"]
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent)}
    for _ in range(3):
        process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 60
        before = {*tmp_path.glob("out/*.tar")}
        while not {*tmp_path.glob("out/*.tar")} - before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True)
    assert files(tmp_path / "out") == files(whole)


def test_broken_images_are_refused_or_left_out(tmp_path, capsys):
    root = photographs(tmp_path / "photos")
    (root / "train" / "ant" / "1.jpg").write_bytes(b"no image")
    said = one_line_error(packed, root, tmp_path / "packed")
    assert said.startswith(f"input: {root}/train/ant/1.jpg: cannot be packed (cannot identify")
    assert not (tmp_path / "packed").exists()
    out = packed(root, tmp_path / "packed", "skip_broken=true")
    assert "left out: 4 .txt, 1 broken" in capsys.readouterr().out
    plain = data_of(root, tmp_path, skip_broken=True)
    ours = data_of(out, tmp_path)
    assert [*ours.train.names] == [*plain.train.names]
    assert epoch(ours) == epoch(plain)


def test_a_full_disk_leaves_nothing_half_done(tmp_path):
    root = photographs(tmp_path / "photos")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            packed(root, tmp_path / "packed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["input=nowhere", "out=packed"], "input=nowhere: "),
        (["input=photos", "out=photos/packed"], "out=photos/packed: is in the input"),
        (["input=photos", "out=full"], "out=full: must be a new folder, or an empty one"),
        (["input=photos", "out=full/file"], "out=full/file: "),
        (["input=photos", "out=full/file/packed"], "out=full/file/packed: "),
        (["input=photos", "out=packed", "side=8", "format=keep"], "format=keep: "),
        (["input=photos", "out=packed", "side=0"], "side=0: allowed is a whole number >= 1"),
        (["input=photos/train/ant", "out=packed"], "input='photos/train/ant': needs two classes"),
        (["input=photos"], "out: must be given"),
    ],
)
def test_what_cannot_be_packed_is_refused_and_leaves_nothing(
    tmp_path, monkeypatch, arguments, said
):
    photographs(tmp_path / "photos", 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert one_line_error(main, arguments).startswith(said)
    assert sorted(tmp_path.rglob("*")) == before
    packed("photos", "packed")
    assert "is packed already" in one_line_error(packed, "photos", "packed")


DAMAGE = {
    "gone": (lambda file: file.unlink(), "No such file"),
    "cut short": (lambda file: os.truncate(file, 5000), "it was cut short or changed"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"0"), "it was cut short or"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_that_is_gone_or_cut_short_is_named_at_the_start(tmp_path, damage):
    out = packed(photographs(tmp_path / "photos"), tmp_path / "packed", "shard_mb=0.03")
    make, said = DAMAGE[damage]
    make(out / "train-000001.tar")
    message = one_line_error(data_of, out, tmp_path)
    assert message.startswith(f"data.root: {out}/train-000001.tar: ")
    assert said in message


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("begun", [False, True])
def test_a_bit_that_flipped_is_never_trained_on(tmp_path, begun, workers):
    out = packed(photographs(tmp_path / "photos"), tmp_path / "packed")
    split = Index.read(out).splits["train"]
    data = data_of(out, tmp_path, num_workers=workers) if begun else None
    place = int(split.arrays["block"][7]) * 512 + int(split.arrays["length"][7]) // 2
    with open(out / "train-000000.tar", "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    # Mean and std are computed from images, so a new start reads them all. No image is broken.
    with pytest.raises(ValueError, match="is not what was packed; the shard was cut short") as at:
        epoch(data or data_of(out, tmp_path, skip_broken=True))
    name = image_folder(str(out), **CROPS).train.names[7]
    assert f"{out}/train-000000.tar: {name}" in str(at.value)


def test_a_damaged_index_is_named(tmp_path):
    out = packed(photographs(tmp_path / "photos"), tmp_path / "packed")
    content = bytearray((out / "shards.bin").read_bytes())
    content[100] ^= 1
    (out / "shards.bin").write_bytes(content)
    said = one_line_error(data_of, out, tmp_path)
    assert said.startswith(f"data.root: {out}/shards.json cannot be read: shards.bin has changed")
    (out / "shards.json").write_text("{")
    assert f"{out}/shards.json cannot be read" in one_line_error(data_of, out, tmp_path)


def write_tar(path, samples):
    """A tar file as other tools write it: text labels, members in folders, other files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def samples(root, split, labels):
    """Members of the images of a folder."""
    for number, file in enumerate(sorted((root / split).rglob("*.[jp][pn]g"))):
        cls = file.relative_to(root / split).parts[0]
        yield f"./some/{'x' * 120}/{number:03}.{file.suffix[1:]}", file.read_bytes()
        yield f"./some/{'x' * 120}/{number:03}.json", b"{}"
        yield f"./some/{'x' * 120}/{number:03}.cls", labels[cls]


@pytest.mark.parametrize("names", ["folders", "words"])
def test_shards_of_other_tools_are_indexed_once(tmp_path, names, monkeypatch):
    root, foreign = photographs(tmp_path / "photos"), tmp_path / "foreign"
    labels = {"ant": b"0\n", "bee": b"1"} if names == "words" else {"ant": b"ant", "bee": b"bee"}
    for split in ("train", "test"):
        members = [*samples(root, split, labels)]
        for i, part in enumerate((members[:30], members[30:])):
            name = f"{split}/{i}.tar" if names == "folders" else f"my-{split}-{i}.tar"
            write_tar(foreign / name, part)
    (foreign / "lost+found").mkdir()
    before = files(foreign) if names == "words" else None
    ours = data_of(foreign, tmp_path)
    monkeypatch.setattr("sam_lightning.data.tars.read_tar", None)  # never again
    again = data_of(foreign, tmp_path)
    monkeypatch.undo()
    assert ours.classes == (["0", "1"] if names == "words" else ["ant", "bee"])
    assert ours.left_out == {".json": 48}
    plain = data_of(root, tmp_path)
    assert ours.sizes == plain.sizes
    paths = sorted((root / "train").rglob("*.[jp][pn]g"))
    stored = ours.train.stored.files
    assert [stored.content(i) for i in range(24)] == [path.read_bytes() for path in paths]
    assert epoch(ours) == epoch(again)
    if before:
        assert files(foreign) == before  # which is only read
        (foreign / "classnames.txt").write_text("ameise\nbiene\n")
        assert data_of(foreign, tmp_path / "new").classes == ["ameise", "biene"]


def test_hidden_files_in_tars_are_left_out(tmp_path):
    """As macOS puts them there."""
    root, foreign = photographs(tmp_path / "photos"), tmp_path / "foreign"
    for split in ("train", "test"):
        members = [*samples(root, split, {"ant": b"ant", "bee": b"bee"})]
        junk = [("._000.jpg", b"junk"), ("./__MACOSX/some/000.jpg", b"junk"), (".DS_Store", b"")]
        write_tar(foreign / f"{split}.tar", [*junk, *members])
    write_tar(foreign / "train-more.tar", [])
    data = data_of(foreign, tmp_path)
    assert data.left_out == {".json": 48, "hidden": 6}
    assert len(data.train) == len(data.test) == 24


def test_tars_that_cannot_be_understood_are_refused(tmp_path):
    root, foreign = photographs(tmp_path / "photos"), tmp_path / "foreign"
    labels = {"ant": b"0", "bee": b"1"}
    members = [*samples(root, "train", labels)]

    def refused(name, content, said):
        write_tar(foreign / "train-1.tar", members[30:])
        write_tar(foreign / "train-0.tar", content)
        if name:
            (foreign / "train-0.tar").rename(foreign / name)
        assert said in one_line_error(data_of, foreign, tmp_path)
        shutil.rmtree(foreign)

    refused(None, members[:29], "has no .cls with its class")
    refused(None, members[1:30], "has no image")
    refused(None, [*members[:30], ("some/000.jpg", b""), ("some/000.png", b"")], "has two images")
    for label in (b"", b"-1\n", b"\0\1", b"x" * 600):
        said = "no class in some/000.cls: "
        refused(None, [("some/000.jpg", b""), ("some/000.cls", label)], said)
    other = [("some/000.jpg", b""), ("some/000.cls", b"2")]
    refused("test-0.tar", other, "test has images of class '2', train none")
    refused("test-0.tar", [], "test-0.tar: no image in it, nor in others of its split")
    refused("val-train.tar", members[:30], "may be of train or val")
    refused("more.tar", members[:30], "more.tar is not named for a split")
    write_tar(foreign / "train-0.tar", members)
    whole = (foreign / "train-0.tar").read_bytes()
    with tarfile.open(foreign / "train-0.tar") as tar:
        ends = tar.getmembers()[3].offset
    for length in (ends, ends + 100, ends + 1500, 10):
        (foreign / "train-0.tar").write_bytes(whole[:length])
        said = one_line_error(data_of, foreign, tmp_path)
        assert said.startswith(f"data.root: {foreign}/train-0.tar: is no whole tar file ("), length


def test_an_archive_beside_folders_of_classes_is_left_out(tmp_path):
    root = photographs(tmp_path / "photos")
    (root / "photos.tar").write_bytes(b"as it was downloaded")
    (root / "itself").symlink_to("itself")
    assert data_of(root, tmp_path).classes == ["ant", "bee"]


@pytest.mark.parametrize("sampler", ["shuffled", "balanced"])
def test_a_window_of_shards_comes_before_the_next(tmp_path, sampler):
    out = packed(photographs(tmp_path / "photos", 40), tmp_path / "packed", "shard_mb=0.03")
    options = {"sampler": sampler, "subset": 60, "val_size": 0.1}
    full = data_of(out, tmp_path, **options)
    count = len(Index.read(out).splits["train"].shards)
    assert count >= 5
    assert epoch(data_of(out, tmp_path, window=count, **options)) != []
    windowed = data_of(out, tmp_path, window=2, **options)
    orders = []
    for number in range(3):
        order = np.concatenate([key for _, _, key in epoch(windowed, number)])
        assert sorted(order) == sorted(np.concatenate([k for _, _, k in epoch(full, number)]))
        shards = windowed.train.shards[order].tolist()
        seen = [*dict.fromkeys(shards)]
        for first in range(0, len(seen), 2):  # two shards, mixed, and then never again
            window = seen[first : first + 2]
            places = [i for i, shard in enumerate(shards) if shard in window]
            assert places == [*range(places[0], places[-1] + 1)]
        assert shards != sorted(shards, key=seen.index)
        orders.append(order.tolist())
    assert len({tuple(order) for order in orders}) == 3
    assert [[*o] for o in orders] == [
        np.concatenate([key for _, _, key in epoch(windowed, number)]).tolist()
        for number in range(3)
    ]
    plain = write_images(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"^window=2: must be >= 1 for images in shards"):
        data_of(plain, tmp_path, window=2)


def test_another_process_opens_shards_for_itself(tmp_path):
    out = packed(photographs(tmp_path / "photos"), tmp_path / "packed")
    images = image_folder(str(out), **CROPS).train.stored
    first = images.read(torch.arange(3))
    assert torch.equal(pickle.loads(pickle.dumps(images)).read(torch.arange(3)), first)


def test_the_index_takes_few_bytes(tmp_path):
    names = [f"n{cls:08}_{i}.JPEG" for cls in range(2) for i in range(10_000, 10_500)]
    for name in names:
        path = tmp_path / "photos" / "train" / name[:9] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (1, 1)).save(path)
    out = packed(tmp_path / "photos", tmp_path / "packed")
    assert (out / "shards.bin").stat().st_size / len(names) <= 40
    assert json.loads((out / "shards.json").read_text())["classes"] == ["n00000000", "n00000001"]
    assert Path(out / "train-000000.tar").is_file()
