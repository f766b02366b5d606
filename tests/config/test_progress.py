"""How far long work is: a line now and then, or a bar on a terminal; and who shows it."""

import io
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sam_lightning.analysis.checkpoints import stage
from sam_lightning.analysis.loss_surface import LossSurface
from sam_lightning.config import progress as shown
from sam_lightning.config.progress import duration, progress
from sam_lightning.data import image_folder


@pytest.fixture
def said(caplog, monkeypatch):
    """What was logged."""
    monkeypatch.setattr("sys.stderr", io.StringIO())  # no terminal
    caplog.set_level(logging.INFO, "sam_lightning")
    return caplog


def test_lines_are_few_and_tell_what_is_left(said, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(shown, "time", SimpleNamespace(monotonic=lambda: clock.now))
    times = []
    with progress("work", 4_000) as advance:
        for _ in range(4_000):
            clock.now += 0.125
            before = len(said.messages)
            advance()
            times += [clock.now] * (len(said.messages) - before)
    assert times == [5, 15, 35, 75, *range(135, 500, 60)]
    assert said.messages[0] == "work: 40 of 4,000, about 8 min left"
    assert said.messages[-2] == "work: 3,480 of 4,000, about 65 s left"


def test_short_work_is_silent(said):
    with progress("work", 3) as advance:
        for _ in range(3):
            advance()
    assert said.messages == []


def test_a_terminal_has_a_bar_that_vanishes(monkeypatch, caplog):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with progress("[b]work", 3) as advance:
        for _ in range(3):
            advance()
    assert "[b]work" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
    assert re.search(r"\x1b\[2K$", terminal.getvalue())
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0.2, "1 s"), (89, "89 s"), (91, "2 min"), (3_000, "50 min"), (9_000, "2.5 h")],
        *[(100_000, "28 h"), (400_000, "4.6 days"), (2_000_000, "23 days")],
    ],
)
def test_a_time_is_in_the_unit_that_people_take(seconds, text):
    assert duration(seconds) == text


def test_decoding_tells_how_far_it_is(said, monkeypatch, tmp_path):
    monkeypatch.setattr(shown, "FIRST", 0)
    rng = np.random.default_rng(0)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "1.png")
    source = image_folder(str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert said.messages == []
    assert len(source.train.images) == len(source.test.images) == 2
    assert [re.sub(", about.*", "", m) for m in said.messages] == [
        "reading: 1 of 2",
        "decoding: 1 of 2",
    ] * 2


def test_an_analysis_tells_how_many_passes_are_done(said, monkeypatch):
    monkeypatch.setattr(shown, "FIRST", 0)
    batches = [(torch.randn(4, 2), torch.tensor([0, 1, 1, 0]))] * 3
    surface = LossSurface(torch.nn.Linear(2, 2), batches)
    with stage(surface, "loss", 2):
        surface.value()
        surface.value()
    surface.value()
    assert [re.sub(", about.*", "", m) for m in said.messages] == [
        f"loss: {i} of 6" for i in (1, 2, 3, 4, 5)
    ]
