"""Shards behind a local HTTP server that fails, lies and is slow."""

import multiprocessing
import os
import threading
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from omegaconf import OmegaConf
from shard_files import CROPS, data_of, epoch, packed, photographs

from image_files import one_line_error
from runs import configuration
from sam_lightning.data import image_folder, prefetch, remote
from sam_lightning.data.index import Index
from sam_lightning.inference.load import data_of as data_of_run


class Storage:
    """Serves a folder; ``fails`` says how often a file's request goes wrong, and how."""

    def __init__(self, folder):
        self.seen, self.fails = Counter(), {}
        storage = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rpartition("/")[2]
                storage.seen[name] += 1
                times, how = storage.fails.get(name, (0, ""))
                if storage.seen[name] > times:
                    super().do_GET()
                elif how == "error":
                    self.send_error(503)
                else:
                    content = (folder / "packed" / name).read_bytes()
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


@pytest.mark.parametrize("how", ["error", "short", "other"])
def test_what_goes_wrong_for_a_time_is_tried_again(storage, tmp_path, how):
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


def test_the_next_shards_are_copied_while_others_are_read(storage, tmp_path):
    data = data_of(storage.root, tmp_path, window=1, mean=[0.5] * 3, std=[0.5] * 3, batch_size=1)
    batches = iter(data.train_loader())
    next(batches)  # of one shard, from which all batches that are loaded by now are
    count = len(data.train) // 5 // 2
    for _ in range(count):
        next(batches)
    deadline = time.monotonic() + 60
    while len([name for name in storage.seen if name.startswith("train")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    left = [key.indices.tolist() for _, _, key in batches]
    assert len(left) == len(data.train) - 1 - count
    assert {c for name, c in storage.seen.items() if name.startswith("train")} == {1}


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
