"""The documentation: its examples run, its commands compose, and what it names is there."""

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch import nn

import sam_lightning.optim.sam
from inject import forked
from reference import assert_close, batches, convnet, loader, state, trainer
from runs import summary
from sam_lightning import SAM
from sam_lightning.__main__ import COMMANDS
from sam_lightning.config.arguments import parse
from sam_lightning.config.conf import CONF, DEFAULTS, flat, top_level
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.schema import HINTS, check
from sam_lightning.config.trust import TARGETS
from sam_lightning.config.values import check_value
from sam_lightning.data import digits
from sam_lightning.optim import param_groups

ROOT = CONF.parent
TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES = {page.name: page.read_text() for page in (*TOP, *sorted(ROOT.glob("docs/*.md")))}
EXTENDING = PAGES["extending.md"]


def blocks(text, language=""):
    """What is between fences; commands have no language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    return [content for name, content in fenced if name == language]


def shell(text):
    """The lines of the commands, as they stand."""
    return "".join(blocks(text)).splitlines(keepends=True)


def lines(text):
    """Every command on a page as a list of words, those in running text too."""
    shown = "".join(blocks(text)).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`((?:python|torchrun|srun) [^`\n]+)`", text)
    return [words for line in [*shown, *inline] if (words := shlex.split(line, True))]


def arguments_of(words):
    """Those of ``train.py``, or None if that is not what is started."""
    return words[words.index("train.py") + 1 :] if "train.py" in words else None


# ------------------------------------------------------------------------------ docs/extending.md

# Blocks of code that begin with the name of their file.
FILES = [
    re.fullmatch(r"# (\w+/\S+)\n(.*)", block, re.S).groups()
    for block in [*blocks(EXTENDING, "python"), *blocks(EXTENDING, "yaml")]
]


def archive(file, images, labels):
    cuts = {"train": slice(0, 100), "val": slice(100, 140), "test": slice(140, 200)}
    named = {f"{n}_images": images[cut].numpy() for n, cut in cuts.items()}
    np.savez(file, **named, **{f"{n}_labels": labels[cut].numpy() for n, cut in cuts.items()})
    return cuts


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the project with the files of the page in it, and data for its first example."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copy(ROOT / "train.py", folder)
    shutil.copytree(CONF, folder / "conf")
    (folder / "sam_lightning").symlink_to(ROOT / "sam_lightning")
    for name, content in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        assert not (folder / name).exists()
        (folder / name).write_text(content)
    scans = digits().train
    archive(folder / "scans.npz", scans.images[:, 0], scans.labels[:, None])
    return folder


@pytest.fixture
def my_project(clone, monkeypatch):
    monkeypatch.syspath_prepend(str(clone))
    yield lambda name: importlib.import_module(f"my_project.{name}")
    for name in [name for name in sys.modules if name.startswith("my_project")]:
        del sys.modules[name]


ELSEWHERE = {"--help", "ckpt_path=RUN", "data=cifar10"}  # what needs other files, or trains nothing
EXAMPLES = [a for words in lines(EXTENDING) if (a := arguments_of(words)) and not ELSEWHERE & {*a}]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", EXAMPLES, ids=" ".join)
def test_every_example_trains(clone, my_project, tmp_path, arguments):
    # In forks of a process that has imported torch, and on few images, as the examples are many.
    options = ["--config-dir=conf", *arguments, "data.subset=100", f"hydra.run.dir={tmp_path}"]
    done = forked(clone, *options)
    assert done.returncode == 0, done.stderr
    found = summary(tmp_path)
    assert (found["status"], found["epochs"]) == ("completed", 1)
    chosen = {f"conf/{a.replace('=', '/')}.yaml" for a in arguments}
    (content,) = (content for name, content in FILES if name in chosen)
    (target,) = re.findall(r"_target_: (\S+)", content)
    assert f'"{target}"' in json.dumps(found["config"])


@pytest.mark.long
def test_the_commands_as_they_stand(clone):
    # Of those that train and start alike only the first: the test above has all of them.
    lines_here = [line for line in shell(EXTENDING) if not ELSEWHERE & {*line.split()}]
    first = {" ".join(line.split()[:3]): line for line in reversed(lines_here)}
    script = [line for line in lines_here if line in first.values()]
    trained = [line for line in script if "train.py" in line]
    assert len(trained) >= 3
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        ["bash", "-euc", "".join(script)],
        cwd=clone,
        env={**environment, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    runs = [json.loads(file.read_text()) for file in clone.glob("logs/*/runs/*/metrics.json")]
    assert [run["status"] for run in runs] == ["completed"] * len(trained)
    assert "noise" in (clone / "logs/quickstart/report/report.md").read_text()


@pytest.mark.parametrize("shape", [(8, 8), (8, 6, 3)])
@pytest.mark.parametrize("columns", [(), (1,)])
def test_the_data_set_has_the_pixels_of_the_file(my_project, tmp_path, shape, columns):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (200, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.arange(200, dtype=torch.uint8) % 7
    cuts = archive(tmp_path / "x.npz", images, labels.view(200, *columns))
    source = my_project("npz").npz(str(tmp_path / "x.npz"))
    assert source.classes == list("0123456")
    for name, cut in cuts.items():
        split = getattr(source, name)
        rows = images[cut].view(len(split), *shape[:2], -1)
        assert torch.equal(
            split.images, torch.stack([rows[..., c] for c in range(rows.shape[3])], 1)
        )
        assert split.labels.tolist() == labels[cut].tolist()
    with pytest.raises(ConfigError, match=r"data.source.file=nothing: .*No such file"):
        my_project("npz").npz("nothing")


def test_the_model_keeps_the_resolution(my_project):
    model = my_project("mobilenet").mobilenet(num_classes=7, in_channels=1, width_mult=0.5)
    images = torch.randn(2, 1, 32, 32)
    assert model.features[0](images).shape[2:] == images.shape[2:]
    assert model(images).shape == (2, 7)


def test_the_perturbation_moves_the_weights_by_rho(my_project):
    w = nn.Parameter(torch.arange(400.0).view(20, 20))
    before = w.detach().clone()
    noise = my_project("noise").RandomDirection()
    sam = SAM([w], torch.optim.SGD, rho=0.25, perturbation=noise, lr=1)
    w.grad = torch.ones_like(w)
    moves = []
    for _ in range(2):
        with sam.perturbed(zero_grad=False):
            moves.append(w.detach() - before)
            assert moves[-1].norm().item() == pytest.approx(0.25, rel=1e-4)
    assert not torch.equal(*moves)
    assert torch.equal(w, before)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_schedule_is_torchs(my_project, power):
    factor = my_project("polynomial").polynomial(20, 5, power=power)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, 20, power)
    for step in range(25):
        assert factor(step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        schedule.step()


def test_what_a_configuration_may_name():
    rows = re.findall(r"^\| `(\S+)` \| (.*?) \|", EXTENDING, re.M)
    table = {key: {*re.findall(r"`(.*?)`", packages)} for key, packages in rows}
    assert table == {key: {*packages} for key, packages in TARGETS.items()}


# ------------------------------------------------------------------------ the site, and figures


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150
    assert len(PAGES["README.md"].split()) <= 1500


def test_the_site_has_every_page_once():
    nav = re.findall(r"^ +- .*?(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = {page.name for page in ROOT.glob("docs/*.md")}
    assert sorted(nav) == sorted(pages | {"index.md", "CONTRIBUTING.md", "CHANGELOG.md"})


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path):
    pytest.importorskip("mkdocstrings_handlers.python", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SAM" in (tmp_path / "api" / "index.html").read_text()


def measured(file, spread):
    """Accuracies in % of a committed summary as the pages write them, by row of the file."""
    table = pd.read_csv(ROOT / file)
    sd, low, high = (table[f"test/acc {name}"] for name in ("sd", "low", "high"))
    spreads = {"sd": sd, "interval": (high - low) / 2}
    pairs = zip(100 * table["test/acc mean"], 100 * spreads[spread], strict=True)
    return [f"{mean:.1f} ± {half:.1f}" for mean, half in pairs]


def test_accuracies_are_those_of_the_committed_runs():
    photographs = measured("results/cifar10_label_noise/summary.csv", "interval")
    cheaper = measured("results/cifar10_cheaper_sam/summary.csv", "interval")
    digits_table = measured("results/digits_label_noise/summary.csv", "sd")
    table = PAGES["README.md"].partition("## Results")[2].partition("## The optimizer")[0]
    shown = re.findall(r"\d+\.\d ± \d+\.\d", table)
    # In the files: SGD for 20 and for 40 epochs, then SAM with rho 0.05, 0.1, 0.2, for each noise;
    # and SGD, ESAM, LookSAM with alpha 0.2 and 0.7, momentum-SAM with rho 0.3, 1, 3, SAM.
    with_noise = [photographs[5], photographs[6], cheaper[5], cheaper[2], photographs[8]]
    assert shown == [*with_noise, photographs[0], photographs[3]]
    ours = PAGES["results.md"].partition("## Measured here")[2].partition("\n## ")[0]
    of_digits, of_photographs = ours.split("### Photographs")
    of_photographs, of_finetuning = of_photographs.split("### Fine-tuning")
    of_photographs, of_cheaper = of_photographs.split("### Cheaper SAM")
    prose = "".join(line for line in of_cheaper.splitlines() if not line.startswith("|"))
    assert re.findall(r"\d+\.\d ± \d+\.\d", prose) == [cheaper[4], cheaper[6]]
    # One run each: LookSAM with rho 0.05, 0.1, 0.2, a quarter with 0.4 too, every 2nd, every 5th.
    single = [a.split()[0] for a in measured("results/cifar10_cheaper_sam_radii/summary.csv", "sd")]
    quoted = re.findall(r"\d\d\.\d(?= %)", prose.partition("than with rho 0.1:")[2])
    assert quoted[:8] == [single[i] for i in (2, 1, 5, 4, 9, 8, 12, 11)]
    assert re.findall(r"\d+\.\d ± \d+\.\d", of_digits) == digits_table
    grid = [photographs[i] for start in (0, 5, 10) for i in (start, start + 1, start + 3)]
    rows = re.findall(r"^\| (?:none|\d+ %) \| .*", of_photographs, re.M)
    accuracies = [a for row in rows for a in re.findall(r"\d+\.\d ± \d+\.\d", row)[:3]]
    assert accuracies == grid
    rows = re.findall(r"^\| (?:none|40 %) \| .*", of_finetuning, re.M)
    finetuned = [a for row in rows for a in re.findall(r"-?\d+\.\d ± \d+\.\d", row)]
    assert [*finetuned[:3], *finetuned[5:8]] == measured(
        "results/cifar10_finetune/summary.csv", "interval"
    )
    report = (ROOT / "results/cifar10_finetune/report.md").read_text()
    differences = re.findall(r"\| 5 \| ([+-][\d.]+) ± ([\d.]+) \|", report)
    assert [f"{float(mean):.1f} ± {float(half):.1f}" for mean, half in differences] == [
        *finetuned[3:5],
        *finetuned[8:],
    ]


@pytest.mark.long
@pytest.mark.slow
def test_two_runs_of_a_seed_have_the_weights_of_each_other(tmp_path):
    """The proof that CONTRIBUTING.md asks for, with two epochs of fewer images."""
    page = PAGES["CONTRIBUTING.md"]
    for arguments in filter(None, map(arguments_of, lines(page))):
        command = [sys.executable, str(ROOT / "train.py"), *arguments, "epochs=2", "data.subset=64"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (proof,) = blocks(page, "python")
    program = [sys.executable, "-c", f"import torch\n{proof}"]
    subprocess.run(program, cwd=tmp_path, check=True)
    file = tmp_path / "logs/after/checkpoints/last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] += 1
    torch.save(checkpoint, file)
    assert subprocess.run(program, cwd=tmp_path, capture_output=True).returncode == 1


# ------------------------------------------------------------------------------ what pages name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = ROOT if ROOT / page in TOP else ROOT / "docs"
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not re.match(r"https?://", target):
            file, _, heading = target.partition("#")
            assert (folder / file).exists(), target
            if not heading:
                continue
            text = (folder / file).read_text() if file else PAGES[page]
            names = re.findall(r"^#+ (.*)", text, re.M)
            anchors = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in names}
            assert heading in anchors, target


@cache
def functions_of(file):
    tree = ast.parse(next((ROOT / "tests").rglob(file)).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", ["semantics.md", "reliability.md"])
def test_tests_that_are_named_exist(page):
    named = re.findall(r"`(?:tests/)?(?:\w+/)?(?:test_)?(\w+?)(?:\.py)?::(\w+)`", PAGES[page])
    assert len(named) > 20
    missing = [(file, name) for file, name in named if name not in functions_of(f"test_{file}.py")]
    assert missing == []


def jobs(arguments):
    """The overrides of as many jobs as it takes for each value of a sweep to be in one."""
    overrides = get_args_parser().parse_args(arguments).overrides
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = [
        [f"{o.get_key_element()}={v}" for v in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [o.input_line]
        for o in parsed
    ]
    return [[v[i % len(v)] for v in values] for i in range(max(map(len, values), default=1))]


@pytest.mark.parametrize("page", PAGES)
def test_commands_compose(page, clone, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = [a for words in lines(PAGES[page]) if (a := arguments_of(words)) is not None]
    with initialize_config_dir(str(clone / "conf"), **DEFAULTS):
        for overrides in {tuple(job) for arguments in given for job in jobs(arguments)}:
            cfg = compose("train", list(overrides))
            cfg.output_dir = "run"
            files = (cfg.ckpt_path, cfg.data.get("root"), cfg.model.get("weights"))
            for path in files:  # which the reader has
                Path(path or ".").mkdir(parents=True, exist_ok=True)
            check(cfg, top_level())


@pytest.mark.parametrize("page", PAGES)
def test_other_commands_take_their_arguments(page):
    for python, m, name, *arguments in filter(lambda words: len(words) > 3, lines(PAGES[page])):
        if (python, m, name) != ("python", "-m", "sam_lightning"):
            continue
        command, *arguments = arguments
        if not arguments:  # the command is only named
            assert command in COMMANDS
            continue
        module = importlib.import_module(f"sam_lightning.{COMMANDS[command][0]}")
        if command == "study":  # takes settings of train.py too
            file, _, _ = module.arguments(arguments)
            assert file.name == "FILE" or (ROOT / file).is_file()
            continue
        settings = [a for a in arguments if "=" in a]
        if command in ("rerun", "preview", "cost"):  # take settings of train.py
            own = getattr(module, "KEYS", {})
            settings = [s for s in settings if s.partition("=")[0] not in own]
            with initialize_config_dir(str(CONF), **DEFAULTS):
                compose("train", settings)
        elif settings:
            parse(module.KEYS, settings)


def configured():
    """Every key of every file of the configuration, in dotted form."""
    for file in CONF.glob("**/*.yaml"):
        top = file.parent == CONF or "@package _global_" in file.read_text()
        node = OmegaConf.to_container(OmegaConf.load(file))
        yield from flat(node if top else {file.parent.name: node})


@pytest.mark.parametrize("page", PAGES)
def test_settings_in_running_text_exist(page):
    keys = {*configured(), *(folder.name for folder in CONF.iterdir())}
    for key, value in re.findall(r"`([a-z_][\w.]*)=([^`\s]+)`", PAGES[page]):
        if key.partition(".")[0] not in top_level():
            continue  # of another command
        assert key in keys, key
        for one in [value] if value.startswith("[") else value.split(","):
            if (CONF / key).is_dir():
                assert (CONF / key / f"{one}.yaml").exists(), f"{key}={one}"
            else:
                typed = OmegaConf.select(OmegaConf.from_dotlist([f"{key}={one}"]), key)
                check_value(key, typed, HINTS.get(key, Any))


def test_the_loop_of_the_readme():
    (code,) = (code for code in blocks(PAGES["README.md"], "python") if " SAM(" in code)
    loop_is_right(code)


def test_the_loops_of_the_optimizers_docstring():
    first, others = sam_lightning.optim.sam.__doc__.split("The same in two other forms")
    loop = textwrap.dedent(first[first.index("    optimizer = SAM") :])
    loop_is_right(loop)
    in_two, with_closure = others.split("\n\n")[1:3]  # both as far in as the body of the loop
    start, _, second_pass = loop.partition("    with optimizer")
    assert second_pass
    loop_is_right(f"from sam_lightning import frozen_running_stats\n{start}{in_two}")
    head, _, _ = start.partition("    loss_fn(")
    closure = "    def closure():\n        loss = loss_fn(model(x), y)\n        loss.backward()\n"
    loop_is_right(f"{head}{closure}        return loss\n{with_closure}")


def test_the_groups_of_the_page_and_of_their_docstring():
    (page,) = blocks(PAGES["parameter_groups.md"], "python")
    above = "from sam_lightning import SAM\nfrom sam_lightning.optim.param_groups import *\n"
    example = textwrap.dedent(param_groups.__doc__.partition("\n\n")[2].partition("\n\nA ")[0])
    for code, groups in ((page, 4), (above + example, 6)):
        names = {"model": convnet(), "torch": torch}
        exec(code, names)
        assert len(names["optimizer"].param_groups) == groups


LOOPS = [
    (heading, block)
    for section in PAGES["loops.md"].split("\n## ")[1:]
    for heading in [section.partition("\n")[0]]
    for block in blocks(section, "python")
]


@pytest.fixture
def one_process(tmp_path):
    """What DistributedDataParallel and accelerate leave in the process is undone."""
    store = dist.FileStore(str(tmp_path / "store"))
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.compiler.reset()


@pytest.mark.parametrize(("heading", "code"), LOOPS, ids=lambda text: text.splitlines()[0])
def test_the_loops_of_the_page(heading, code, one_process):
    if heading == "accelerate":  # it starts a process group of its own
        dist.destroy_process_group()
    optimizer = blocks(PAGES["loops.md"], "python")[0]
    if "class Module" in code:
        code += "\ntrainer(max_epochs=1).fit(Module(), loader(batches))\n"
    loop_is_right(f"{optimizer}\n{code}")


def test_the_page_has_every_loop():
    table = re.findall(r"^\| \[.*?\]\(#(\S+)\) \|", PAGES["loops.md"], re.M)
    assert len(table) == 11
    assert len(LOOPS) == 13  # a closure, a GradScaler and DDP have two, FSDP2 has none


def loop_is_right(code):
    """Weights and running statistics of three batches are those of SAM's formulas."""
    data = batches([8, 6, 7])
    ours, theirs = convnet(), convnet()
    names = {"torch": torch, "SAM": SAM, "loss_fn": nn.CrossEntropyLoss()}
    names |= {"trainer": trainer, "loader": loader}
    exec(code, {**names, "model": ours, "batches": data})
    momentum = {}
    for x, y in data:
        w = {name: p.detach().clone() for name, p in theirs.named_parameters()}
        grads = torch.autograd.grad(names["loss_fn"](theirs(x), y), list(theirs.parameters()))
        statistics = {name: b.clone() for name, b in theirs.named_buffers()}
        norm = torch.cat([g.flatten() for g in grads]).norm()
        with torch.no_grad():
            for p, g in zip(theirs.parameters(), grads, strict=True):
                p += 0.05 * g / norm
        grads = torch.autograd.grad(names["loss_fn"](theirs(x), y), list(theirs.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(theirs.named_parameters(), grads, strict=True):
                momentum[name] = 0.9 * momentum.get(name, 0) + g
                p.copy_(w[name] - 0.1 * momentum[name])
            for name, b in theirs.named_buffers():
                b.copy_(statistics[name])
    assert_close(state(ours), state(theirs), atol=1e-10, rtol=0)
    assert ours.bn1.num_batches_tracked == len(data)


@pytest.mark.long
def test_the_notebook_runs(tmp_path):
    """Every cell in turn, in a copy of the project, with shorter runs."""
    notebook = json.loads((ROOT / "docs/tour.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    code = "\n".join(cells)
    assert code.count('"ckpt_path=last"') == 1
    assert code.count('"images=256"') == 1
    code = code.replace('"ckpt_path=last"', '"ckpt_path=last", "epochs=2", "data.subset=100"')
    code = code.replace('"images=256"', '"images=32"')
    (tmp_path / "tour.py").write_text(f"{code}\nprint('end of', len(figure.axes), 'pictures')\n")
    for name in ("train.py", "conf", "sam_lightning"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "tour.py"],
        cwd=tmp_path,
        env={**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "end of 8 pictures" in done.stdout
    assert len(re.findall(r"S[GA][DM]: test accuracy \d+\.\d %", done.stdout)) == 2
    assert {f.name for f in (tmp_path / "logs/tour").iterdir()} > {"sgd", "sam"}
