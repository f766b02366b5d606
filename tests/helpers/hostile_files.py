"""Files as no run writes them: bombs, odd kinds of files, random mutations of good ones."""

import copy
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Texts that a terminal, a document, a spreadsheet, a shell or a parser could obey.
TEXTS = (
    "![x](http://example.org/x.png)",
    "[c](javascript:alert(1))",
    "<img src=x onerror=alert(1)>",
    "=cmd|' /C calc'!A0",
    "@SUM(1+1)",
    "+1+1",
    "-2+3",
    "\x1b]0;title\x07\x1b[2J",
    "a\nb\r\nc\x85d\u2028e",
    "[/b][bold]x[/]",
    "\u202etxt.exe\u2066",
    "\ud800 lone",
    "a|b`c*d_e~f$g",
    "# head",
    "\\input{/etc/passwd} $x^2$ \\end{tabular}",
    "../../../x",
    "/tmp/x",
    "~/x",
    "${oc.env:HOME}",
    "\0",
    "",
    "x" * 5000,
)
VALUES: tuple[Any, ...] = (
    *TEXTS,
    *(None, True, -1, 0, 1, 10**30, -(10**30), 10**400, 2**63, 1e308, float("nan"), float("inf")),
    *([], {}, [[]], [None], {"": {}}, {"x": [1, "y"]}, ["a", 1]),
)


def mutated(content: Any, draw: random.Random, values: tuple[Any, ...] = VALUES) -> Any:
    """A copy with one value, anywhere inside, replaced, removed, renamed or put twice."""
    content = copy.deepcopy(content)
    places = [*_places(content)]
    holder, key = draw.choice(places)
    how = draw.randrange(5)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[draw.choice(TEXTS)] = holder.pop(key)
    elif how == 2 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = copy.deepcopy(draw.choice(values))
    return content


def _places(content: Any) -> Any:
    keys = content if isinstance(content, dict) else range(len(content))
    for key in [*keys]:
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _places(content[key])


def odd_files(folder: Path) -> dict[str, Callable[[Path], None]]:
    """Ways to put something that is no regular file, or is too large, at a path."""

    def sparse(path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(50 * 2**30)

    return {
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": Path.mkdir,
        "dangling": lambda path: path.symlink_to(folder / "nowhere"),
        "sparse": sparse,
    }


# ------------------------------------------------------------------------------------ checkpoints


def with_entry(good: Path, into: Path, name: str, content: bytes, **options: Any) -> Path:
    """A copy of a checkpoint's archive in which the entry that ends with ``name`` is another."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(into, "w", **options) as new:
        for entry in old.infolist():
            new.writestr(
                entry.filename, content if entry.filename.endswith(name) else old.read(entry)
            )
    return into


def bombs(good: Path, folder: Path) -> dict[str, Path]:
    """Checkpoints that are small and ask for much memory or time."""
    folder.mkdir(exist_ok=True)
    made: dict[str, Path] = {}

    def changed(name: str, change: Callable[[dict[str, Any]], Any]) -> None:
        checkpoint = torch.load(good, weights_only=True)
        change(checkpoint)
        made[name] = folder / f"{name}.ckpt"
        torch.save(checkpoint, made[name])

    def model(**arguments: Any) -> Callable[[dict[str, Any]], None]:
        return lambda c: c["hyper_parameters"]["model"].update(arguments)

    deep = {"_target_": "sam_lightning.models.WideResNet", "depth": 600_004, "widen_factor": 190}
    changed("deep", lambda c: c["hyper_parameters"].update(model=deep | _shape(c)))
    deeper = {"_target_": "sam_lightning.models.PyramidNet", "depth": 6 * 10**17 + 2, "alpha": 10}
    changed("deeper", lambda c: c["hyper_parameters"].update(model=deeper | _shape(c)))
    changed("wide", model(width=3000))
    changed("widest", model(width=10**12))
    changed("expanded", lambda c: (model(width=3000)(c), _expand(c["state_dict"], 3000)))
    changed("nothing", lambda c: _replace(c, lambda w: torch.empty(w.shape, device="meta")))
    changed("sparse", lambda c: _replace(c, torch.Tensor.to_sparse))
    changed("laughs", lambda c: c["hyper_parameters"].update(x=_doubled(60)))
    changed("letters", lambda c: c["hyper_parameters"].update(classes=["x" * 10**5] * 10_000))
    changed("nested", lambda c: c["hyper_parameters"].update(x=_nested(400)))
    changed("number", lambda c: c["hyper_parameters"]["model"].update(in_channels=10**6000))
    changed("huge", lambda c: c["hyper_parameters"].update(image_size=[10**6, 10**6]))
    changed("itself", lambda c: c["hyper_parameters"].update(x=c["hyper_parameters"]))
    changed("list", lambda c: c.update(state_dict=[1, 2]))
    changed("names", lambda c: c.update(state_dict={1: torch.zeros(1)}))
    changed("alone", lambda c: c.update(hyper_parameters=[]))
    zeros = bytes(2**27)
    for name, entry, content, packing in [
        ("marks", "data.pkl", b"\x80\x02" + b"(" * 10_000_000, zipfile.ZIP_STORED),
        ("lists", "data.pkl", b"\x80\x02" + b"]" * 10_000_000, zipfile.ZIP_STORED),
        ("packed", "data/0", zeros, zipfile.ZIP_DEFLATED),
        ("packed_marks", "data.pkl", b"\x80\x02" + b"(" * 10_000_000, zipfile.ZIP_DEFLATED),
    ]:
        made[name] = folder / f"{name}.ckpt"
        with_entry(good, made[name], entry, content, compression=packing)
    os.mkfifo(folder / "pipe.ckpt")
    made["pipe"] = folder / "pipe.ckpt"
    return made


def _shape(checkpoint: dict[str, Any]) -> dict[str, Any]:
    model = checkpoint["hyper_parameters"]["model"]
    return {key: model[key] for key in ("num_classes", "in_channels")}


def _replace(checkpoint: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    checkpoint["state_dict"] = {k: change(w) for k, w in checkpoint["state_dict"].items()}


def _expand(weights: dict[str, torch.Tensor], width: int) -> None:
    """Shapes as of a wider model, with one number for all of a weight."""
    for name, weight in weights.items():
        shape = [size * width // 4 if size % 4 == 0 else size for size in weight.shape]
        weights[name] = weight.flatten()[:1].view([1] * len(shape)).expand(shape)


def _doubled(times: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(times):
        value = [value, value]
    return value


def _nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value
