"""Runs of random configurations, stopped at random times by random signals and continued.

``python tests/helpers/random_resume.py FOLDER COUNT`` tries the seeds 0 to COUNT - 1 that have no
line in ``FOLDER/results.jsonl`` yet, and ends with exit code 1 if a continued run differs from the
unbroken one. From seed 200 on there are more options and more kinds of stops, from 300 on groups
of parameters, frozen parts and mixed images.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from inject import begin
from runs import children, rows, summary, wait_for_end

METHODS = [
    "sgd",
    "sam",
    "asam",
    "gsam",
    "friendly_sam",
    "looksam",
    "esam",
    "msam",
    "sam_on",
    "linf",
]
MODEL = ["model=wide_resnet28_10", "model.depth=10", "model.widen_factor=1"]
DATA = ["data=digits", "batch_size=32", "data.eval_batch_size=64", "scheduler.warmup_epochs=1"]
EMA = "{_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.9"
STOPPING = "{_target_: lightning.pytorch.callbacks.EarlyStopping"
LR = "{_target_:lightning.pytorch.callbacks.LearningRateMonitor}"
SAVING = "{_target_:lightning.pytorch.callbacks.ModelCheckpoint,every_n_train_steps:N"
SAVING += ",dirpath:${output_dir}/checkpoints,filename:'at_{step}',enable_version_counter:false}"
MORE, TUNED = 200, 300  # the first seeds with more options
# What a record says of time and place, and how often the run was continued.
OF_TIME = ["seconds", "train_seconds", "images_per_second", "peak_memory_bytes"]
OF_TIME += ["finished", "parts", "command", "host"]
# What callbacks keep, apart from times and paths; and how far the loops are.
STATES = ["metrics", "rows", "images", "wait_count", "best_score", "stopped_epoch"]
STATES += ["best_model_score", "latest_update_step"]
LOOPS = ["state_dict", "epoch_loop.state_dict", "epoch_progress", "epoch_loop.batch_progress"]


def draw(seed: int) -> list[str]:
    """The command line of a run; the seed is 1 of 4 with two processes."""
    r = random.Random(seed)

    def maybe(chance: float, *choices: str) -> list[str]:
        return r.choice(choices).split() if r.random() < chance else []

    options = [*DATA, *MODEL, f"method={r.choice(METHODS)}", f"seed={seed}"]
    options += [f"optimizer={r.choice(['sgd', 'adam', 'adamw'])}", f"epochs={r.randint(2, 5)}"]
    options += [f"data.subset={r.choice([90, 128, 200])}", "rho=0.05"]
    options += [f"trainer={'ddp_cpu' if seed % 4 == 3 else 'cpu'}"]
    options += [f"trainer.log_every_n_steps={r.choice([1, 2, 3, 50])}"]
    options += [f"trainer.accumulate_grad_batches={r.choice([1, 1, 2, 3])}"]
    options += [f"checkpoint_every_n_steps={r.choice(['null', 1, 2, 3])}"]
    options += maybe(0.3, "method.every=2", "method.every=3")
    options += maybe(0.3, "trainer.gradient_clip_val=0.5")
    options += maybe(0.3, "trainer.precision=64-true", "trainer.precision=bf16-mixed")
    options += maybe(0.3, "data.num_workers=1 augment=trivialaugment", "data.num_workers=2")
    options += maybe(0.4, "data.label_noise=0.2", "model.dropout=0.3", "data.drop_last=true")
    options += maybe(0.2, "scheduler=constant", "scheduler=multistep")
    options += maybe(0.3, "+trainer.limit_train_batches=2", "+trainer.limit_train_batches=0.6")
    options += maybe(0.2, "+trainer.limit_test_batches=2")
    options += maybe(0.3, *(f"+trainer.max_steps={n}" for n in (4, 6, 9, 12)))
    if r.random() < 0.75:
        options += ["data.val_size=100"]
        options += maybe(0.3, "+trainer.limit_val_batches=1")
        options += maybe(0.3, *(f"trainer.check_val_every_n_epoch={n}" for n in (2, 3)))
        options += maybe(0.3, "+trainer.val_check_interval=1", "+trainer.val_check_interval=0.5")
        if r.random() < 0.3:
            patience, monitor = r.randint(1, 2), r.choice(["val/loss", "val/acc"])
            mode = "min" if monitor == "val/loss" else "max"
            text = f"{STOPPING}, monitor: {monitor}, mode: {mode}, patience: {patience}"
            options += [f"+callbacks.stopping={text}, strict: false}}"]
    if r.random() < 0.3:
        more = r.choice(["", ", update_every_n_steps: 2", ", update_starting_at_epoch: 1"])
        options += [f"+callbacks.ema={EMA}{more}}}"]
    options += further(seed, options) if seed >= MORE else []
    return options + tuning(seed, options) if seed >= TUNED else options


def further(seed: int, options: list[str]) -> list[str]:
    """Options that the first seeds do not have, drawn apart so that theirs stay as they are."""
    r, given = random.Random(f"more {seed}"), " ".join(options)
    found: list[str] = []

    def maybe(chance: float, *choices: str) -> None:
        chosen = r.choice(choices).split() if r.random() < chance else []
        found.extend(
            option for option in chosen if option.partition("=")[0].strip("+") not in given
        )

    if "method=msam" not in given:
        maybe(0.5, "method.ascent_steps=2", "method.sync_perturbation=true", "method.rho_min=0.01")
        maybe(0.3, "method.same_randomness=false", "method.decay_in_ascent=true")
    if "method=gsam" not in given and "method=looksam" not in given and "msam" not in given:
        maybe(0.2, "method.ascent_per_micro_batch=true")
    maybe(0.2, "+trainer.overfit_batches=2", "+trainer.min_steps=7", "+trainer.min_epochs=3")
    maybe(0.2, f"+callbacks.lr={LR}", f"+callbacks.lr={LR[:-1]},logging_interval:step}}")
    if r.random() < 0.2:
        names = ("images=64", "batch_size=32", "trace_samples=1", "max_steps=3")
        found += ["callbacks=sharpness", *(f"callbacks.sharpness.{name}" for name in names)]
    saving = SAVING.replace("N", str(r.randint(1, 4)))
    maybe(0.3, f"+callbacks.steps={saving}", f"+callbacks.steps={saving[:-1]},save_top_k:-1}}")
    if "val_size" in given:
        across = [o for o in options if "check_val_every" in o or "val_check_interval" in o]
        if not across:  # validation counts batches across epochs
            every = f"+trainer.val_check_interval={r.randint(2, 9)}"
            maybe(0.3, f"trainer.check_val_every_n_epoch=null {every}")
        maybe(0.2, "+callbacks.best.save_top_k=2")
    return found


def tuning(seed: int, options: list[str]) -> list[str]:
    """Options of fine-tuning, drawn apart too."""
    r, given = random.Random(f"tuned {seed}"), " ".join(options)
    found = [f"finetune={r.choice(['full', 'layer_decay'])}"]
    for name, choices in (
        ("layer_decay", ["0.6", "1"]),
        ("head_lr_factor", ["1", "5"]),
        ("head_rho", ["null", "0.2"]),
        ("freeze_batchnorm", ["false", "false", "true"]),
        ("freeze", ["[]", "[conv1,'stages.[01]']", "[backbone]"]),
    ):
        found.append(f"finetune.{name}={r.choice(choices)}")
    if found[-1] != "finetune.freeze=[]" and r.random() < 0.7:
        found.append(f"finetune.unfreeze={r.choice(['{1:[stages.1]}', '{1:[conv1,stages]}'])}")
    if r.random() < 0.4:
        found.append("param_groups=[{params:[norm_and_bias],weight_decay:0},{params:[bn],rho:0}]")
    if r.random() < 0.6:
        found.append(f"augment.mixup.alpha={r.choice([0.2, 1.0])}")
    if "callbacks" not in given and r.random() < 0.6:
        found += ["callbacks=ema", f"callbacks.ema.decay={r.choice([0.5, 0.9])}"]
    return found


def run(
    cwd: Path,
    folder: Path,
    options: list[str],
    after: float | None,
    name: str = "",
    fault: tuple[str, str] | None = None,
) -> Any:
    """Start or continue a run; send it a signal after so many seconds; its exit code.

    A name of two signals sends the second one later, RANK kills one process of several.
    """
    process = begin(cwd, *options, f"hydra.run.dir={folder}", "ckpt_path=last", fault=fault)
    process.join(after or 300)
    others = children(process.pid) if process.is_alive() else []
    if process.is_alive():
        first, *second = name.split("+") if name else ["SIGKILL"]
        if first == "RANK":
            os.kill(max(others, default=process.pid), signal.SIGKILL)
        else:
            os.kill(process.pid, getattr(signal, first))
        for other in second:
            process.join(1.5)
            if process.is_alive():
                os.kill(process.pid, getattr(signal, other))
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"{name} did not end the run")
        wait_for_end(others)
        if after is None:
            raise TimeoutError("the run hangs")
    return process.exitcode


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs that should be the same."""
    found = []
    files = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (one, other)]
    if files[0] != files[1]:
        found.append(f"checkpoints: {files}")
    for name in {*files[0]} & {*files[1]}:
        states = [
            torch.load(f / "checkpoints" / name, weights_only=True, map_location="cpu")
            for f in (one, other)
        ]
        if name.startswith("at_"):  # a continued run may save it again, at a later batch
            states = [{k: s[k] for k in ("state_dict", "optimizer_states")} for s in states]
        else:
            states = list(map(_state, states))
        found += [f"{name}: {key}" for key in _differing(*states)]
    if rows(one) != rows(other):
        found.append("metrics.csv")
    records = [_record(folder) for folder in (one, other)]
    return found + [f"metrics.json: {key}" for key in _differing(*records)]


def _record(folder: Path) -> dict[str, Any]:
    text = json.dumps(summary(folder)).replace(str(folder), "FOLDER")
    record = {k: v for k, v in json.loads(text).items() if k not in OF_TIME}
    record["config"]["data"].pop("num_workers")  # may change
    return record


def _state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    loop = checkpoint["loops"]["fit_loop"]
    kept = {k: v for k, v in checkpoint.items() if k not in ("loops", "callbacks")}
    for settings in (kept["hyper_parameters"]["data"], kept["settings"]):
        settings.pop("num_workers", settings.pop("data.num_workers", None))  # may change
    callbacks = {
        name: {k: v for k, v in state.items() if k in STATES}
        for name, state in checkpoint["callbacks"].items()
    }
    return {**kept, "loops": {k: loop[k] for k in LOOPS}, "callbacks": callbacks}


def _differing(one: Any, other: Any, name: str = "") -> list[str]:
    """The places where two nested values differ; NaN equals NaN."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return [] if same and torch.equal(one.nan_to_num(7e7), other.nan_to_num(7e7)) else [name]
    if isinstance(one, dict) and isinstance(other, dict):
        missing = [f"{name}.{key}" for key in one.keys() ^ other.keys()]
        both = [key for key in one if key in other]
        return missing + [d for k in both for d in _differing(one[k], other[k], f"{name}.{k}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in _differing(a, b, f"{name}.{i}")]
    return [] if one == other or (one != one and other != other) else [name]


def attempt(cwd: Path, seed: int) -> dict[str, Any]:
    """Compare an unbroken run with one that was stopped; remove both if they are the same."""
    options, r = draw(seed), random.Random(f"kills {seed}")
    folder = cwd / str(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.monotonic()
    result: dict[str, Any] = {"seed": seed, "options": " ".join(options), "stops": []}
    code = run(folder, folder / "whole", options, None)
    lasted = time.monotonic() - start
    if code != 0:
        said = (folder / "stderr").read_text().strip().splitlines()[-1:]
        return {**result, "refused" if code == 2 else "failed": said}
    for _ in range(r.randint(1, 3)):  # a run that is complete by then repeats its test
        name = r.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"])
        after, fault = r.uniform(0.2, 0.9) * lasted, None
        if seed >= MORE:
            if "trainer=ddp_cpu" in options:
                name = r.choice([name, "RANK", "SIGINT+SIGINT", "SIGTERM+SIGKILL"])
            elif r.random() < 0.7:  # in a place, not at a time
                where = r.choice([f"save:{r.randint(1, 9)}", f"pass:{r.randint(1, 40)}"])
                where = r.choice(
                    [where, where, f"between:{r.randint(1, 20)}", "test:1", "tested:1"]
                )
                fault, after = (name, where), 300
            workers = r.choice(["", "data.num_workers=0", "data.num_workers=1"])
            options = [*options, workers] if workers else options
        code = run(folder, folder / "broken", options, after, name, fault)
        result["stops"].append([name, fault[1] if fault else round(after, 2), code])
    if run(folder, folder / "broken", options, None) != 0:
        return {**result, "failed": (folder / "stderr").read_text().strip().splitlines()[-1:]}
    result["differences"] = differences(folder / "broken", folder / "whole")
    if not result["differences"]:
        shutil.rmtree(folder)
    return result


def main(folder: Path, count: int) -> int:
    """Try the seeds that were not tried yet."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.jsonl"
    text = file.read_text() if file.exists() else ""
    results = [json.loads(line) for line in text.splitlines()]
    for seed in sorted({*range(count)} - {result["seed"] for result in results}):
        results.append(attempt(folder.resolve(), seed))
        with file.open("a") as out:
            out.write(json.dumps(results[-1]) + "\n")
        print(json.dumps(results[-1]), flush=True)
    compared = [result for result in results if "differences" in result]
    bad = [r["seed"] for r in results if r.get("differences") or "failed" in r]
    stops = sum(len(result["stops"]) for result in compared)
    refused = sum("refused" in result for result in results)
    print(f"{len(compared)} runs compared, {stops} stops; {refused} refused; differing: {bad}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
