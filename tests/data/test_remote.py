"""Shards behind a local HTTP server that fails, lies and is slow."""

import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from omegaconf import OmegaConf
from shard_files import CROPS, data_of, epoch, packed, photographs
from test_same_images import TWO, global_batches, photographs_and_shards, train

from image_files import one_line_error
from runs import configuration
from sam_lightning.data import image_folder, prefetch, remote
from sam_lightning.data.index import Index
from sam_lightning.inference.load import data_of as data_of_run


class Storage:
    """Serves a folder; ``fails`` says how often a file's request goes wrong, and how."""

    def __init__(self, folder):
        self.seen, self.fails = Counter(), {}
        self.watch = lambda name: None
        storage = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rpartition("/")[2]
                storage.seen[name] += 1
                storage.watch(name)
                times, how = storage.fails.get(name, (0, ""))
                if storage.seen[name] > times:
                    super().do_GET()
                elif how.isdigit():
                    self.send_error(int(how))
                else:
                    content = (folder / "packed" / name).read_bytes()
                    time.sleep(1.0 if how == "silent" else 0.0)
                    sent = content[:-1] + b"x" if how == "other" else content[:-5000]
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(sent)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(folder))
        )
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.root = f"http://127.0.0.1:{self.server.server_port}/packed"


@pytest.fixture
def storage(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.01)
    monkeypatch.setattr(prefetch, "PATIENCE", 0)
    packed(photographs(tmp_path / "photos"), tmp_path / "packed", "shard_mb=0.03")
    storage = Storage(tmp_path)
    yield storage
    storage.server.shutdown()
    storage.server.server_close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_that_of_the_folder_and_each_shard_is_copied_once(storage, tmp_path, workers):
    plain = data_of(tmp_path / "packed", tmp_path)
    ours = data_of(storage.root, tmp_path, num_workers=workers)
    assert epoch(ours) == epoch(plain)
    again = data_of(storage.root + "/", tmp_path, num_workers=workers)
    assert epoch(again, 1) == epoch(plain, 1)
    # The test images were decoded from the folder's shards, and are known to be the same.
    shards = [shard.name for shard in Index.read(tmp_path / "packed").splits["train"].shards]
    del storage.seen["shards.json"]
    assert storage.seen == dict.fromkeys([*shards, "shards.bin"], 1)


@pytest.mark.parametrize(
    "how", ["503", "short", "other", pytest.param("silent", marks=pytest.mark.slow)]
)
def test_what_goes_wrong_for_a_time_is_tried_again(storage, tmp_path, how, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE", 0.3)
    storage.fails = {"train-000001.tar": (remote.TRIES - 1, how), "shards.bin": (2, how)}
    assert epoch(data_of(storage.root, tmp_path)) == epoch(data_of(tmp_path / "packed", tmp_path))
    assert storage.seen["train-000001.tar"] == remote.TRIES
    storage.fails = {"train-000001.tar": (99, how)}
    # Which is no broken image.
    said = one_line_error(data_of, storage.root, tmp_path / "new", skip_broken=True)
    assert said.startswith(f"data.root: {storage.root}/train-000001.tar: ")
    assert not [*tmp_path.glob("new/cache/remote-*/train-000001*")]


def test_a_set_that_is_not_there_is_refused_at_once(storage, tmp_path):
    said = one_line_error(data_of, storage.root + "/nowhere", tmp_path)
    assert said == f"data.root: {storage.root}/nowhere/shards.json: is not there"
    assert storage.seen["shards.json"] == 1
    storage.fails = {"shards.json": (99, "403")}
    assert "403" in one_line_error(data_of, storage.root, tmp_path)
    assert storage.seen["shards.json"] == 2
    storage.fails = {}
    assert "no_such" in one_line_error(data_of, "no_such://place", tmp_path)
    (tmp_path / "packed" / "shards.json").write_text("<html>")
    said = one_line_error(data_of, storage.root, tmp_path)
    assert said.startswith(f"data.root: {storage.root}/shards.json cannot be read: ")


def test_an_index_leads_to_no_other_place(storage, tmp_path):
    (tmp_path / "evil.tar").write_bytes(b"somewhere else")
    file = tmp_path / "packed" / "shards.json"
    file.write_text(file.read_text().replace("train-000001.tar", "../evil.tar"))
    said = one_line_error(data_of, storage.root, tmp_path)
    assert said == f"data.root: {storage.root}: '../evil.tar' is no name of a shard"
    assert "evil.tar" not in storage.seen


def test_a_set_that_was_packed_again_is_copied_again(storage, tmp_path):
    first = epoch(data_of(storage.root, tmp_path))
    (tmp_path / "packed").rename(tmp_path / "old")
    packed(tmp_path / "photos", tmp_path / "packed", "side=16")
    assert epoch(data_of(storage.root, tmp_path)) != first
    assert epoch(data_of(storage.root, tmp_path)) == epoch(data_of(tmp_path / "packed", tmp_path))


def _read(root, cache, queue):
    images = image_folder(root, cache_dir=cache, **CROPS).train.stored
    queue.put(images.read(torch.arange(len(images))).sum().item())


def test_processes_that_start_at_once_copy_once(storage, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (storage.root, str(tmp_path / "cache"), queue)
    processes = [context.Process(target=_read, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    assert len({queue.get(timeout=120) for _ in processes}) == 1
    for process in processes:
        process.join()
    shards = [name for name in storage.seen if name.startswith("train")]
    assert {storage.seen[name] for name in shards} == {1}
    assert len(shards) == len(Index.read(tmp_path / "packed").splits["train"].shards)
    left = os.listdir(next((tmp_path / "cache").glob("remote-*")))
    assert sorted(left) == sorted([*shards, "shards.bin", "shards.json"])


def training_shards(tmp_path):
    return Index.read(tmp_path / "packed").splits["train"].shards


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


KNOWN = {"mean": [0.5] * 3, "std": [0.5] * 3, "batch_size": 1}  # else images of all shards are read


def test_the_next_shards_are_copied_while_others_are_read(storage, tmp_path):
    shards = training_shards(tmp_path)
    batches = iter(data_of(storage.root, tmp_path, window=1, **KNOWN).train_loader())
    next(batches)  # of one shard
    until(lambda: all(storage.seen[shard.name] for shard in shards))
    assert len([key.indices.tolist() for _, _, key in batches]) == 23
    assert {storage.seen[shard.name] for shard in shards} == {1}


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_keep_to_their_limit_and_those_needed_last_go(storage, tmp_path, workers):
    shards = training_shards(tmp_path)
    sizes = {shard.name: shard.size for shard in shards}
    assert len(sizes) >= 5
    limit, most = 3.5 * max(sizes.values()), []

    def watch(name):
        (folder,) = (tmp_path / "limited").glob("cache/remote-*")
        seen = [{*os.listdir(folder)} for _ in range(2)]  # others come and go meanwhile
        here = {name, *(file.removesuffix(".part") for file in seen[0] & seen[1])}
        most.append(sum(sizes.get(file, 0) for file in here))

    plain = data_of(tmp_path / "packed", tmp_path, window=1, **KNOWN)
    ours = data_of(
        storage.root,
        tmp_path / "limited",
        window=1,
        cache_gb=limit / 1e9,
        num_workers=workers,
        **KNOWN,
    )
    storage.watch = lambda name: watch(name) if name in sizes else None
    for number in range(3):
        assert epoch(ours, number) == epoch(plain, number)
    spare = max(sizes.values()) if workers else 0  # for a process that is behind the others
    assert 2 * min(sizes.values()) < max(most) <= limit + spare
    # Once an epoch, and the three that a fourth one begins with.
    assert sum(storage.seen[name] for name in sizes) <= 3 * len(sizes) + 3


def test_a_limit_that_two_windows_exceed_is_refused(storage, tmp_path):
    for window, needed in (
        (2, "the 4 shards"),
        (None, f"the {len(training_shards(tmp_path))} shards"),
    ):
        data = data_of(storage.root, tmp_path, window=window, cache_gb=1e-6, **KNOWN)
        said = one_line_error(data.train_loader)
        assert said.startswith(f"data.cache_gb=1e-06: {needed} that are needed at a time take ")


def test_an_outage_stops_training_only_where_nothing_is_here(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "PATIENCE", 60)
    plain = epoch(data_of(tmp_path / "packed", tmp_path, window=1, **KNOWN))
    shards = training_shards(tmp_path)
    data = data_of(storage.root, tmp_path, window=1, cache_gb=3.5 * shards[0].size / 1e9, **KNOWN)
    batches, found = iter(data.train_loader()), []
    folder = next((tmp_path / "cache").glob("remote-*"))

    def take(count):
        for _, (images, labels, key) in zip(range(count), batches, strict=False):
            found.append((images.tolist(), labels.tolist(), key.indices.tolist()))

    take(1)
    first = [*dict.fromkeys(data.train.shards[[row[2][0] for row in plain]].tolist())][:2]
    until(lambda: all((folder / shards[number].name).is_file() for number in first))
    began = storage.seen.total()
    storage.fails = {shard.name: (10**6, "503") for shard in shards}  # from now on
    take(sum(int((data.train.shards == number).sum()) for number in first) - 1)
    threading.Timer(0.5, storage.fails.clear).start()
    take(100)
    assert found == plain
    assert storage.seen.total() > began + remote.TRIES


def test_a_claim_is_that_of_one(tmp_path):
    interval, owners, together = sys.getswitchinterval(), [], []

    def work():
        for _ in range(300):
            with remote.claimed(tmp_path / "shard") as mine:
                if mine:
                    owners.append(mine)
                    time.sleep(0)
                    together.append(len(owners))
                    owners.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    try:
        sys.setswitchinterval(1e-5)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(together) > 10
    assert set(together) == {1}


def test_what_a_kill_left_is_taken_over(storage, tmp_path):
    plain = epoch(data_of(tmp_path / "packed", tmp_path))
    ours = data_of(storage.root, tmp_path, **KNOWN | {"batch_size": 5})
    folder = next((tmp_path / "cache").glob("remote-*"))
    for shard in training_shards(tmp_path):
        if (folder / shard.name).exists():  # that of the image that was tried
            continue
        (folder / f"{shard.name}.lock").touch()
        (folder / f"{shard.name}.part").write_bytes(b"a part")
    assert [row[2] for row in epoch(ours)] == [row[2] for row in plain]
    until(lambda: not [*folder.glob("*.lock"), *folder.glob("*.part")])


def test_a_checkpoint_leads_to_no_address(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = configuration("data=shards", f"data.root={storage.root}", "data.image_size=8")
    cfg.output_dir = str(tmp_path)
    config = OmegaConf.to_container(cfg, resolve=True)
    config |= {"classes": ["ant", "bee"], "mean": [0.5] * 3, "std": [0.5] * 3}
    said = one_line_error(data_of_run, config)
    assert said == f"data.root={storage.root}: is an address, which has to be typed"
    assert not storage.seen
    typed = data_of_run(config, storage.root)
    assert len(typed.test) == 24


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_at_an_address_bit_for_bit(tmp_path):
    _, shards = photographs_and_shards(tmp_path)
    storage = Storage(tmp_path)
    root = storage.root.replace("packed", "shards")
    sizes = [shard.size for shard in Index.read(tmp_path / "shards").splits["train"].shards]
    assert len(sizes) >= 5
    window = ["data=shards", "data.window=1"]
    train(tmp_path / "plain", *window, shards[1], "data.num_workers=0")
    limit = f"data.cache_gb={3.2 * max(sizes) / 1e9}"
    ours = [*window, f"data.root={root}", f"data.cache_dir={tmp_path / 'cache'}", limit, *TWO]
    train(tmp_path / "killed", *ours, "data.num_workers=2", at="0.3")
    storage.fails = {name: (storage.seen[name] + 2, "503") for name in [*storage.seen]}
    train(tmp_path / "killed", *ours, "data.num_workers=3", "ckpt_path=last")
    assert global_batches(tmp_path / "killed") == global_batches(tmp_path / "plain")
    copies = [*tmp_path.glob("cache/remote-*/train-*.tar")]
    assert 1 <= len(copies) < len(sizes)
    storage.server.shutdown()
    storage.server.server_close()
