"""The prefetcher in simulated time, against closed forms and counts; the tables of scale.md."""

import json

import pytest

from benchmarks import scale
from benchmarks.photographs import SHARDS
from benchmarks.simulation import Plan, Storage, simulate
from sam_lightning.config.errors import ConfigError
from sam_lightning.data import prefetch, remote

pytestmark = pytest.mark.slow


def run(storage, **plan):
    return simulate(Plan(**{"shards": 64, "shard_mb": 100.0, "window": 4, **plan}), storage)


def test_a_fast_storage_never_lets_training_wait():
    done = run(Storage(latency=0.1, request_mb_per_s=90.0), mb_per_s=200.0, epochs=2)
    assert done.trained == pytest.approx(2 * 64 * 100 / 200)
    assert done.waited < remote.POLL * 4
    # Four threads and the reader fetch a window.
    assert done.start == pytest.approx(0.1 + 100 / 90, abs=2 * remote.POLL)


@pytest.mark.parametrize("machines", [1, 4])
def test_a_slow_storage_is_used_to_the_full(machines):
    done = run(Storage(mb_per_s=150.0), mb_per_s=1000.0, machines=machines)
    # All is sent to each machine, and the last window is trained on when it has come.
    all_of_it = machines * 64 * 100 / 150
    assert done.start + done.waited + done.trained == pytest.approx(all_of_it + 4 * 0.1, rel=0.02)


def test_few_threads_are_as_many_streams():
    done = run(Storage(latency=1.0, request_mb_per_s=50.0), mb_per_s=1000.0, threads=2)
    seconds = done.start + done.waited + done.trained
    one = 64 * (1.0 + 100 / 50)
    assert one / 3 <= seconds <= one / 2 + 1  # two, and the reader, who fetches what it waits for


@pytest.mark.parametrize("length", [30.0, 60.0, 120.0])
def test_an_outage_is_as_long_as_it_is_less_what_is_ahead(length):
    # Half of 48 shards of a second each; of these not ahead are the one in use and one before.
    plan = {"mb_per_s": 100.0, "window": 1, "cache_gb": 4.8, "shards": 256}
    done = run(Storage(request_mb_per_s=400.0, outage=(100, 100 + length)), **plan)
    least = length - 24
    assert least <= done.waited <= least + 3 + remote.LONGEST_WAIT + 1
    assert done.most_gb <= 4.8


def test_an_outage_that_is_too_long_ends_in_a_line():
    with pytest.raises(ConfigError, match=r"^data.root: simulated://set/train-\d{6}.tar: 503$"):
        run(Storage(outage=(100, 1e9)), mb_per_s=100.0, cache_gb=2.4, shards=256)
    done = run(
        Storage(outage=(100, 90 + prefetch.PATIENCE)), mb_per_s=100.0, cache_gb=2.4, shards=256
    )
    assert done.waited > 200


@pytest.mark.parametrize("fails", [0.0, 0.2])
def test_each_shard_comes_once_to_a_machine_that_keeps_all(fails):
    done = run(Storage(10_000.0, fails=fails), mb_per_s=500.0, machines=3, epochs=3)
    assert {*done.storage.sent.values()} == {3}
    assert (done.storage.requests == 3 * 64) == (fails == 0)


def test_a_machine_that_keeps_some_fetches_the_others_once_an_epoch():
    epochs = 6
    done = run(Storage(request_mb_per_s=500.0), mb_per_s=500.0, epochs=epochs, cache_gb=3.2)
    assert done.most_gb <= 3.2
    assert max(done.storage.sent.values()) <= epochs + 1  # the next epoch is fetched ahead
    # Half of the set is kept, that which is needed soonest. At least a quarter of it is hit.
    assert done.storage.sent.total() < (epochs + 1) * 64 * 0.75


def test_silence_is_no_end():
    done = run(Storage(request_mb_per_s=100.0, stalls=0.05), mb_per_s=50.0, cache_gb=5.0)
    assert done.waited < 2 * remote.SILENCE
    assert done.storage.sent.total() < done.storage.requests


def test_simulations_repeat():
    storage = {"latency": 0.1, "mb_per_s": 300.0, "fails": 0.1}
    first, second = (run(Storage(**storage), mb_per_s=200.0, machines=2) for _ in range(2))
    assert first == second


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tables(tmp_path, capsys):
    crops = "random resized crops of JPEGs of 500 x 375 to 224"
    figures = {f"ours: {crops}": 400.0, f"ours / PIL + torchvision (images/CPU s): {crops}": 2.0}
    figures |= {f"{kind} / PIL + torchvision (images/CPU s): {crops}": 3.0 for kind in SHARDS}
    file = tmp_path / "benchmarks.json"
    rows = [{"what": what, "median": median} for what, median in figures.items()]
    file.write_text(json.dumps({"measurements": rows}))
    scale.main(["--json", str(file), "--shards", "48"])
    tables = capsys.readouterr().out.strip().split("\n\n")
    copying, *tables = tables
    assert copying.startswith("copying: ")
    assert [table.count("\n") - 1 for table in tables] == [3, 12, 20, 5]
    assert "| 600 |" in tables[0]  # 3 times 200
    # 8,100 images/s at 600 a core, of ImageNet's originals at three quarters of this.
    assert "| 8 | 8 A100, cited | shards of the files | 8,100 | 18 | 872 | 872 | 3 |" in tables[1]
    assert "| 8 | 8 A100, cited | 256-pixel shards | 8,100 | 14 |" in tables[1]
    with pytest.raises(SystemExit):
        scale.main(["--json", str(tmp_path / "nothing.json")])
