"""The command ``export``: a checkpoint as a file that runs without this project."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sam_lightning.config.arguments import Keys, parse
from sam_lightning.config.errors import ConfigError, TrainingError, one_line
from sam_lightning.config.process import importing
from sam_lightning.config.values import Count, Rule
from sam_lightning.inference import command
from sam_lightning.runs.files import checkpoint_file, inside_run, replacing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sam_lightning.inference.load import TrainedClassifier

ABOUT = """
Write a checkpoint as one file that runs without this project, and compare it with the checkpoint.

python -m sam_lightning export ckpt_path=RUN format=onnx         # for onnxruntime
python -m sam_lightning export ckpt_path=RUN format=pt2 batch=1  # for torch.export.load

The file takes images, float32 N x C x H x W, and returns logits N x classes. The names of the
classes, a JSON list, are the entry "classes" of ONNX's metadata and of the extra files of pt2.
Nothing is written if the logits of random images are not those of the checkpoint.
"""

File = Annotated[str, Rule("a file, as in ./model.onnx", bool)]
KEYS: Keys = {
    **command.CKPT_PATH,
    "format": ("???", Literal["onnx", "pt2"], "onnx (torch 2.7 or newer), or pt2 (torch.export)"),
    "normalize": (True, bool, "takes pixels in 0..1; false: pixels normalised already"),
    "batch": ("dynamic", Literal["dynamic"] | Count, "dynamic, or the number N of images"),
    "image_size": (None, Count | None, "side of the images in pixels; null: as in the run"),
    "out": (None, File | None, "the file to write to; null: beside the checkpoint"),
}

TOLERANCE = 1e-3  # of the largest logit; float32 sums in another order stay far below


def export(
    trained: TrainedClassifier,
    out: Path,
    normalize: bool = True,
    batch: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> float:
    """Write a model to a file, and compare the logits of random images.

    Args:
        trained: on the CPU.
        out: the file; its suffix, ``.onnx`` or ``.pt2``, is its format.
        normalize: the file takes pixels in 0..1, otherwise what ``trained`` does.
        batch: number of images; None: any.
        image_size: (height, width); None: ``trained.image_size``.

    Returns:
        the largest difference between logits of the file and of ``trained``.

    Raises:
        ConfigError: the size of images is not known, the file cannot be written, or torch is too
            old for its format.
        TrainingError: the logits differ; nothing is written.
    """
    import torch

    from sam_lightning.data.views import evaluation_view

    if out.suffix == ".onnx" and torch.__version__ < "2.7":
        raise ConfigError(f"format=onnx: needs torch 2.7, here is {torch.__version__}; use pt2")
    size = image_size or trained.image_size
    if size is None:
        raise ConfigError("image_size=null: the checkpoint does not say it; give image_size=32")
    model: nn.Module = copy.deepcopy(trained.model).to(memory_format=torch.contiguous_format)
    if normalize:
        # (pixel - mean) / std per channel is what BatchNorm does with given statistics. Its eps is
        # lost in rounding; torch.export of some versions refuses 0.
        normalization = torch.nn.BatchNorm2d(trained.in_channels, eps=1e-30, affine=False)
        normalization.running_mean = torch.tensor(trained.mean)
        normalization.running_var = torch.tensor(trained.std).square()
        model = torch.nn.Sequential(normalization, model).eval()
    save = _onnx if out.suffix == ".onnx" else _pt2
    metadata = {
        "classes": json.dumps(trained.classes),
        "images": "pixels in 0..1" if normalize else "(pixels in 0..1 - mean) / std",
        "mean": json.dumps(trained.mean),
        "std": json.dumps(trained.std),
        "view": json.dumps(asdict(evaluation_view(size, **trained.config["data"]))),
    }
    images = torch.zeros(batch or 2, trained.in_channels, *size)
    try:
        trained(images)
    except Exception as error:  # whatever the model raises
        said = f"{size[0]} x {size[1]}"
        raise ConfigError(f"image_size: the model takes no {said} ({one_line(error)})") from error
    dynamic = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    shapes = [(n, *images.shape[1:]) for n in ([batch] if batch else [1, 2, 5])]
    with replacing(out) as path:
        run = save(model, path, images, dynamic, metadata)  # what was saved
        return _largest_difference(trained, run, normalize, shapes)


def _onnx(
    model: nn.Module, path: Path, images: Tensor, dynamic: Any, metadata: dict[str, str]
) -> Callable[[Tensor], Tensor]:
    import torch
    from onnxruntime import InferenceSession

    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    program = torch.onnx.export(
        model, (images,), dynamo=True, dynamic_shapes=dynamic, verbose=False, **names
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)
    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _pt2(
    model: nn.Module, path: Path, images: Tensor, dynamic: Any, metadata: dict[str, str]
) -> Callable[[Tensor], Tensor]:
    import torch

    program = torch.export.export(model, (images,), dynamic_shapes=dynamic, strict=False)
    torch.export.save(program, path, extra_files=metadata)
    return torch.export.load(path).module()


def _largest_difference(
    trained: TrainedClassifier, run: Callable[[Tensor], Tensor], normalize: bool, shapes: list[Any]
) -> float:
    """Over batches of random images; a ``TrainingError`` if it is no rounding."""
    import torch

    generator = torch.Generator().manual_seed(0)
    expected, written = [], []
    for shape in shapes:
        pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        images = trained.normalize(pixels)  # preprocess would resize them
        with torch.no_grad():
            expected.append(trained(images))
            written.append(run(pixels / 255 if normalize else images))
    scale = torch.cat(expected).abs().max().item()
    difference = (torch.cat(written) - torch.cat(expected)).abs().max().item()
    if not difference <= TOLERANCE * scale:  # nor is NaN
        raise TrainingError(
            f"the logits of the exported file differ by up to {difference:.2g} from those of the "
            f"checkpoint, the largest of which is {scale:.2g}; nothing was written"
        )
    return difference


def main(argv: list[str]) -> None:
    """Export as the arguments say, and print the largest difference of logits."""
    options = parse(KEYS, argv)
    file = checkpoint_file(str(options.ckpt_path))
    suffix = f".{options.format}"
    if options.out is None:
        out = inside_run(file.with_suffix(suffix), file)
    else:
        out = Path(os.path.expanduser(options.out))
    if out.suffix != suffix or out.is_dir():
        raise ConfigError(f"out={out}: must be a file that ends in {suffix}")
    packages = ("onnx", "onnxscript", "onnxruntime")  # as in the extra of pyproject.toml
    missing = [name for name in packages if find_spec(name) is None]
    if options.format == "onnx" and missing:
        raise ConfigError(
            f"format=onnx: needs {', '.join(missing)}; run pip install {' '.join(missing)}"
        )

    with importing():
        from sam_lightning.inference.load import load

    trained = load(file)
    batch = None if options.batch == "dynamic" else options.batch
    size = None if options.image_size is None else (options.image_size, options.image_size)
    difference = export(trained, out, options.normalize, batch, size)
    print(f"{out}: {out.stat().st_size:,} bytes")
    print(f"largest difference from the checkpoint's logits: {difference:.2g}")
