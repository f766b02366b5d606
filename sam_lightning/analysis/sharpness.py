"""The command ``sharpness``: how sharp and how curved the loss of checkpoints is."""

import math
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig

from sam_lightning.analysis.checkpoints import (
    SHARED_KEYS,
    LoadedCheckpoint,
    labels_of,
    load_checkpoints,
    stage,
    surface_of,
)
from sam_lightning.config.arguments import Keys, parse
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.values import Count, Positive, within
from sam_lightning.inference.command import table
from sam_lightning.runs.files import make_folder, write_json
from sam_lightning.runs.terminal import show

ABOUT = """
Measure how sharp and how curved the loss of checkpoints is, on fixed images of their own runs
without augmentation: the rise of the loss within the radius rho, in one step and by projected
ascent; m-sharpness; the largest eigenvalues of the Hessian, its trace and, with density=true, the
distribution of its eigenvalues. BatchNorm uses its stored statistics.

  python -m sam_lightning sharpness ckpt_path=RUN/checkpoints/last.ckpt
  python -m sam_lightning sharpness ckpt_path=RUN1,RUN2 density=true out=figures

A folder stands for its checkpoints/last.ckpt. The numbers go into sharpness.json in the folder of
the run, or in out. Most of the time goes into products of the Hessian with vectors, each as long as
about four passes over the images, forwards and backwards: as many as the top_k eigenvalues need, at
most max_steps, of which each keeps a vector of the size of the weights; trace_samples of them for
the trace of the rest; and density_samples x density_steps for the distribution of the rest. They
take half the time with images=256, and then depend more on which images are drawn.
"""
Several = Annotated[int, within(2)]
KEYS: Keys = {
    **SHARED_KEYS,
    "rho": (0.05, Positive, "the radius within which the loss may rise"),
    "m": (128, Count, "images that share a perturbation in m-sharpness"),
    "ascent_steps": (10, Count, "steps of projected ascent"),
    "top_k": (10, Count, "how many of the largest eigenvalues"),
    "max_steps": (100, Several, "the most Hessian products to spend on them"),
    "trace_samples": (4, Several, "random vectors for the trace"),
    "density": (False, bool, "the distribution of the eigenvalues too"),
    "density_samples": (1, Count, "random vectors for it"),
    "density_steps": (16, Several, "products for each of them"),
}


def main(argv: list[str]) -> None:
    """Measure, print a table and write ``sharpness.json``."""
    options = parse(KEYS, argv)
    if options.max_steps < options.top_k:
        raise ConfigError(f"max_steps={options.max_steps}: must be >= top_k={options.top_k}")
    loaded = load_checkpoints(options)
    labels = labels_of(options.labels, loaded)
    for checkpoint in loaded:
        make_folder(checkpoint.out, checkpoint.out)

    results: dict[Path, list[dict[str, Any]]] = {checkpoint.out: [] for checkpoint in loaded}
    try:
        for checkpoint, label in zip(loaded, labels, strict=True):
            group = results[checkpoint.out]
            group.append(measure(checkpoint, label, options))
            write_json(checkpoint.out / "sharpness.json", {"checkpoints": group})
    finally:  # what was measured is shown also where it cannot be written
        if measured := [found for group in results.values() for found in group]:
            print_table(measured, options)
    for out, group in results.items():
        files = [out / "sharpness.json"]
        if options.density:
            files += draw_density(group, out / "density")
        print(*map(os.path.relpath, files))


def measure(checkpoint: LoadedCheckpoint, label: str, options: DictConfig) -> dict[str, Any]:
    """Every measure of one checkpoint, by name, as plain values."""
    import torch

    from sam_lightning.analysis import curvature

    generator = torch.Generator().manual_seed(options.seed)
    surface = surface_of(checkpoint, options)
    with stage(surface, f"{label}: sharpness", 2 + options.ascent_steps + 1):
        worst = curvature.worst_case(surface, options.rho)
        by_steps = curvature.worst_case(surface, options.rho, options.ascent_steps)
    by_m = surface.in_batches_of(options.m)
    with stage(by_m, f"{label}: m-sharpness", 2):
        m_sharpness = curvature.m_sharpness(by_m, options.rho)
    with stage(surface, f"{label}: largest eigenvalues, at most", options.max_steps):
        limits = {"tolerance": 1e-3, "max_steps": options.max_steps}
        top = curvature.top_eigenpairs(surface, generator, options.top_k, **limits)
    with stage(surface, f"{label}: trace", options.trace_samples):
        trace, trace_error = curvature.trace(surface, generator, options.trace_samples, top)
    measured = {
        "label": label,
        "ckpt_path": str(checkpoint.file),
        **{key: options[key] for key in ("split", "rho", "m", "ascent_steps", "seed")},
        "images": surface.examples,
        "weights": surface.size,
        "loss": surface.value(),
        "worst": worst,
        "worst_by_steps": by_steps,
        "m_sharpness": m_sharpness,
        "eigenvalues": top.values.tolist(),
        "eigenvalue_errors": top.errors.tolist(),
        "lambda_max": top.values[0].item(),
        "trace": trace,
        "trace_error": trace_error,
    }
    if options.density:
        samples, steps = options.density_samples, options.density_steps
        with stage(surface, f"{label}: density of eigenvalues", samples * steps):
            found = curvature.spectrum(surface, generator, samples, steps, top)
        measured["density"] = {"nodes": found.nodes.tolist(), "weights": found.weights.tolist()}
    return measured


def print_table(results: list[dict[str, Any]], options: DictConfig) -> None:
    """A row per checkpoint."""
    k = min(options.top_k, 5)  # the ratio of Foret et al. 2021, 4.2
    in_steps, by_m = f"in {options.ascent_steps}\nsteps", f"by {options.m}\nimages"
    ratio = [f"λ 1 /\nλ {k}"] if k > 1 else []
    shown = table(
        *("run", "loss", "sharpness", in_steps, by_m, "λ 1", *ratio, "trace"),
        title=f"rho {options.rho:g}, {results[0]['images']} images of {options.split}",
    )
    for r in results:
        top = r["eigenvalues"]
        largest, error = f"{r['lambda_max']:.4g}", r["eigenvalue_errors"][0]
        if error > 0.01 * abs(r["lambda_max"]):  # too few max_steps to know it well
            largest += f" ± {error:.2g}"
        ratio = [f"{top[0] / top[k - 1] if top[k - 1] else math.nan:.3g}"] if k > 1 else []
        measures = [f"{r[key]:.4g}" for key in ("loss", "worst", "worst_by_steps", "m_sharpness")]
        trace = f"{r['trace']:.4g} ± {r['trace_error']:.2g}"
        shown.add_row(r["label"], *measures, largest, *ratio, trace)
    show(shown)


def draw_density(results: list[dict[str, Any]], stem: Path) -> list[Path]:
    """The eigenvalues of each checkpoint's Hessian: how many there are around each value."""
    import torch

    from sam_lightning import plotting as plots
    from sam_lightning.analysis.curvature import Spectrum

    tensor = partial(torch.tensor, dtype=torch.float64)
    spectra = [Spectrum(**{k: tensor(v) for k, v in r["density"].items()}) for r in results]
    low = min(s.nodes.min().item() for s in spectra)
    high = max(s.nodes.max().item() for s in spectra)
    pairs = list(zip(results, spectra, strict=True))
    finest = [s.resolution(len(r["eigenvalues"])) for r, s in pairs]
    width = max(0.005 * (high - low), *finest) or 1.0
    points = torch.linspace(low - 5 * width, high + 5 * width, 2000, dtype=torch.float64)
    counts = [s.density(points, width) * r["weights"] for r, s in pairs]
    with plots.style():
        figure, (axes,) = plots.panels(1, 6, 3.4)
        foot = axes.get_xaxis_transform()
        colours = plots.colours(r["label"] for r in results)
        for i, (r, count) in enumerate(zip(results, counts, strict=True)):
            label, found = plots.plain(r["label"]), r["eigenvalues"]
            axes.plot(points, count, colours[i], linestyle=plots.dash(i), label=label)
            height = [0.02 + 0.03 * i] * len(found)
            axes.plot(found, height, "|", color=colours[i], transform=foot)
        axes.set(yscale="log", xlabel="eigenvalue of the Hessian", ylabel="eigenvalues per unit")
        # From the peak of a fortieth of an eigenvalue on.
        axes.set_ylim(0.01 / width, 10 * max(count.max().item() for count in counts))
        plots.legend(figure)
        return plots.save(figure, stem)
