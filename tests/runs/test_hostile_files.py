"""Files of strangers: bombs, odd kinds of files, places outside of the run, random mutations."""

import csv
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

from commands import TRAIN, assert_refused, serve
from hostile_files import TEXTS, bombs, mutated, odd_files
from image_files import one_line_error
from inject import forked
from runs import SMALL, command, run, summary
from sam_lightning.analysis import landscape
from sam_lightning.config.conf import top_level
from sam_lightning.config.errors import ConfigError, one_line_errors
from sam_lightning.config.text import clean
from sam_lightning.config.trust import PLACE
from sam_lightning.inference import evaluate, export
from sam_lightning.inference.load import load
from sam_lightning.runs.resume import replayable
from sam_lightning.studies.report.command import main as report
from trained_runs import NOISY, changed, digits_run, last

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def light():
    yield from serve("sam_lightning.cli")


# ------------------------------------------------------------------------------------ checkpoints


@pytest.mark.slow
def test_bombs_are_refused_before_they_take_time_or_memory(folder, tmp_path):
    load(last(folder))  # what it loads once
    for name, path in bombs(last(folder), tmp_path / "bombs").items():
        before, started = _peak(), time.process_time()
        for reader in (load, lambda p: evaluate.main([f"ckpt_path={p}"])):
            message = one_line_error(reader, path)
            assert message.startswith(f"ckpt_path={path}: "), name
            assert len(message) < 1000, name
        assert time.process_time() - started < 5, name
        assert _peak() - before < 300 * MEBIBYTE, name


def refusal(function, *args) -> str:
    """The message of a ``ConfigError``, or nothing where there is none."""
    try:
        function(*args)
    except ConfigError as error:
        return str(error)
    return ""


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_run_that_asks_for_a_large_model_is_refused_before_it_is_built(folder, tmp_path):
    path = bombs(last(folder), tmp_path / "bombs")["wide"]
    changed(path, path, lambda c: c.pop("settings"))
    before = _peak()
    given = ["model.width=3000", f"ckpt_path={path}"]
    message = one_line_error(run, tmp_path / "run", *NOISY, *given)
    assert message.startswith(f"ckpt_path={path}: weights are not of ")
    assert _peak() - before < 300 * MEBIBYTE


@pytest.mark.parametrize("part", ["loops", "optimizer_states"])
def test_a_checkpoint_that_lightning_cannot_use_is_named(folder, tmp_path, part):
    shutil.copytree(folder, own := tmp_path / "run")
    (own / "metrics.csv").write_text("epoch,step,x\n0,,1\n0,y,1,2,3\n")
    changed(last(folder), last(own), lambda c: c.update({part: ["x"]}))
    message = one_line_error(run, own, *NOISY, "epochs=2", f"ckpt_path={last(own)}")
    said = ("no run can continue from it (", "cannot be continued (")
    assert message.startswith(tuple(f"ckpt_path={last(own)}: {how}" for how in said))


@pytest.mark.parametrize("wrong", ["text", [1], {}, torch.zeros(3, 5, 7), torch.zeros(1)], ids=str)
def test_an_optimizer_state_that_no_step_can_use_is_refused(folder, tmp_path, wrong):
    shutil.copytree(folder, own := tmp_path / "run")
    before = (own / "metrics.json").read_bytes()

    def change(checkpoint):
        checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"] = wrong

    changed(last(folder), last(own), change)
    message = one_line_error(run, own, *NOISY, "epochs=2", f"ckpt_path={last(own)}")
    assert message.startswith(f"ckpt_path={last(own)}: cannot be continued (optimizer: ")
    assert (own / "metrics.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), [("ASGD", "ax"), ("Adafactor", "row_var")])
def test_so_is_that_of_an_optimizer_that_reads_its_numbers(tmp_path, name, part):
    own = [f"optimizer._target_=torch.optim.{name}", "~optimizer.momentum", "~optimizer.nesterov"]
    own += ["~optimizer.fused", "epochs=2"]
    run(tmp_path / "run", *own, "epochs=1")
    path = last(tmp_path / "run")

    def change(checkpoint):
        checkpoint["optimizer_states"][0]["state"][0][part] = torch.zeros(3, 5, 7)

    changed(path, broken := path.with_name("broken.ckpt"), change)
    message = one_line_error(run, tmp_path / "run", *own, f"ckpt_path={broken}")
    assert message.startswith(f"ckpt_path={broken}: cannot be continued (optimizer: ")
    run(tmp_path / "run", *own, f"ckpt_path={path}")
    assert summary(tmp_path / "run")["epochs"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("place", ["landscape", "tensorboard"])
def test_a_command_writes_to_no_link_out_of_a_run(folder, tmp_path, place):
    shutil.copytree(folder, own := tmp_path / "run")
    (victim := tmp_path / "victim").mkdir()
    (victim / "landscape.json").write_text("mine")
    shutil.rmtree(own / place, ignore_errors=True)
    (own / place).symlink_to(victim)
    given = [f"ckpt_path={own}", "kind=1d", "points=3", "images=20"]
    message = one_line_error(landscape.main, given)
    assert message.startswith(f"{own / place}")
    assert "leads out of the run's folder" in message
    assert [(p.name, p.read_text()) for p in victim.iterdir()] == [("landscape.json", "mine")]
    shutil.rmtree(own / "checkpoints")
    (own / "checkpoints").symlink_to(folder / "checkpoints")
    message = one_line_error(export.main, [f"ckpt_path={own}", "format=pt2"])
    assert message.startswith(f"{own / 'checkpoints' / 'last.pt2'}: leads out of the run's folder")
    assert not (folder / "checkpoints" / "last.pt2").exists()


def test_weights_outlive_their_file(folder, tmp_path):
    path = tmp_path / "a.ckpt"
    shutil.copy(last(folder), path)
    model, expected = load(path), load(last(folder))
    os.truncate(path, 0)  # in place; a process that still reads from the file would die
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


@pytest.mark.parametrize("seed", range(20))
def test_mutated_checkpoints_end_well_or_in_one_line(folder, tmp_path, monkeypatch, capsys, seed):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(seed)

    def change(checkpoint):
        parts = {key: checkpoint[key] for key in ("hyper_parameters", "global_step")}
        if draw.random() < 0.2:
            parts["state_dict"] = dict(checkpoint["state_dict"])
        kept = checkpoint.keys() - parts.keys()
        parts = mutated(parts, draw)
        for key in [*checkpoint]:
            if key not in kept:
                del checkpoint[key]
        checkpoint.update(parts)

    path = changed(last(folder), tmp_path / "a.ckpt", change)
    assert "\n" not in refusal(evaluate.main, [f"ckpt_path={path}", f"out={tmp_path}/out"])
    assert {p.name for p in tmp_path.iterdir()} <= {"a.ckpt", "out"}


# ----------------------------------------------------------------------------------- run folders

OUTSIDE = [
    "callbacks.last.dirpath={victim}",
    "callbacks.last.dirpath=victim",
    "callbacks.best.filename=../../x",
    "callbacks.best.filename={victim}/last",
    "callbacks.best.filename=${{data.root}}",
    "callbacks.best.filename=a${{lr}}",
    "+callbacks.best.dirpath=${{output_dir}}2",
    "+callbacks.best.dirpath=${{output_dir}}/../../x",
    "+callbacks.best.dirpath=${{output_dir}}/${{lr}}",
    "+callbacks.best={{dirpath:{victim}}}",
    "+callbacks.x={{_target_:lightning.pytorch.callbacks.ModelCheckpoint,dirpath:victim}}",
    "logger.csv.root_dir={victim}",
    "logger.csv.root_dir='~/x'",
    "logger.csv.root_dir=${{data.root}}",
    "logger.tensorboard.save_dir=file://{victim}",
    "logger.tensorboard.name=../x",
    "logger.tensorboard.version={victim}",
    "+logger.tensorboard.sub_dir=local::{victim}",
    "data.source.cache_dir={victim}",
    "data.cache_dir={victim}",
    "data.cache_dir=victim",
    "task_name=../../x",
    "+trainer.default_root_dir={victim}",
    "+trainer.profiler={{dirpath:{victim}}}",
]


def stored(folder: Path, overrides: object) -> Path:
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    return folder / ".hydra" / "overrides.yaml"


@pytest.mark.parametrize("override", OUTSIDE)
def test_a_stored_setting_names_no_place_outside_of_the_run(tmp_path, override):
    override = override.format(victim=tmp_path / "victim")
    file = stored(tmp_path / "run", ["rho=0.1", "data.root=/mine", override])
    message = one_line_error(replayable, file, top_level())
    assert message.startswith(f"{file}: ")
    assert message.endswith("may name a place to write to outside of the run")
    key = override.lstrip("+").partition("=")[0]
    assert "++data.download=false" in replayable(file, top_level(), [key])  # typed, it may


def test_a_place_in_the_run_and_one_that_is_read_are_replayed(tmp_path):
    own = [
        f"+callbacks.best.dirpath={tmp_path / 'run' / 'best'}",
        "+callbacks.best.dirpath=${output_dir}/best",
        "callbacks.best.filename='{epoch}-best'",
        "callbacks.best.monitor=val/loss",
        "optimizer.lr=${lr}",
        "data.image_size=24",
        "data.root='/a b/c'",
    ]
    file = stored(tmp_path / "run", own)
    assert replayable(file, top_level()) == [*own, "++data.download=false"]


def test_places_of_lightning_and_ours_are_known_by_name():
    import inspect

    from lightning.pytorch import callbacks, loggers

    from sam_lightning.training.callbacks import last_checkpoint, progress

    found = set()
    for module in (callbacks, loggers, last_checkpoint, progress):
        for made in vars(module).values():
            if inspect.isclass(made) and made.__init__ is not object.__init__:
                for name, parameter in inspect.signature(made).parameters.items():
                    if re.search(r"Path|PathLike", str(parameter.annotation)) or "dir" in name:
                        found.add(name)
    assert {"dirpath", "save_dir", "root_dir"} <= found
    assert all(PLACE.search(name) for name in found), found


@pytest.mark.parametrize(
    "override", ["callbacks.last.dirpath={victim}", "logger.csv.root_dir={victim}"]
)
def test_resuming_in_a_foreign_folder_overwrites_nothing(light, tmp_path, override):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "last.ckpt").write_text("mine")
    stored(tmp_path / "run", [override.format(victim=victim)])
    result = light(tmp_path, f"ckpt_path={tmp_path / 'run'}")
    assert_refused(result, "may name a place to write to outside of the run")
    assert not result.torch
    assert [p.read_text() for p in victim.iterdir()] == ["mine"]


def linked(run: Path, victim: Path) -> None:
    (run / "checkpoints" / "last.ckpt").unlink()
    (run / "checkpoints").rmdir()
    (run / "checkpoints").symlink_to(victim)


def test_a_link_out_of_a_run_is_not_written_to(light, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "last.ckpt").write_text("mine")
    stored(tmp_path / "run", [])
    linked(tmp_path / "run", victim)
    result = light(tmp_path, f"ckpt_path={tmp_path / 'run'}")
    assert_refused(result, f"{tmp_path / 'run' / 'checkpoints'}: leads out of the run's folder")
    assert (victim / "last.ckpt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling", "sparse"])
def test_stored_overrides_are_read_from_a_regular_file(tmp_path, kind):
    file = stored(tmp_path / "run", [])
    file.unlink()
    odd_files(tmp_path)[kind](file)
    assert one_line_error(replayable, file, top_level())


def test_stored_overrides_cannot_grow_or_hide(tmp_path):
    file = stored(tmp_path / "run", [])
    laughs = "\n".join(f"- &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(30))
    for text in (
        f"- &a0 [x]\n{laughs}",
        "- &a 'rho=1,2'\n" + "- *a\n" * 10_000,
        "- " + "[" * 10_000,
        "- rho=" + "[" * 10_000,
        "- 'rho=" + "(" * 10_000 + "'",
        "- 'rho=" + "1" * 60_000 + "'",
        "- 'rho=" + "a," * 1_000 + "'",
        "- 'data.mean=[" + "1," * 30_000 + "1]'",
        "- 'hydra.x=[" + "1," * 2_000 + "1]'",
        "\x00",
        "- !!python/object/apply:os.mkdir [/tmp/x]",
    ):
        file.write_text(text)
        started = time.perf_counter()
        assert one_line_error(replayable, file, top_level())
        assert time.perf_counter() - started < 5, text[:50]


def test_mutated_overrides_are_replayed_or_refused(tmp_path):
    good = ["rho=0.1", "data=digits", "callbacks.best=null", "+trainer.max_steps=3", "lr=1e-2"]
    file = stored(tmp_path / "run", good)
    for seed in range(80):
        draw = random.Random(seed)
        overrides = mutated(good, draw)
        if draw.random() < 0.7:  # a value rather than a line
            i = draw.randrange(len(good))
            overrides = [*good]
            overrides[i] = (
                f"{draw.choice([good[i].partition('=')[0], *OUTSIDE])}={draw.choice(TEXTS)}"
            )
        file.write_text(yaml.safe_dump(overrides))
        assert "\n" not in refusal(replayable, file, top_level())


# ---------------------------------------------------------------------------------------- reports


def leave(folder: Path, seed: int = 0, **changed: object) -> Path:
    config = {
        "seed": seed,
        "epochs": 2,
        "method": {"name": "sam", "rho": 0.1},
        "model": {"_target_": "sam_lightning.models.SAMResNet18", "width": 4},
        "data": {"source": {"_target_": "sam_lightning.data.digits"}},
        "callbacks": {"x": {"_target_": "a.B", "list": [1, 2]}},
    }
    summary = {
        "status": "completed",
        "metrics": {"test/acc": 0.5, "val/acc": 0.5, "test/loss": 0.1},
        "train_seconds": 10.0,
        "images_per_second": 500.0,
        "epochs": 2,
        "device": "cpu",
        "config": config,
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(summary | changed))
    (folder / "metrics.csv").write_text("epoch,step,train/loss,val/acc\n0,5,1.5,\n0,5,,0.5\n")
    return folder


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling", "sparse"])
@pytest.mark.parametrize("name", ["metrics.json", "metrics.csv"])
def test_a_report_reads_regular_files_only(tmp_path, capsys, kind, name):
    leave(tmp_path / "good")
    odd = leave(tmp_path / "odd", seed=1) / name
    odd.unlink()
    odd_files(tmp_path)[kind](odd)
    started, before = time.perf_counter(), _peak()
    report([str(tmp_path), "formats=png" if name == "metrics.csv" else "formats=null"])
    assert time.perf_counter() - started < 20
    assert _peak() - before < 600 * MEBIBYTE
    assert ("1 runs" in capsys.readouterr().out) == (name == "metrics.json")


def test_a_report_does_not_follow_links_to_anywhere(tmp_path, capsys):
    leave(tmp_path / "sweep" / "good")
    leave(tmp_path / "other" / "run", seed=1)
    leave(tmp_path / "far" / "away" / "run", seed=2)
    (tmp_path / "sweep" / "one").symlink_to(tmp_path / "other" / "run")
    (tmp_path / "sweep" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "sweep" / "around").symlink_to(tmp_path / "sweep")
    report([str(tmp_path / "sweep"), "formats=null"])
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].startswith("2 runs")
    link = tmp_path / "sweep" / "far"
    said_of_it = "is a link and not followed; name it to count runs there"
    assert said.err == f"warning: {link}: {said_of_it}\n"


def test_mutated_results_end_well_or_in_one_line(tmp_path, capsys):
    for seed in range(25):
        folder, draw = tmp_path / str(seed), random.Random(seed)
        for i in range(3):
            file = leave(folder / f"{i}", seed=i % 2) / "metrics.json"
            content = json.loads(file.read_text())
            for _ in range(draw.randrange(3)):
                content = mutated(content, draw)
            file.write_text(json.dumps(content))
        assert "\n" not in refusal(report, [str(folder), "formats=null"])
        said = capsys.readouterr()
        assert (said.out + said.err).replace("\n", "").isprintable()


# ------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_is_obeyed(text):
    for form in ("terminal", "markdown", "latex", "csv"):
        assert clean(text, form).isprintable()
    html = MarkdownIt("commonmark").enable("table").render(f"- {clean(text, 'markdown')}")
    assert {*re.findall(r"<(\w+)", html)} <= {"ul", "li"}
    row = f"| a | b |\n| --- | --- |\n| {clean(text, 'markdown')} | 1 |"
    html = MarkdownIt("commonmark").enable("table").render(row)
    assert {*re.findall(r"<(\w+)", html)} <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert html.count("<td") == 2
    assert not re.search(r"(?<!\\)[:](?=//)", clean(text, "markdown"))
    cell = clean(text, "csv")
    assert cell.lstrip()[:1] not in ("=", "+", "-", "@") or cell == ""
    set_ = clean(text, "latex")
    assert set_.count("{") - set_.count(r"\{") == set_.count("}") - set_.count(r"\}")
    assert not re.search(r"\\(?!textbackslash\{\}|textascii|pm|[&%$#_{}])", set_)


@pytest.mark.parametrize("number", ["-1", "+1.5", "-1e-3", "-inf", "0", "1,000"])
def test_numbers_stay_numbers(number):
    assert clean(number, "csv") == number
    assert clean(number, "markdown") == number


@pytest.mark.parametrize(
    "text", ["照片", "שלום", "می‌خواهم", "👩‍💻", "a-b", "batch 3", "R&D", "x.y"]
)
def test_harmless_texts_stay_as_they_are(text):
    for form in ("terminal", "markdown", "csv"):
        assert clean(text, form) == text


def test_a_hostile_study_is_shown_and_written_as_text(tmp_path, capsys):
    for i, text in enumerate(TEXTS):
        model = {"_target_": "a.B", "note": text}
        leave(
            tmp_path / "in" / f"{i}", config={"seed": 0, "model": model, "method": {"name": text}}
        )
    failed = {"status": "failed", "exit_reason": TEXTS[0]}
    leave(tmp_path / "in" / "`![x](http://example.org/y.png)", **failed)
    report([str(tmp_path / "in"), f"out={tmp_path / 'out'}", "formats=null"])
    said = capsys.readouterr()
    assert (said.out + said.err).replace("\n", "").isprintable()
    html = MarkdownIt("commonmark").enable("table").render((tmp_path / "out/report.md").read_text())
    allowed = {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "strong"}
    assert {*re.findall(r"<(\w+)", html)} <= allowed
    for name in ("report.csv", "summary.csv"):
        with open(tmp_path / "out" / name, newline="", errors="surrogateescape") as file:
            for row in csv.reader(file):
                assert not [cell for cell in row if cell[:1] in tuple("=+-@") and cell]


def test_names_of_classes_and_files_are_shown_as_text(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = [text for text in TEXTS if text][:10]
    path = changed(
        last(folder), tmp_path / "a.ckpt", lambda c: c["hyper_parameters"].update(classes=names)
    )
    from PIL import Image

    from sam_lightning.inference import predict

    Image.new("L", (32, 32)).save("=1+1.png")
    Image.new("L", (32, 32)).save("[b]\x1b[2J.png")
    for form in ("csv", "table"):
        predict.main([f"ckpt_path={path}", "input=.", f"format={form}", "top_k=10"])
        shown = capsys.readouterr().out
        assert shown.replace("\n", "").isprintable()
        assert "[/b][bold]x[/]" in shown.replace("│", "") or form == "table"
        if form == "csv":
            rows = [*csv.DictReader(shown.splitlines())]
            assert {row["file"][0] for row in rows} == {"'", "["}
            assert all(0 <= float(row["probability"]) <= 1 for row in rows)
            assert not [row for row in rows if row["class"][:1] in tuple("=+-@")]


def test_a_folder_may_be_called_as_markup_is(tmp_path):
    folder = tmp_path / "[b]x[" / "b]"
    run(folder, "epochs=1", "test=false")
    assert json.loads((folder / "metrics.json").read_text())["status"] == "completed"


# ----------------------------------------------------------------------------- pipes and signals


def piped(cwd: Path, line: str) -> tuple[list[int], str]:
    """Exit codes of a pipeline and what it wrote to stderr."""
    script = f"{line}; echo ${{PIPESTATUS[*]}} >&3"
    read_end, write_end = os.pipe()
    environment = os.environ | {"PY": sys.executable, "TRAIN": str(TRAIN)}
    done = subprocess.run(
        ["bash", "-c", f"exec 3>&{write_end}; {script}"],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        pass_fds=[write_end],
    )
    os.close(write_end)
    with open(read_end) as codes:
        return [*map(int, codes.read().split())], done.stderr


def test_a_closed_pipe_is_no_error(tmp_path):
    leave(tmp_path / "logs" / "run")
    for line in (
        "$PY $TRAIN --help | head -1",
        "$PY -u $TRAIN --help | head -1",
        "$PY -m sam_lightning report logs formats=null | true",
        "$PY $TRAIN --cfg job | true",
    ):
        codes, errors = piped(tmp_path, line)
        assert (codes[0], errors) == (0, ""), line


@pytest.mark.long
@pytest.mark.parametrize(
    "devices", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.long)]
)
def test_a_closed_pipe_decides_no_status(tmp_path, devices):
    small = " ".join([*SMALL, "epochs=1", f"trainer.devices={devices}"])
    codes, errors = piped(tmp_path, f"$PY $TRAIN -m seed=0,1 {small} | true")
    assert (codes[0], errors) == (0, "")
    (sweep,) = tmp_path.glob("logs/train/multiruns/*")
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["completed"] * 2


def with_hook(cwd: Path, module: str, name: str, first: str) -> subprocess.CompletedProcess[str]:
    """``train.py`` in which a function of a module begins with ``first``."""
    code = f"""
import errno, importlib, os, runpy, signal, sys
module = importlib.import_module("{module}")
original = module.{name}
def hooked(*args, **kwargs):
    {first}
    return original(*args, **kwargs)
module.{name} = hooked
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", code, str(TRAIN), *SMALL]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_ctrl_c_while_composing_is_one_line(tmp_path):
    interrupted = "os.kill(os.getpid(), signal.SIGINT)"
    loader = "hydra._internal.config_loader_impl", "ConfigLoaderImpl.load_configuration"
    done = with_hook(tmp_path, *loader, interrupted)
    assert (done.returncode, done.stderr) == (130, "error: stopped by SIGINT\n")
    assert [*tmp_path.iterdir()] == []


def test_errors_of_the_system_are_one_line(folder, tmp_path, capsys):
    long = "x" * 3000
    for wrong in ([f"ckpt_path={folder}", f"out={long}"], [f"ckpt_path={long}"]):
        with pytest.raises(SystemExit) as ended, one_line_errors():
            evaluate.main(wrong)
        said = capsys.readouterr().err
        assert ended.value.code in (1, 2)
        assert said.startswith("error: ")
        assert said.endswith("File name too long\n")
        assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["io_error", "gone"])
def test_a_run_that_cannot_write_ends_in_one_line(tmp_path, fault):
    done = forked(tmp_path, *SMALL, "epochs=1", fault=(fault, "save:1"))
    assert re.fullmatch(r"error: \[Errno .*\n", done.stderr), done.stderr
    assert done.returncode == 1
    (folder,) = tmp_path.glob("logs/train/runs/*")
    assert summary(folder)["status"] == "failed"


def test_a_disk_that_is_full_at_the_start_is_one_line(tmp_path):
    failed = 'raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/file")'
    done = with_hook(tmp_path, "hydra.core.utils", "_save_config", failed)
    assert (done.returncode, done.stderr) == (1, "error: /a/file: No space left on device\n")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.long
@pytest.mark.slow
def test_every_process_needs_an_image_to_evaluate(tmp_path):
    done = command(tmp_path, *SMALL, "data.val_size=1", "trainer.devices=2", "batch_size=50")
    assert (done.returncode, done.stderr) == (
        2,
        "error: data.val_size: has 1 images for 2 processes\n",
    )
