"""Sweeps: every job leaves how it ended and takes no other down; a table of all at the end.

Most jobs here are refused as they start, by what only the data shows, and train nothing.
"""

import json
import os
import re
import subprocess
import sys
from tempfile import gettempdir

import optuna
import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from inject import forked
from runs import SMALL, TRAIN, command, configuration, summary
from sam_lightning.config.conf import CONF, DEFAULTS
from sam_lightning.config.errors import ConfigError
from sam_lightning.data.loading import suggested_workers
from sam_lightning.runs.resume import resumed
from sam_lightning.studies.identical import unused
from sam_lightning.studies.launchers import share_processors
from sam_lightning.studies.sweep import job_folder, next_job
from sam_lightning.studies.sweep_jobs import composer

# No job has so many images.
REFUSED = [*SMALL, "data.val_size=5000"]
WHY = "data.val_size=5000: must come to 1..1437 of the 1438 training images"


def table(sweep):
    return json.loads((sweep / "sweep.json").read_text())["jobs"]


def printed_table(out):
    """The words of every line of a sweep's last table and of what is around it."""
    lines = out[out.rindex(" jobs in ") - 2 :].splitlines()
    assert max(map(len, lines)) <= 80
    words = [re.sub("[│┃┏━┳┓┡╇┩├─┼┤└┴┘]", " ", line).split() for line in lines]
    return [line for line in words if line]


def only_sweep(cwd):
    (sweep,) = cwd.glob("logs/train/multiruns/*")
    return sweep


# --------------------------------------------------------------------------------- names of folders


def job(overrides, swept=(), first=0, folder="nowhere"):
    """The configuration that a job's folder is named by."""
    callback = {"swept": [*swept], "first_job": first}
    hydra = {
        "callbacks": {"sweep_folder": callback},
        "job": {"config": {"override_dirname": {"exclude_keys": ["data.root"]}}},
        "overrides": {"task": overrides},
        "sweep": {"dir": str(folder)},
    }
    hydra["job"]["override_dirname"] = ",".join(sorted(overrides))
    return OmegaConf.create({"hydra": hydra})


def test_name_of_a_folder():
    given = ["batch_size=50", "data.root=/x", "seed=0", "+data.label_noise=0.4", "method=sam"]
    name = job_folder(3, _root_=job(given, swept=["data.label_noise", "seed"]))
    assert name == "3_data.label_noise=0.4,seed=0,method=sam,batch_size=50"
    assert job_folder(3, _root_=job(["lr=1", "rho=0.1"], first=20)) == "23_rho=0.1,lr=1"
    assert job_folder(0, _root_=job(["optimized_metric=val/acc"])) == "0_optimized_metric=val-acc"
    assert job_folder(0, _root_=job(["+logger.wandb.api_key=1234", "lr=1"])) == "0_lr=1"


def test_a_sweep_that_an_earlier_version_began_goes_on_in_its_folders(tmp_path):
    given = job(["rho=0.1", "batch_size=50"], swept=["rho"], folder=tmp_path)
    (tmp_path / "0_batch_size=50,rho=0.1" / ".hydra").mkdir(parents=True)
    assert job_folder(0, _root_=given) == "0_batch_size=50,rho=0.1"
    assert job_folder(1, _root_=given) == "1_rho=0.1,batch_size=50"


@pytest.mark.parametrize("letter", ["a", "é", "日"])
def test_long_names_are_cut_to_what_file_systems_allow(tmp_path, letter):
    for length in (70, 249, 250, 251, 252, 253, 1000):
        name = job_folder(12, _root_=job([f"k={letter * length}"]))
        (tmp_path / name).mkdir(exist_ok=True)
        whole = f"12_k={letter * length}"
        assert name == whole or (name.endswith("...") and whole.startswith(name[:-3]))
        assert (name == whole) == (len(whole.encode()) <= 255)
        assert len(name.encode()) > 250 or name == whole


def test_numbers_go_on_behind_those_of_jobs_that_are_there(tmp_path):
    assert next_job(str(tmp_path / "nowhere")) == 0
    for name in ("0_rho=1", "9_rho=2", "10_rho=3", "x_rho=4"):
        (tmp_path / name / ".hydra").mkdir(parents=True)
    (tmp_path / "77_no_job").mkdir()
    assert next_job(str(tmp_path)) == 11


@pytest.mark.slow
def test_a_sweep_of_many_keys(tmp_path):
    given = ["method=sam", "optimizer=sgd", "scheduler=cosine", "data.split_seed=123456789"]
    given += ["data.repeats=1", "method.ascent_fraction=0.5", "method.every=1", "lr=0.1"]
    given += ["trainer.accumulate_grad_batches=4", "trainer.check_val_every_n_epoch=1"]
    done = forked(tmp_path, "-m", *REFUSED, *given, "rho=1,2")
    assert done.returncode == 2
    jobs = table(only_sweep(tmp_path))
    assert [f"rho={i}" in job["overrides"] for i, job in enumerate(jobs, 1)] == [True, True]
    assert {*given, *REFUSED} <= {*jobs[0]["overrides"]}
    folders = [only_sweep(tmp_path) / job["folder"] for job in jobs]
    for number, folder in enumerate(folders):
        assert folder.name.startswith(f"{number}_rho={number + 1},method=sam,batch_size=50,")
        assert len(folder.name.encode()) == 255
        assert summary(folder)["status"] == "failed"


# ----------------------------------------------------------------------- jobs that are the same run


@pytest.mark.slow
def test_a_job_that_would_repeat_another_is_trained_once(tmp_path):
    grid = ["method=sgd,sam", "rho=0,0.1", "seed=0,1", "data.num_workers=0,1"]
    done = forked(tmp_path, "-m", *REFUSED, *grid)
    keys = ("method", "rho", "seed", "data.num_workers")
    jobs = [dict(o.split("=", 1) for o in j["overrides"]) for j in table(only_sweep(tmp_path))]
    found = [tuple(job[key] for key in keys) for job in jobs]
    once = [("sgd", "0"), ("sam", "0.1")]  # and sam with 0 is sgd
    assert found == [(*job, seed, n) for job in once for seed in "01" for n in "01"]
    lines = [line for line in done.stdout.splitlines() if "num_workers=0: the same" in line]
    one, other = (re.sub(" data.num_workers=0|.*HYDRA. ", "", line) for line in lines)
    assert one == (
        "method=sgd rho=0.1: the same run as method=sgd rho=0, trained once, because rho changes "
        "nothing with method=sgd"
    )
    assert other == (
        "method=sam rho=0: the same run as method=sgd rho=0, trained once, because with rho=0 "
        "every method is the base optimizer alone"
    )


def test_a_search_that_changes_nothing_is_refused(tmp_path):
    done = command(tmp_path, "-m", "sweep=rho_optuna", *SMALL, "method=sgd", "data.val_size=20")
    why = "rho changes nothing with method=sgd, so there is nothing to search"
    assert (done.returncode, done.stderr) == (2, f"error: hydra.sweeper.params: {why}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["method=sgd", "rho=0.1"], "rho changes nothing with method=sgd"),
        (["rho=0", "method.every=2"], "method.every changes nothing with rho=0"),
        (["optimizer.lr=0.1", "lr=0.2"], "lr changes nothing here"),
        (["augment.mixup.p=0.5", "augment.mixup.alpha=0.2"], None),
        (["augment.mixup.p=0.5", "data.flip=0.2"], "augment.mixup.p changes nothing here"),
        (["augment=none", "data.flip=0.2"], "data.flip changes nothing here"),
        (["method=sgd", "experiment=digits_label_noise"], None),  # whose file has a rho
        (["rho=0.1", "lr=0.2", "method=sam", "method.every=2"], None),
    ],
)
def test_a_setting_that_changes_nothing_is_named(given, said):
    assert unused(configuration(*given), [o.partition("=")[0] for o in given]) == said


@pytest.mark.long
def test_tokens_and_passwords_stay_out_of_a_sweeps_folder(tmp_path):
    given = ["+logger.wandb.api_key=0123456789abcdef", "++data.cache_dir='s3://me:hidden@host/x'"]
    done = command(tmp_path, "-m", *REFUSED, *given, "rho=0.1,0.2")
    assert done.returncode == 2
    texts = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in texts} >= {"multirun.yaml", "overrides.yaml", "sweep.json"}
    for path, text in texts.items():
        assert "0123456789" not in text + str(path)
        assert "hidden" not in text + str(path)
    assert "+logger.wandb.api_key=***" in json.dumps(table(only_sweep(tmp_path)))
    replayed = command(tmp_path, *SMALL, "+logger.csv.api_key='***'")  # as a resume would
    advice = "give it again, or set SAM_LIGHTNING_LOGGER_CSV_API_KEY in the environment"
    assert replayed.stderr == f"error: logger.csv.api_key=***: was not stored; {advice}\n"


# ----------------------------------------------------------------------------- jobs that do not end


def test_a_sweep_whose_jobs_are_all_refused(tmp_path):
    done = forked(tmp_path, "-m", *REFUSED, "rho=0.1,0.2", "hydra.sweeper.max_batch_size=1")
    assert done.returncode == 2
    assert done.stderr == f"error: {WHY}\n"
    jobs = table(only_sweep(tmp_path))
    assert [job["job"] for job in jobs] == ["0", "1"]  # the second batch was run too
    for job, rho in zip(jobs, (0.1, 0.2), strict=True):
        folder = only_sweep(tmp_path) / job["folder"]
        found = summary(folder)
        assert found["config"]["rho"] == rho
        for said in (found, job):
            assert said["status"] == "failed"
            assert said["exit_reason"] == f"ConfigError: {WHY}"
            assert said["metrics"] == {}
        assert WHY in (folder / "train.log").read_text()
    _, head, *rows, reason = printed_table(done.stdout)[:5]
    assert head == ["job", "rho", "status", "test/acc"]
    assert rows == [["0", "0.1", "failed"], ["1", "0.2", "failed"]]
    assert " ".join(reason).startswith("jobs 0, 1 failed: data.val_size=5000: ")


@pytest.mark.parametrize(
    "job",
    [
        ["seed=3", "rho=0.2", "model.width=16", "method.rho=0.3"],
        ["model=resnet34", "method=gsam", "method.rho_min=0.01", "+model.name=x", "lr=1e-3"],
        ["experiment=quickstart", "~method.rho", "data.mean=[0.5]", "data=cifar100", "epochs=3"],
        ["callbacks=[default,ema]", "callbacks.best.mode=min", "++trainer.max_steps=5"],
        ["data.source.root='a b'", "task_name='${hydra:job.num}'", "data=cifar10", "~seed"],
    ],
)
def test_jobs_are_composed_as_hydra_composes_them(job):
    with initialize_config_dir(str(CONF), **DEFAULTS):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("train", ["data=digits"], RunMode.MULTIRUN)
        expected = loader.load_sweep_config(master, job)
        found = composer(master)(7, job)
        with open_dict(expected):
            expected.hydra.runtime.output_dir = gettempdir()
            expected.hydra.job.num = 7
            HydraConfig.instance().set_config(expected)
            del expected["hydra"]
        plain = [OmegaConf.to_container(cfg, resolve=True) for cfg in (found, expected)]
        assert plain[0] == plain[1]


@pytest.mark.slow
def test_a_sweep_into_the_folder_of_another_counts_only_its_own_jobs(tmp_path):
    sweep = tmp_path / "sweep"
    for number in range(2):
        given = [f"hydra.sweep.dir={sweep}", f"data.val_size=500{number}", "test=false"]
        done = forked(tmp_path, "-m", *SMALL, *given, "rho=0.1,0.2,0.3")
        assert done.stderr.startswith(f"error: data.val_size=500{number}: must come to 1..1437 ")
        assert "(job" not in done.stderr
    assert len(table(sweep)) == 6


COMPLETED = json.dumps({"status": "completed", "metrics": {"test/acc": 0.9}})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("left", "arguments", "reason", "status"),
    [
        (COMPLETED, [], "has a run already; continue it with ckpt_path=last", "completed"),
        (COMPLETED, ["ckpt_path=last"], "data.val_size=5000: must", "completed"),
        ("{", [], "data.val_size=5000: must come to", "failed"),
    ],
)
def test_a_refused_job_keeps_what_was_complete(tmp_path, left, arguments, reason, status):
    folder = tmp_path / "sweep" / "0"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(left)
    subdir = "hydra.sweep.subdir=0"
    given = ["seed=0", f"hydra.sweep.dir={folder.parent}", subdir, *arguments]
    done = forked(tmp_path, "-m", *REFUSED, *given)
    assert done.returncode == 2
    assert reason in done.stderr
    assert reason in table(folder.parent)[0]["exit_reason"]
    found = summary(folder)
    assert found["status"] == status
    assert found["metrics"] == json.loads(COMPLETED if left == COMPLETED else "{}").get(
        "metrics", {}
    )


def test_what_continues_a_sweep_is_not_taken_for_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "logs/nested/task/runs/2030"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").write_text("[]")
    assert f"hydra.run.dir='{run}'" in resumed(["ckpt_path=last"])
    for asks in ("-m", "sweep=seeds", "hydra.mode=MULTIRUN"):
        assert resumed([asks, "ckpt_path=last"]) == [asks, "ckpt_path=last"]
    for task in ("/abs", "", "**a"):
        with pytest.raises(ConfigError, match=f"task_name={re.escape(task)}: allowed is"):
            resumed(["ckpt_path=last", f"task_name={task}"])


def test_submitit_without_slurm_would_train_a_job_as_often_as_it_has_tasks(tmp_path):
    several = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    done = command(tmp_path, "-m", *SMALL, *several, "rho=0.1,0.2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: hydra/launcher=submitit_local: would train each job 2 ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- jobs side by side

ODD = '''
import os, signal
from lightning.pytorch.callbacks import Callback
from sam_lightning.config.errors import ConfigError

class OddError(Exception):
    """Cannot be sent to another process: it needs two arguments to be made again."""
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")

class Odd(Callback):
    def on_train_start(self, trainer, module):
        rho = module.sam.defaults["rho"]
        if rho == 0.25:
            raise OddError("odd", "odder")
        if rho == 0.75:
            raise ConfigError("rho=0.75: refused as it starts")
        if rho == 0.5:
            os.kill(os.getpid(), signal.SIGKILL)
'''

SIDE_BY_SIDE = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local"],
}


def side_by_side(tmp_path, launcher, *arguments):
    (tmp_path / "odd.py").write_text(ODD)
    (tmp_path / "cwd").mkdir()
    return command(
        tmp_path / "cwd",
        *("-m", *SIDE_BY_SIDE[launcher], *SMALL, "epochs=1", "+callbacks.odd._target_=odd.Odd"),
        *arguments,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )


@pytest.mark.long
@pytest.mark.parametrize("launcher", SIDE_BY_SIDE)
def test_jobs_side_by_side(tmp_path, launcher):
    done = side_by_side(tmp_path, launcher, "rho=0.1,0.25,0.75")
    assert done.returncode == 1
    last = "error: OddError: odd and odder (job 1; 2 of 3 jobs failed)"
    assert done.stderr.splitlines()[-1] == last
    sweep = only_sweep(tmp_path / "cwd")
    trained, odd, refused = table(sweep)
    assert trained["status"] == "completed"
    assert trained["metrics"] == summary(sweep / trained["folder"])["metrics"]
    assert f"{trained['metrics']['test/acc']:.4f}" in done.stdout
    assert (sweep / trained["folder"] / "checkpoints" / "last.ckpt").is_file()
    for job, reason in [
        (odd, "OddError: odd and odder"),
        (refused, "ConfigError: rho=0.75: refused as it starts"),
    ]:
        assert (job["status"], job["exit_reason"]) == ("failed", reason)
        assert summary(sweep / job["folder"])["exit_reason"] == reason
        said = reason.removeprefix("ConfigError: ")
        assert said in (sweep / job["folder"] / "train.log").read_text()
    assert {p.name for p in (tmp_path / "cwd").iterdir()} == {"logs"}


@pytest.mark.long
@pytest.mark.parametrize("launcher", SIDE_BY_SIDE)
def test_a_job_whose_process_is_killed(tmp_path, launcher):
    done = side_by_side(tmp_path, launcher, "rho=0.5")
    assert done.returncode == 1
    last = "error: the process ended and left no metrics.json"
    assert done.stderr.splitlines()[-1] == last
    (job,) = table(only_sweep(tmp_path / "cwd"))
    assert (job["status"], job["metrics"]) == ("no result", {})
    assert "no result" in done.stdout


@pytest.mark.long
def test_a_job_of_submitit_that_is_killed_takes_no_other_down(tmp_path):
    done = side_by_side(tmp_path, "submitit", "rho=0.5,0.1")
    assert done.returncode == 1
    last = "the process ended and left no metrics.json (job 0; 1 of 2 jobs failed)"
    assert done.stderr.splitlines()[-1] == f"error: {last}"
    found = [job["status"] for job in table(only_sweep(tmp_path / "cwd"))]
    assert found == ["no result", "completed"]


@pytest.mark.long
def test_processes_and_loaders_in_the_workers_of_joblib(tmp_path):
    loading = ["data.num_workers=1", "augment=trivialaugment"]
    done = side_by_side(tmp_path, "joblib", "rho=0.1", "trainer.devices=2", *loading)
    assert done.returncode == 0, done.stderr
    sweep = only_sweep(tmp_path / "cwd")
    (job,) = table(sweep)
    assert (job["status"], summary(sweep / job["folder"])["devices"]) == ("completed", 2)


# ----------------------------------------------------------------------------------------- searches


def trials(sweep):
    study = optuna.load_study(study_name="rho", storage=f"sqlite:///{sweep}/optuna.db")
    return [(trial.state.name, trial.params["rho"], trial.value) for trial in study.trials]


@pytest.mark.parametrize(("jobs", "share"), [(3, 2), (-1, 1), (12, 1), (1, 7)])
def test_jobs_side_by_side_share_the_processors(monkeypatch, jobs, share):
    monkeypatch.setattr("joblib.cpu_count", lambda: 7)
    share_processors(jobs, environment := {})
    assert environment == {"LOKY_MAX_CPU_COUNT": str(share)}
    monkeypatch.undo()
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # what data.num_workers=auto counts by
    assert suggested_workers(1, 1) == 1
    share_processors(jobs)
    assert os.environ["LOKY_MAX_CPU_COUNT"] == "1"  # a user's own choice


@pytest.mark.long
def test_a_study_survives_failed_trials_and_goes_on(tmp_path):
    sweep = tmp_path / "study"
    study = ["-m", "sweep=rho_optuna", *SMALL, "epochs=1", "data.val_size=100", "test=false"]
    study += ["optimized_metric=val/loss", "hydra.sweeper.direction=minimize"]
    study += [f"hydra.sweep.dir={sweep}", "hydra.sweeper.n_trials=2"]
    done = command(tmp_path, *study, "lr=1e30")  # weights that are not finite, and so the loss
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: optimized_metric=val/loss: came out as nan"
    assert [state for state, *_ in trials(sweep)] == ["FAIL", "FAIL"]
    why = "TrainingError: optimized_metric=val/loss: came out as nan"
    assert [(job["status"], job["exit_reason"]) for job in table(sweep)] == [("failed", why)] * 2
    failed = {job["folder"]: summary(sweep / job["folder"]) for job in table(sweep)}
    for found in failed.values():  # what was trained is complete, and has no such number
        assert (found["status"], found["refused"]) == ("completed", why)
        assert found["metrics"]["val/loss"] is None

    done = command(tmp_path, *study, "lr=0.1")
    assert done.returncode == 0, done.stderr
    found = trials(sweep)
    assert [state for state, *_ in found] == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert len({rho for _, rho, _ in found}) == 4  # none was drawn a second time
    jobs = table(sweep)
    assert [job["job"] for job in jobs] == ["0", "1", "2", "3"]
    assert [job["status"] for job in jobs] == ["failed", "failed", "completed", "completed"]
    assert {job["folder"]: summary(sweep / job["folder"]) for job in jobs[:2]} == failed
    for job, (_, rho, value) in zip(jobs, found, strict=True):
        assert summary(sweep / job["folder"])["config"]["rho"] == rho
        assert job["metrics"].get("val/loss") == value or value is None


@pytest.mark.slow
def test_a_study_whose_trials_are_all_refused(tmp_path):
    study = ["-m", "sweep=rho_optuna", *REFUSED, "hydra.sweeper.n_trials=2"]
    done = forked(tmp_path, *study)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {WHY}"
    assert [state for state, *_ in trials(only_sweep(tmp_path))] == ["FAIL", "FAIL"]


def test_an_interrupted_sweep_still_has_its_table(tmp_path):
    program = """
import runpy, sys
import sam_lightning.config.schema as command
original, rhos = command.check, []
def check(cfg, top_level):
    rhos.append(cfg.rho)
    if len(rhos) == 4:
        raise command.ConfigError(f"rho={cfg.rho}: refused as it starts")
    if len(rhos) == 5:
        raise KeyboardInterrupt  # as the second job starts
    return original(cfg, top_level)
command.check = check
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    line = [sys.executable, "-c", program, str(TRAIN), "-m", *SMALL, "rho=1,2,3"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert [job["status"] for job in table(only_sweep(tmp_path))] == ["failed", "no result"]
    assert "job 0 failed: rho=1: refused as it starts\n" in done.stdout
