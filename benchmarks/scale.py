"""What 8 and 64 GPUs need of cores, network and storage: python -m benchmarks.scale

Prints the tables of docs/scale.md. It reads the speed of loading from the file that ``python -m
benchmarks photographs`` writes, measures the bytes of an image, and simulates waiting.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.photographs import SHARDS, write_photographs
from benchmarks.simulation import Plan, Storage, simulate
from sam_lightning.data.listing import list_images
from sam_lightning.data.packing import pack
from sam_lightning.data.remote import copy, digest

ORIGINALS, SMALL = [*SHARDS][:2]
GPUS = {8: 1, 64: 8}  # and their machines
PASSES = {"8 A100, cited": 16_200, "twice that, assumed": 32_400}  # images/s of SGD on 8 GPUs
IMAGENET = {"images": 1_281_167, "bytes": 137_984_747_520}  # of ILSVRC2012_img_train.tar
IMAGENET_COST = 0.75  # images a CPU second of its larger originals / of 500 x 375, assumed
SHARD_MB = 256
# An object storage: Amazon's documentation has 100 to 200 ms, and a request for each 85 to 90 MB/s.
SILENT = 0.001
CLOUD = partial(Storage, latency=0.15, request_mb_per_s=85.0, fails=0.01, stalls=SILENT)
WINDOW = 16
CACHED = 240  # seconds of training, half of which are fetched ahead
THREADS = {8: (4, 8, 16, 32), 64: (32, 64)}
COPIES = ((4, 2.1), (16, 8.2), (16, 20.0), (16, 40.0), (64, 32.8))  # windows, GB
AWAY = (0, 60, 240)  # seconds


def rates(file: Path) -> dict[str, float]:
    """Images a CPU second by kind of shards, as measured."""
    found = {m["what"]: m["median"] for m in json.loads(file.read_text())["measurements"]}
    crops = ": random resized crops of JPEGs of 500 x 375 to 224"
    ours, peer = found[f"ours{crops}"], "PIL + torchvision (images/CPU s)"
    theirs = ours / found[f"ours / {peer}{crops}"]
    return {kind: found[f"{kind} / {peer}{crops}"] * theirs for kind in SHARDS}


def sizes() -> dict[str, float]:
    """Bytes an image by kind of shards; of the originals, those of ImageNet."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "photographs")
        write_photographs(root, 64)
        listing = list_images(str(root))
        for kind, how in SHARDS.items():
            pack(listing, Path(folder, kind), how)
            shards = [*Path(folder, kind).glob("train-*.tar")]
            found[kind] = sum(file.stat().st_size for file in shards) / 64
    return found | {ORIGINALS: IMAGENET["bytes"] / IMAGENET["images"]}


def copying() -> float:
    """MB that a CPU second of this process copies from a server on this machine, with SHA-256."""
    server = "import http.server as h; s = h.ThreadingHTTPServer(('127.0.0.1', 0), "
    server += "h.SimpleHTTPRequestHandler); print(s.server_port, flush=True); s.serve_forever()"
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder, "shard.tar")
        shard.write_bytes(os.urandom(SHARD_MB * 10**6))
        command, quiet = [sys.executable, "-c", server], subprocess.DEVNULL
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=quiet) as process:
            try:
                assert process.stdout is not None
                address = f"http://127.0.0.1:{int(process.stdout.readline())}/shard.tar"
                copy(address, Path(folder, "first"), None)  # which imports what it needs
                sha256, began = digest(shard), time.process_time()
                copy(address, Path(folder, "second"), sha256)
                return SHARD_MB / (time.process_time() - began)
            finally:
                process.terminate()


def table(head: str, rows: Iterable[Sequence[object]]) -> str:
    """In Markdown."""
    columns = head.split("; ")
    lines = [columns, ["---:"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def needs(speeds: dict[str, float], each: dict[str, float]) -> Iterator[Sequence[object]]:
    """What the GPUs need, if each machine copies all shards in each epoch."""
    for (gpus, machines), (what, passes) in product(GPUS.items(), PASSES.items()):
        for kind, speed in speeds.items():
            speed *= IMAGENET_COST if kind == ORIGINALS else 1.0
            images = passes / 2 * machines
            mb = images * each[kind] / 1e6
            figures = (
                images,
                images / machines / speed,
                mb,
                mb * machines,
                mb * machines / SHARD_MB,
            )
            yield gpus, what, kind, *(f"{figure:,.0f}" for figure in figures)


def waits(each: dict[str, float], shards: int) -> Iterator[Sequence[object]]:
    """The share of the time that GPUs wait after the first batch, by number of threads."""
    for (gpus, machines), (what, passes) in product(GPUS.items(), PASSES.items()):
        for kind in (ORIGINALS, SMALL) if machines == 1 else (SMALL,):
            mb = passes / 2 * machines * each[kind] / 1e6
            for threads in THREADS[gpus]:
                # One of the machines, and the silence of all, since all wait for one.
                cache_gb = max(2 * WINDOW * SHARD_MB, CACHED * mb) / 1e3
                plan = Plan(mb, 1, shards, SHARD_MB, WINDOW, cache_gb, threads)
                done = simulate(plan, CLOUD(stalls=SILENT * machines))
                share = done.waited / (done.waited + done.trained)
                yield (
                    gpus,
                    what,
                    kind,
                    f"{mb:,.0f}",
                    f"{cache_gb:,.0f}",
                    threads,
                    f"{share:.0%}",
                    f"{done.start:,.0f}",
                )


def outages(each: dict[str, float], shards: int) -> Iterator[Sequence[object]]:
    """What a limit is good for: seconds that training waits while the storage is away."""
    mb = PASSES["8 A100, cited"] / 2 * each[SMALL] / 1e6
    half = shards * SHARD_MB / mb / 2
    for window, gb in COPIES:
        plan = Plan(mb, 1, shards, SHARD_MB, window, gb, 16)
        away = [simulate(plan, CLOUD(outage=(half, half + s))).waited for s in AWAY]
        plan.epochs = 4
        copied = simulate(plan, CLOUD()).storage.sent.total() / plan.epochs / shards
        yield window, gb, *(f"{seconds:,.0f}" for seconds in away), f"{copied:.0%}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("logs/benchmarks/benchmarks.json"))
    parser.add_argument("--shards", type=int, default=768, help="of the simulated set")
    options = parser.parse_args(argv)
    if not options.json.is_file():
        parser.error(f"--json {options.json}: is not there; python -m benchmarks photographs")
    speeds, each = rates(options.json), sizes()
    print(f"copying: {copying():,.0f} MB a CPU second\n", flush=True)
    measured = ((kind, f"{speeds[kind]:,.0f}", f"{each[kind]:,.0f}") for kind in SHARDS)
    for head, rows in (
        ("shards; images a CPU second; bytes an image", measured),
        (
            "GPUs; speed; shards; images/s; cores a machine; MB/s a machine; MB/s of the storage; "
            "GET/s of the storage",
            needs(speeds, each),
        ),
        (
            "GPUs; speed; shards; MB/s a machine; data.cache_gb; threads; waits; first batch, s",
            waits(each, options.shards),
        ),
        (
            "window; data.cache_gb; "
            + "; ".join(f"waits, away for {seconds} s" for seconds in AWAY)
            + "; copied an epoch",
            outages(each, options.shards),
        ),
    ):
        print(table(head, rows) + "\n", flush=True)


if __name__ == "__main__":
    main()
