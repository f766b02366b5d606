"""The command ``evaluate``: how good a checkpoint is, by class and under corruption."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sam_lightning.config.arguments import Keys, parse
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.process import importing
from sam_lightning.config.progress import progress
from sam_lightning.config.text import clean
from sam_lightning.config.values import Count, Rule
from sam_lightning.inference import command
from sam_lightning.runs.files import checkpoint_file, replacing, run_folder, write_json
from sam_lightning.runs.terminal import show

if TYPE_CHECKING:
    from torch import Tensor

    from sam_lightning.data.corruptions import CorruptedImages
    from sam_lightning.data.source import Split
    from sam_lightning.inference.load import TrainedClassifier

ABOUT = """
Evaluate a checkpoint on the data of its run.

python -m sam_lightning evaluate ckpt_path=RUN/checkpoints/best.ckpt
python -m sam_lightning evaluate ckpt_path=RUN corruptions=CIFAR-10-C device=cuda

Prints the loss (mean negative log-likelihood, natural logarithm), the accuracy, that among the 5
most likely of 10 or more classes, the balanced accuracy (mean of the classes' accuracies), the
macro F1 score, the expected calibration error (15 bins), and the accuracy of each class. With
corruptions=FOLDER also the accuracy under the 15 corruptions of CIFAR-10-C or CIFAR-100-C at 5
severities, and the mean corruption error: a plain mean over corruptions, not divided by another
model's.
Writes evaluation.json, confusion_matrix.csv (rows: true classes, columns: predictions) and
predictions.csv: a row for each image with its file name (or its index in the split), label,
prediction and the probability of that; then the probability of each class, or from 21 classes on
the 5 most likely.

Computed in float32, on one device: equal to the run's own test if it was computed so too.
"""

SplitName = Literal["test", "val", "train"]
Files = Annotated[str, Rule("a folder, as in CIFAR-10-C", bool)]
KEYS: Keys = {
    **command.CKPT_PATH,
    "split": ("test", SplitName, "test, val or train as the run had them, wrong labels included"),
    **command.ROOT,
    "batch_size": (None, Count | None, "null: as in the run's evaluation"),
    **command.DEVICE,
    "corruptions": (None, Files | None, "with labels.npy, gaussian_noise.npy and the others"),
    **command.OUT,
}

SHOWN = 20  # classes in the printed table; evaluation.json has all
EACH = 20  # with more classes, predictions.csv has only the most likely
TOP = 5


def evaluate(trained: TrainedClassifier, split: Split, batch_size: int = 512) -> dict[str, Any]:
    """Loss, accuracies, calibration and confusion matrix of a model on a split, on its device.

    Returns:
        ``predicted``: class of each image, int64 N; ``likely``: probabilities and classes of the
        most likely, float32 and int64, N x ``TOP``, or N x classes if they are at most ``EACH``;
        ``loss``: mean negative log-likelihood; ``acc``: fraction that is right; ``error``: the
        rest; ``balanced_acc``: mean of the accuracies of the classes that have images;
        ``macro_f1``: mean of the F1 scores of the classes that are labels or predictions;
        ``acc5``, from 10 classes on: fraction whose class is among the 5 most likely;
        ``calibration_error``: expected calibration error in 15 bins of equal width (Guo et al.
        2017, arXiv 1706.04599); ``confusion``: counts, one row per true class.
    """
    import torch
    from torchmetrics import classification

    from sam_lightning.inference.metrics import EvalMetrics

    device, classes = next(trained.parameters()).device, len(trained.classes)
    metrics = EvalMetrics(classes).to(device)
    confusion = classification.MulticlassConfusionMatrix(classes).to(device)
    calibration_error = classification.MulticlassCalibrationError(classes, n_bins=15).to(device)
    predicted, likely = [], []
    count = -(-len(split) // batch_size)
    with torch.inference_mode(), progress("batches", count) as advance:
        for logits, labels in _outputs(trained, split, batch_size):
            probabilities = logits.softmax(1)
            top = probabilities.topk(classes if classes <= EACH else TOP)
            likely.append((top.values.cpu(), top.indices.cpu()))
            predicted.append(logits.argmax(1).cpu())
            metrics.update(logits, labels)
            confusion.update(logits, labels)
            # Logits that all happen to lie in 0..1 would be taken for probabilities.
            calibration_error.update(probabilities, labels)
            advance()
    counts = confusion.compute()
    values = {**metrics.compute(), "confusion": counts, **_by_class(counts.double())}
    values["calibration_error"] = calibration_error.compute()
    return {
        "predicted": torch.cat(predicted),
        "likely": [torch.cat(parts) for parts in zip(*likely, strict=True)],
        **{name: value.tolist() for name, value in values.items()},
    }


def _by_class(confusion: Tensor) -> dict[str, Tensor]:
    """Balanced accuracy and macro F1 of counts, one row per true class."""
    right, labels, predictions = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    f1 = 2 * right / (labels + predictions)  # NaN for a class that is neither
    return {"balanced_acc": (right / labels).nanmean(), "macro_f1": f1.nanmean()}


def corrupted(
    trained: TrainedClassifier, files: CorruptedImages, labels: Tensor, batch_size: int = 512
) -> dict[str, list[float]]:
    """Accuracy under each corruption, from severity 1 to 5."""
    import torch

    from sam_lightning.data.corruptions import CORRUPTIONS, SEVERITIES
    from sam_lightning.data.source import Split

    severities = range(1, SEVERITIES + 1)
    with progress("corruptions", len(CORRUPTIONS) * SEVERITIES) as advance:

        def accuracy(images: Tensor) -> float:
            outputs = _outputs(trained, Split(images, labels), batch_size)
            with torch.inference_mode():
                right = sum(int((logits.argmax(1) == label).sum()) for logits, label in outputs)
            advance()
            return right / len(labels)

        return {name: [accuracy(files.images(name, s)) for s in severities] for name in CORRUPTIONS}


def _outputs(
    trained: TrainedClassifier, split: Split, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels, batch by batch."""
    import torch

    device = next(trained.parameters()).device
    for start in range(0, len(split), batch_size):
        part = split.take(torch.arange(start, min(start + batch_size, len(split))))
        yield trained(trained.preprocess(part.seen())), part.labels.to(device)


def main(argv: list[str]) -> None:
    """Evaluate as the arguments say; print the result, and write it."""
    options = parse(KEYS, argv)
    file = checkpoint_file(str(options.ckpt_path))
    out = command.out_folder(options) or run_folder(file)
    if options.corruptions is not None and options.split != "test":
        raise ConfigError(f"corruptions={options.corruptions}: needs split=test")

    with importing():
        from sam_lightning.data.corruptions import CorruptedImages
        from sam_lightning.inference.load import data_of, load

    trained = load(file, device=options.device)
    needed = ["test" if options.split == "test" else "train"]
    data = data_of(trained.config, options.data.root, run_folder(file), pixels_of=needed)
    split: Split | None = getattr(data, options.split)
    if split is None:
        there = [name for name in ("test", "val", "train") if getattr(data, name) is not None]
        what = "validation" if options.split == "val" else options.split
        raise ConfigError(
            f"split={options.split}: the run held out no {what} data; allowed are "
            f"{', '.join(there)}"
        )
    folder = options.corruptions and Path(os.path.expanduser(options.corruptions))
    files = None if folder is None else CorruptedImages(folder, split.labels)
    batch_size = options.batch_size or data.eval_batch_size
    values = evaluate(trained, split, batch_size)
    confusion, predicted, likely = (values.pop(k) for k in ("confusion", "predicted", "likely"))
    by_kind = corrupted(trained, files, split.labels, batch_size) if files else {}
    if by_kind:
        values["mean_corruption_error"] = mean(1 - mean(found) for found in by_kind.values())
    result = {
        "ckpt_path": str(file),
        "split": options.split,
        "images": len(split),
        "metrics": {f"{options.split}/{name}": value for name, value in values.items()},
        "classes": [
            {"class": name, "images": sum(row), "acc": row[i] / sum(row) if any(row) else None}
            for i, (name, row) in enumerate(zip(trained.classes, confusion, strict=True))
        ],
        "corruptions": by_kind,
    }
    try:
        from pandas import DataFrame

        names = [clean(name, "csv") for name in trained.classes]
        frame = DataFrame(confusion, names, names)
        with replacing(out / "confusion_matrix.csv") as path:
            frame.to_csv(path, index_label="true class", lineterminator="\r\n")
        with replacing(out / "predictions.csv") as path:
            _write_predictions(path, trained.classes, split, predicted, *likely)
        write_json(out / "evaluation.json", result)
    finally:  # what was computed is shown also where it cannot be written
        _print_tables(result)


def _write_predictions(
    path: Path,
    classes: list[str],
    split: Split,
    predicted: Tensor,
    probabilities: Tensor,
    likely: Tensor,
) -> None:
    """A row for each image; ``probabilities`` and ``likely`` as ``evaluate`` returns them."""
    head = ["index" if split.names is None else "file", "label", "prediction", "probability"]
    if each := len(classes) <= EACH:
        head += [f"p({clean(name)})" for name in classes]
        order = likely.argsort(1)
    else:
        head += [f"{what}_{i + 1}" for i in range(TOP) for what in ("class", "probability")]
    names = [clean(name, "csv") for name in classes]
    # Names of files may be any bytes, which Python keeps as surrogates: they come out as they were.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for i, name in enumerate(split.names or range(len(split))):
            found = [f"{p:.6g}" for p in probabilities[i].tolist()]
            told = [names[int(split.labels[i])], names[int(predicted[i])], found[0]]
            if each:
                more = [found[j] for j in order[i]]
            else:
                named = [names[j] for j in likely[i]]
                more = [cell for pair in zip(named, found, strict=True) for cell in pair]
            writer.writerow([clean(name, "csv", undecoded=True), *told, *more])


def _print_tables(result: dict[str, Any]) -> None:
    table = command.table("result", "value", title=f"{result['images']:,} images")
    for name, value in result["metrics"].items():
        table.add_row(name, f"{value:.4f}" if name.endswith("/loss") else f"{value:.2%}")
    show(table)
    seen = [entry for entry in result["classes"] if entry["images"]]
    title = "classes" if len(seen) <= SHOWN else f"the {SHOWN} classes that are hardest"
    table = command.table("class", "images", "accuracy", title=title)
    for entry in sorted(seen, key=lambda entry: entry["acc"])[:SHOWN]:
        table.add_row(entry["class"], f"{entry['images']:,}", f"{entry['acc']:.2%}")
    show(table)
    if result["corruptions"]:
        table = command.table("accuracy at severity", "1", "2", "3", "4", "5", "mean")
        for name, accuracies in result["corruptions"].items():
            table.add_row(name, *(f"{a:.2%}" for a in (*accuracies, mean(accuracies))))
        show(table)
