"""compile=true: what a run compiles, how often, and that it trains as without."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from reference import assert_close
from runs import SMALL, configuration
from sam_lightning.training.run import train

# Two whole batches and a smaller one in each of two epochs, then validation and test.
ODD = ["data.val_size=23", "batch_size=36", "lr=0.01", "rho=0.1"]
# Tracing takes a time by layer.
SHALLOW = ["model=wide_resnet28_10", "model.depth=10", "model.widen_factor=1"]
# What is run, and how many kinds of passes over whole batches it has.
RUNS = {
    "method=sam": 2,  # with running statistics, and without
    "method=sgd": 1,
    "method=asam": 2,
    "method=linf": 2,
    "method=gsam": 2,
    "method=friendly_sam": 2,
    "method=looksam": 2,
    "method=sam_on": 2,
    "method=msam": 1,
    "method=esam": 3,  # it also computes losses at w + e
    "method.ascent_fraction=0.25": 2,
    "method.ascent_steps=2": 2,
    "trainer.accumulate_grad_batches=2": 2,
    "trainer.precision=bf16-mixed": 2,
    "data.subset=30": 2,  # fewer than a batch
    "epochs=3 finetune=full finetune.freeze=[backbone] finetune.unfreeze={1:[backbone]}": 3,  # with
    # frozen statistics both passes are the same
}

OTHERS = ["asam", "linf", "gsam", "friendly_sam", "sam_on", "looksam", "esam"]
OTHERS = [*(f"method={name}" for name in OTHERS), "trainer.precision=bf16-mixed"]
OTHERS += ["method.ascent_fraction=0.25", "method.ascent_steps=2", "data.subset=30"]


def compiling_with(monkeypatch, backend):
    """Let runs compile with a backend that counts graphs, whatever they ask for."""
    counter = CompileCounterWithBackend(backend)
    compile_model = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m, **_: compile_model(m, backend=counter))
    return counter


def run(folder, *overrides):
    small = [option for option in SMALL if option != "model.width=4"]
    cfg = configuration(*small, *SHALLOW, *overrides)
    cfg.output_dir = str(folder)
    return train(cfg)


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [pytest.param(o, marks=pytest.mark.long if o in OTHERS else []) for o in RUNS]
)
def test_each_kind_of_pass_is_compiled_once(options, tmp_path, monkeypatch):
    counter = compiling_with(monkeypatch, "eager")
    run(tmp_path / "compiled", *ODD, *options.split(), "compile=true")
    assert counter.frame_count == RUNS[options]
    run(tmp_path / "eager", *ODD, *options.split())
    assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "eager"), atol=1e-6, rtol=1e-5)


@pytest.mark.long
def test_other_runs_of_this_process_do_not_use_up_the_limit(tmp_path, monkeypatch):
    counter = compiling_with(monkeypatch, "eager")
    for width in (1, 2):
        with torch._dynamo.config.patch(recompile_limit=3):
            run(tmp_path / str(width), "epochs=1", "compile=true", f"model.widen_factor={width}")
    assert counter.frame_count == 4


@pytest.mark.slow
def test_a_model_that_needs_too_many_graphs_is_told_of_in_one_line(tmp_path, monkeypatch, caplog):
    counter = compiling_with(monkeypatch, "eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        run(tmp_path, "epochs=1", "compile=true")
    assert counter.frame_count == 1
    (said,) = [r for r in caplog.records if r.levelname == "WARNING" and "graphs" in r.message]
    assert said.message.startswith("compile=true: too many graphs, so passes that need another are")
    assert "track_running_stats" in said.message
    assert "\n" not in said.message
