"""Folders that are listed once for all processes of a machine, which see what is there now."""

import multiprocessing
import os
import re
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks
from shard_files import packed, photographs

from image_files import write_images
from sam_lightning.data import image_folder, shards, share

LINUX = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells what is shared")


def many(root, count, length=10):
    """Files in two classes, which are no images."""
    for cls in ("a", "b"):
        (root / "train" / cls).mkdir(parents=True)
        for i in range(count // 2):
            (root / "train" / cls / f"{i:0{length}}.jpg").touch()
    return root


def seen(source):
    """All that is known of files: names, labels, stamps."""
    splits = [split for split in (source.train, source.test) if split]
    files = [split.stored.files for split in splits]
    return [([*f.names], f.labels.tolist(), f.stamps.tolist(), f.size) for f in files]


def test_one_process_sees_the_files_as_they_are_now(tmp_path, monkeypatch):
    root, cache = many(tmp_path / "photos", 20), tmp_path / "cache"
    small = seen(image_folder(str(root), 8, str(cache)))
    assert not cache.exists()
    monkeypatch.setattr(share, "SMALL", 0)
    sources = [image_folder(str(root), 8, str(cache)) for _ in range(2)]
    (file,) = cache.iterdir()
    assert seen(sources[0]) == seen(sources[1]) == small
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    assert seen(image_folder(str(root), 8, str(cache))) == small  # another file, of these arrays
    (root / "train" / "a" / "0000000000.jpg").unlink()
    (root / "train" / "b" / "0000000000.jpg").write_bytes(b"changed")
    (root / "train" / "b" / "more.jpg").touch()
    ((names, labels, stamps, size),) = seen(image_folder(str(root), 8, str(cache)))
    assert names == [*small[0][0][1:], "train/b/more.jpg"]
    assert labels == [0] * 9 + [1] * 11
    assert stamps[9] != small[0][2][10]
    assert size == 7 / 20
    (tmp_path / "file").touch()
    ((closed, *_),) = seen(image_folder(str(root), 8, str(tmp_path / "file")))
    assert closed == names


def _ranks(folder, split):
    """The second rank can list nothing, and sees what the first one listed last."""
    root, cache, rank = folder / "photos", str(folder / "cache"), dist.get_rank()
    options = {"image_size": 8, "cache_dir": cache, "split": split}
    if rank:
        shards.list_images = None
    for change in (None, "0.png", "1.png", "new.png"):
        if change and rank == 0:
            file = root / "ant" / change
            file.unlink() if change == "0.png" else file.write_bytes(b"other")
        dist.barrier()
        found = [None, None]
        if rank == 0:
            found[0] = seen(image_folder(str(root), **options))
            (root / "zebra" / f"{change}.late.png").touch()  # between the two
        dist.barrier()
        if rank:
            found[0] = seen(image_folder(str(root), **options))
        dist.all_gather_object(found, found[0])
        assert found[0] == found[1]
        names = [name for names, *_ in found[0] for name in names]
        assert ("ant/0.png" in names) == (change is None)
        assert ("ant/new.png" in names) == (change == "new.png")
        assert f"zebra/{change}.late.png" not in names
    assert len([*Path(cache).iterdir()]) == 4


@pytest.mark.long
def test_ranks_see_what_the_first_one_lists(tmp_path):
    write_images(tmp_path / "made", splits=("train",))
    (tmp_path / "made" / "train").rename(tmp_path / "photos")
    run_ranks(_ranks, tmp_path, 0.25)


def _mapped(address):
    """The file that memory is of, and kB of it that are this process's own."""
    mappings = Path("/proc/self/smaps").read_text()
    for part in re.split("(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", mappings):
        if part:
            first, last = (int(number, 16) for number in part.split()[0].split("-"))
            if first <= address < last:
                own = re.search(r"^Anonymous: *(\d+) kB", part, re.M)
                return os.path.basename(part.split("\n")[0].split()[-1])[:8], int(own[1])
    return None


def in_another(call, *given):
    """What a function returns in a process that is no fork of this one."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply(call, given)


def _addresses(split):
    files = split.stored.files
    int(files.labels.sum()), int(files.stamps.sum())
    arrays = [files.stamps, *files.names.arrays.values()]
    return [files.labels.data_ptr(), *(array.ctypes.data for array in arrays)]


def _mappings(split):
    return {_mapped(address) for address in _addresses(split)}


def _memory(folder):
    if dist.get_rank() == 0:
        source = image_folder(str(folder / "photos"), 8, str(folder / "cache"))
    dist.barrier()
    if dist.get_rank():
        source = image_folder(str(folder / "photos"), 8, str(folder / "cache"))
        assert _mappings(source.train) == {("listing-", 0)}
        assert in_another(_mappings, source.train) == {("listing-", 0)}


@pytest.mark.slow
@LINUX
def test_ranks_and_workers_map_one_copy(tmp_path):
    many(tmp_path / "photos", 400)
    run_ranks(_memory, tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    assert file.stat().st_size <= 400 * (40 + len("0000000000.jpg")) + 100


@pytest.mark.slow
@LINUX
def test_a_worker_maps_the_index_of_shards(tmp_path):
    out = packed(photographs(tmp_path / "photos"), tmp_path / "packed")
    files = image_folder(str(out), 8).train.stored.files
    assert in_another(_of_index, files) == {("shards.b", 0)}


def _of_index(files):
    arrays = [*files.split.arrays.values(), *files.names.arrays.values()]
    return {_mapped(array.ctypes.data) for array in arrays if int(array.sum()) >= 0}
