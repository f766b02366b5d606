"""The tables of docs/speed.md, from what benchmarks.gpu has found so far."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.gpu_plan import CASES, LOOPS, METHODS, NAMES

Rows = Sequence[Mapping[str, Any]]
PRECISIONS = {True: "bf16", False: "float32"}


def markdown(report: Mapping[str, Any]) -> str:
    """All tables; a figure that there is not is said, with the reason, and never guessed."""
    found: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in report["rows"]:
        found[row["part"]].append(row)
    parts, where = report["parts"], report["environment"]
    place = ", ".join(f"{key} {where[key]}" for key in ("gpu", "cpu", "torch") if key in where)
    lines = [f"Measured on: {place or 'not known yet'}.", ""]
    if report["device"] == "cpu":
        lines += ["Tried in small on a CPU, which records no graphs: no figure means anything.", ""]
    for part, loops in LOOPS.items():
        if part in parts:
            cases = CASES if report["device"] == "cuda" else ()
            lines += [*_speed(found[part], cases, loops, parts[part]["state"]), ""]
    others = {"correct": _correct, "tests": _tests, "kernels": _kernels, "train": _train}
    lines += ["| what | figure |", "| --- | ---: |"]
    for part, rows_of in others.items():
        if part in parts:
            rows = rows_of(found[part]) or [f"| {part} | no figure |"]
            lines += rows
    lines += ["", *(f"- {name}: {_state(state)}" for name, state in parts.items())]
    return "\n".join(lines) + "\n"


def _state(part: Mapping[str, Any]) -> str:
    return part["state"] + (f", {part['seconds']:.0f} s" if "seconds" in part else "")


def _speed(
    rows: Rows, cases: Sequence[tuple[str, int]], loops: Sequence[str], state: str
) -> list[str]:
    figures = {(row["model"], row["batch"], row["loop"]): row for row in rows}
    lines = [f"| images/s, SAM, bf16 | {' | '.join(loops)} |", "| --- |" + " ---: |" * len(loops)]
    for model, batch in dict.fromkeys([*((m, b) for m, b, _ in figures), *cases]):
        cells = [_cell(figures.get((model, batch, loop)), state) for loop in loops]
        lines.append(f"| {NAMES[model]}, batch {batch} | {' | '.join(cells)} |")
    return lines


def _cell(row: Mapping[str, Any] | None, state: str) -> str:
    if row is None:
        return "missing" if state == "completed" else "not reached"
    return row["error"] if "error" in row else f"{row['images_per_second']:,.0f}"


def _correct(rows: Rows) -> list[str]:
    lines = []
    for row in rows:
        of = f"{row['updates']} updates, {PRECISIONS[row['bf16']]}"
        equal = "equal" if not row["differ"] else f"{row['differ']} of {row['tensors']} differ"
        lines.append(f"| weights after {of}: {row['loop']} / eager, bit for bit | {equal} |")
        if row["memory"] and row["loop"] == "graphs":
            ratios = f"{row['memory']['allocated']:.2f}; {row['memory']['reserved']:.2f}"
            lines.append(f"| peak memory, allocated; reserved: {row['loop']} / eager | {ratios} |")
    return lines


def _tests(rows: Rows) -> list[str]:
    return [
        f"| tests of a GPU: passed; failed; left out | "
        f"{row['tests'] - row['skipped'] - len(row['failed'])}; {len(row['failed'])}; "
        f"{row['skipped']} |"
        for row in rows
    ]


def _kernels(rows: Rows) -> list[str]:
    lines = []
    for row in rows:
        figure = f"{row['kernels']:,}; {row['milliseconds']:.2f} ms; {row['launches']:,}"
        what = f"kernels of an update, ResNet-18, batch {row['batch']}, {row['loop']}"
        lines.append(f"| {what}; their time; launches by the host | {figure} |")
        for name, count, milliseconds in row["names"][:8]:
            short = name.replace("|", "\\|")
            lines.append(f"| `{short[:70]}` | {count} x, {milliseconds:.2f} ms |")
    return lines


def _train(rows: Rows) -> list[str]:
    lines = []
    by_method = [{row["seed"]: row for row in rows if row["method"] == m} for m in METHODS]
    pairs = set.intersection(*map(set, by_method))  # a stop leaves a seed without its SGD
    for method, of in zip(METHODS, by_method, strict=True):
        if runs := [row for seed, row in of.items() if seed in pairs or not pairs]:
            accuracies = [f"{100 * run['accuracy']:.2f}" for run in runs]
            figure = f"{mean(100 * run['accuracy'] for run in runs):.2f} ({', '.join(accuracies)})"
            lines.append(f"| test accuracy, %, {method}: mean (of each seed) | {figure} |")
            speeds = [mean(run[key] for run in runs) for key in ("seconds", "images_per_second")]
            figure = f"{speeds[0]:.1f}; {speeds[1]:,.0f}"
            lines.append(f"| seconds of a run; images/s, {method}: mean | {figure} |")
    return lines
