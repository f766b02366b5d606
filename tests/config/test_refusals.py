"""Wrong input of every kind ends in one clear line, before torch is loaded where it can."""

import math
from functools import cache
from typing import Annotated, Literal

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from commands import SMALL, TRAIN, assert_refused, serve
from sam_lightning.config.conf import CONF, DEFAULTS, top_level
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.schema import check
from sam_lightning.config.values import (
    BelowOne,
    Count,
    Folder,
    Fraction,
    Positive,
    Text,
    fits,
    within,
    words,
)


@pytest.fixture(scope="module")
def light():
    yield from serve("sam_lightning.cli", "hydra_plugins.hydra_optuna_sweeper._impl")


@pytest.fixture(scope="module")
def heavy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # no GPU on any machine
        yield from serve("sam_lightning.training.run", "torchvision.datasets", "sklearn.datasets")


def small(arguments):
    """What makes a run short; a model of one's own has no width."""
    return [a for a in SMALL if "model=custom" not in arguments or "width" not in a]


LIGHT = [
    ("augment=magic", "augment=magic: allowed are autoaugment, "),
    (
        "data.policy=randaugment",
        "data.policy=randaugment: no such key; it is a choice of the group",
    ),
    ("data.cutout=8", "data.cutout=8: no such key; it is augment.cutout.side now"),
    # names
    ("rhoo=0.1", "rhoo=0.1: no such key; did you mean rho?"),
    ("++lrr=9", "lrr=9: no such key; did you mean lr?"),
    ("+foo=1", "foo=1: no such key; allowed are data, model, ", " rho, epochs, "),
    ("model.widht=16", "model.widht=16: no such key; did you mean model.width?"),
    ("data.foo=1", "data.foo=1: no such key; allowed in data are val_size, subset, "),
    ("width=16", "width=16: no such key; did you mean model.width?"),
    ("optim.momentum=0.9", "optim.momentum=0.9: no such key; did you mean optimizer.momentum?"),
    (
        "optimizer=adamw optimizer.momentum=0.9",
        "optimizer.momentum=0.9: no such key; allowed in optimizer are _target_, lr, betas, ",
    ),
    ("hydra.foo=1", "hydra.foo=1: no such key"),
    ("callbacks.x._target_=a.B", "callbacks.x._target_=a.B: no such key; to add it, type +callba"),
    (
        "model.colour=a",
        "model.colour=a: no such key; allowed in model are _target_, ",
        "type +mo",
    ),
    ("model.weights=a", "model.weights=a: no such file, and no folder of a run"),
    ("+model.name=hf-hub:a", "model.name=hf-hub:a: allowed is a name of letters, "),
    ("method=samm", "method=samm: allowed are asam, ", ", wsam; did you mean sam?"),
    ("data=cifar", "data=cifar: allowed are cifar10, cifar100, ", "did you mean cifar10?"),
    ("model=null", "model=null: allowed are ", ", resnet18, "),
    ("experiment=quick", "experiment=quick: allowed are ", "did you mean quickstart?"),
    ("experiment=../x", "experiment", "=", "x: allowed are cifar10_fast, "),
    ("experiment=", "experiment=: allowed are cifar10_fast, "),
    (
        "logger=[csv,tensorbord]",
        "logger=tensorbord: allowed are comet, csv, ",
        "did you mean tensorboard?",
    ),
    ("model=3", "model=3: allowed are ", ", resnet18, "),
    ("model={a:1}", "model={a:1}: allowed are ", ", resnet18, "),
    ("++model=resnet34", "++model=resnet34: allowed are ", ", resnet18, ", " without +"),
    ("data=base", "data.source._target_: must be given, as in data.source._target_=..."),
    ("RHO=1", "RHO=1: no such key; did you mean rho?"),
    ("model.width.x=3", "model.width.x=3: no such key; did you mean model.width?"),
    ("defaults=[]", "defaults=[]: no such key"),
    # left out
    ("~rho", "rho: must be given, as in rho=..."),
    ("~optimizer", "optimizer: must be given, as in optimizer=..."),
    ("~method.rho", "method.rho: must be given, as in method.rho=..."),
    ("~trainer.devices", "trainer.devices: must be given, as in trainer.devices=..."),
    ("~model._target_", "model._target_: must be given, as in model._target_=..."),
    ("data.source=null", "data.source._target_: must be given, as in data.source._target_=..."),
    ("lr=???", "lr: must be given, as in lr=..."),
    ("~nothing", "~nothing: no such key; allowed are data, "),
    ("~modell", "~modell: no such key; did you mean model?"),
    ("data=image_folder", "data.root: must be given, as in data.root=..."),
    # values, more of them below
    ("rho=-0.1", "rho=-0.1: allowed is a number >= 0"),
    ("rho=", "rho=: allowed is a number >= 0"),
    ("rho=${lrr}", "rho=${lrr}: Interpolation key 'lrr' not found"),
    # what a configuration may name: more in test_security.py
    ("model._target_=resnet18", "model._target_=resnet18: allowed is the full name of a class or"),
    ("callbacks.last._target_=os/system", "_target_=os/system: allowed is the full name of a cl"),
    ("model._target_=null", "model._target_=null: allowed is the full name of a class or functi"),
    ("+trainer._target_=a.b", "trainer._target_=a.b: allowed is one in model, optimizer, "),
    ("+data._target_=a.b", "data._target_=a.b: allowed is one in model, optimizer, "),
    ("+callbacks._target_=a.b", "callbacks._target_=a.b: allowed is one in model, optimizer, "),
    ("model=custom", "model._target_: must be given, as in model._target_=..."),
    # files and folders
    ("ckpt_path=nowhere.ckpt", "ckpt_path=nowhere.ckpt: no such file"),
    ("data=image_folder data.root=nowhere", "data.root=nowhere: no such folder"),
    ("data=cifar10 data.root=null", "data.root=null: allowed is the path of a folder"),
    ("task_name=", "task_name=: allowed is a name of letters, digits, -, _ and ."),
    ("task_name=../../x", "task_name=../../x: allowed is a name of letters, digits, -, _ and ."),
    ("output_dir=null", "output_dir=null: allowed is the path of a folder"),
    ("output_dir={train}/x", "output_dir={train}/x: cannot be written (Not a "),
    ("logger.csv.root_dir={train}/x", "logger.csv.root_dir={train}/x: cannot be written (Not a "),
    ("logger.tensorboard.save_dir={train}", "save_dir={train}: cannot be written (File exists)"),
    ("callbacks.last.dirpath={train}/x", "callbacks.last.dirpath={train}/x: cannot be written "),
    ("callbacks.best.dirpath=3", "callbacks.best.dirpath=3: allowed is the path of a folder"),
    ("hydra.run.dir=", "hydra.run.dir=: must be the path of a folder"),
    ("hydra.run.dir=${nope}", "hydra.run.dir: Interpolation key 'nope' not found"),
    ("hydra.run.dir={train}", "hydra.run.dir={train}: cannot be made (File exists)"),
    ("hydra.run.dir={train}/x", "hydra.run.dir={train}/x: cannot be made (Not a directory)"),
    ("-m rho=1,2 hydra.sweep.dir={train}/x", "hydra.sweep.dir={train}/x: cannot be made (Not a "),
    ("hydra.run.dir=. rho=-1", "rho=-1: allowed is a number >= 0"),
    ("hydra.job.chdir=true rho=-1", "rho=-1: allowed is a number >= 0"),
    (
        "hydra.job_logging.handlers.file.filename=/proc/x",
        "hydra.job_logging: Unable to configure handler 'file' ([Errno 2] No such file or directo",
    ),
    (
        "hydra.job_logging.root.level=LOUD",
        "hydra.job_logging: Unable to configure root logger (Unknown level: 'LOUD')",
    ),
    ("hydra.job.name=a/b", "hydra.job_logging: Unable to configure handler 'file' ([Errno 2] "),
    # the form of an argument
    ("rho=[", "rho=[: not of the form key=value"),
    ("rho='0.1", "rho='0.1: not of the form key=value"),
    ("rho={a", "rho={a: not of the form key=value"),
    ("rho=0.1;ls", "rho=0.1;ls: not of the form key=value"),
    ("rho=1e−3", "rho=1e−3: not of the form key=value"),
    ("ρ=0.1", "ρ=0.1: not of the form key=value"),
    ("=1", "'=1': not of the form key=value"),
    ("~", "'~': not of the form key=value"),
    ("~=1", "'~=1': not of the form key=value"),
    ("~hydra=1", "~hydra=1: not of the form ~key, or ~group=choice"),
    ("-m ~=1,2", "'~=1': not of the form key=value"),
    ("rho", "rho: not of the form key=value"),
    ("rho=0.1,0.2", "rho=0.1,0.2", "several values are a sweep"),
    ("rho=range(0,1)", "rho=range(0,1)", "several values are a sweep"),
    ("hydra.mode=FOO", "nvalid ", "hydra.mode", "'FOO'", "expected ", "MULTIRUN"),
    ("hydra/launcher=nope", "hydra/launcher=nope: allowed are basic"),
    # flags
    ("--multirn", "--multirn: no such flag; did you mean --multirun?"),
    ("--rho=1", "--rho=1: no such flag"),
    ("-x", "-x: no such flag; a setting is given as key=value"),
    ("--cfg jobs", "--cfg/-c: invalid choice: 'jobs'"),
    ("--cfg", "--cfg/-c: expected one argument"),
    ("--resolve", "--resolve flag can only be used in conjunction with --cfg"),
    ("--run --multirun", "Only one of --run, --multirun, "),
    ("--experimental-rerun x", "--experimental-rerun: type python -m sam_lightning rerun RUN"),
    ("--config-name=nope", "Cannot find primary config 'nope'."),
    # sweeps
    ("-m method=sam,samm", "method=samm: allowed are asam, "),
    ("-m rhoo=0.1,0.2", "rhoo=0.1: no such key; did you mean rho? (job rhoo=0.1)"),
    ("-m rho=1,2 hydra.sweeper.max_batch_size=0", "max_batch_size=0: allowed is a whole number"),
    ("sweep=rho_optuna hydra.sweeper.n_trials=0", "n_trials=0: allowed is a whole number >= 1"),
    ("sweep=rho_optuna hydra.sweeper.direction=up", "direction=up: allowed is minimize, maximize"),
    ("sweep=rho_optuna optimized_metric=null", "optimized_metric=null: a search needs one, such"),
    ("-m rho=range(0,1,0)", "rho=range(0,1,0): allowed is range(start,stop,step) of finite numb"),
    ("-m rho=range(0,nan)", "rho=range(0,nan): allowed is range(start,stop,step) of finite numb"),
    ("-m seed=range(0,1e10)", "seed=range(0,1e10): more than 10,000 jobs, the most that a sweep"),
    ("-m seed=shuffle(range(0,10001))", "seed=shuffle(range(0,10001)): more than 10,000 jobs, "),
    (
        "-m seed=range(0,1000) lr=range(0.01,0.12,0.01)",
        "seed=range(0,1000) lr=range(0.01,0.12,0.01): more than 10,000 jobs, ",
    ),
    ("-m seed=0,1.5", "seed=1.5: allowed is a whole number from 0 to 4294967295 (job seed=1.5)\n"),
    ("-m method=sgd,sam rho=0.1,nan", "rho=nan: allowed is a number >= 0 (job method=sgd rho=nan)"),
    ("-m rho=0.1,0.2 lr=-1", "lr=-1: allowed is a number > 0\n"),
    ("-m rho=0.1,-1 hydra.sweeper.max_batch_size=1", "rho=-1: allowed is a number >= 0 (job rho"),
    ("-m rho=0.1,-1 hydra/launcher=joblib", "rho=-1: allowed is a number >= 0 (job rho=-1)"),
    ("-m data=digits,base", "data.source._target_: must be given, as in", "(job data=base)"),
    ("-m lr=1,${nowhere}", "lr=${nowhere}: Interpolation key 'nowhere' not found (job lr="),
    ("-m +logger.csv.api_key=x,'***' rho=0", "logger.csv.api_key=***: was not stored; give it"),
    ("-m rho=1,2 hydra.sweep.subdir=x", "hydra.sweep.subdir=x: allowed is a folder of each job w"),
    ("-m rho=1 hydra.sweep.subdir=../x", "hydra.sweep.subdir=../x: allowed is a folder of each j"),
    ("-m rho=interval(0,1)", "rho=interval(0,1): is for a search, sweep=rho_optuna"),
    ("sweep=rho_optuna data.val_size=20 rho=choice(1,-1)", "rho=-1: allowed is a number >= 0 (job"),
    ("sweep=rho_optuna data.val_size=20 lr=interval(-1,1)", "lr=-1.0: allowed is a number > 0 (jo"),
    ("+hydra.run.x=1", "+hydra.run.x=1: no such key"),
    ("hydra.run.dir=\ud800", "hydra.run.dir= : has what no name can have"),
    ("--config-dir=", "--config-dir=: must be given, or left out"),
    ("optimized_metric=val/acc", "optimized_metric=val/acc: there is no validation data; set "),
    ("-m rho=range(1,0)", "rho=range(1,0): stands for no value"),
    ("-m method=glob(nope*)", "method=glob(nope*): stands for no value"),
    ("-m sweep=seeds,rho_grid", "sweep=seeds,rho_grid: one at a time"),
    ("-m rho=1,2 hydra.sweep.dir=${nope}", "hydra.sweep.dir: Interpolation key 'nope' not found"),
    ("-m rho=1,2 hydra/launcher=submitit_slurm", "=submitit_slurm: there is no srun here; start "),
    (
        "sweep=rho_optuna data.val_size=20 hydra.sweeper.storage=sqlite:////nonexistent/dir/x.db",
        "hydra.sweeper.storage=sqlite:////nonexistent/dir/x.db: cannot be opened (",
        "unable to open database file); allowed is null, or a URL such as sqlite:////home/me/",
    ),
    (
        "sweep=rho_optuna data.val_size=20 hydra.sweeper.storage=sqlitee:///x.db",
        "hydra.sweeper.storage=sqlitee:///x.db: cannot be opened (Can't load plugin: ",
    ),
    (
        "sweep=rho_optuna data.val_size=20 hydra.sweeper.storage=sqlite:///{train}",
        "hydra.sweeper.storage=sqlite:///{train}: cannot be opened (",
        "file is not a database); allowed is null",
    ),
    (
        "sweep=rho_optuna data.val_size=20 hydra.sweeper.storage='nope://me:hidden@host/x?password=hidden'",
        "hydra.sweeper.storage=nope://***@host/x?password=***: cannot be opened (",
    ),
    (
        "sweep=rho_optuna hydra.sweeper.params.rho=nope",
        "hydra.sweeper.params: gives no key several",
    ),
    (
        "sweep=rho_optuna",
        "optimized_metric=val/acc: there is no validation data; set data.val_size\n",
    ),
    ("sweep=rho_optuna rho=0.1", "hydra.sweeper.params: gives no key several values"),
    ("sweep=rho_optuna lr=nope", "lr=nope: allowed is a number > 0"),  # not once for each trial
    (
        "-m rho=1,2 hydra/launcher=submitit_local +model.token=0123456789",
        "+model.token=***: submitit would keep it in a file; take it from the environment",
    ),
    (
        "sweep=rho_optuna data.val_size=20 hydra.sweeper.sampler._target_=nope",
        "Error locating target 'nope'",
    ),
    ("sweep=rho_optuna data.val_size=20 hydra.sweeper.storage=3", "storage=3: cannot be opened ("),
    ("sweep=rho_optuna hydra.sweeper.max_failure_rate=2", "failure_rate=2.0: allowed is a number "),
    ("sweep=rho_optuna hydra.sweeper.n_jobs=0", "n_jobs=0: allowed is a whole number >= 1"),
    (
        "-m rho=1,2 hydra/launcher=joblib hydra.launcher.n_jobs=0",
        "hydra.launcher.n_jobs=0: allowed is a whole number other than 0",
    ),
]


@pytest.mark.parametrize("row", LIGHT, ids=lambda row: row[0])
def test_wrong_input_is_refused_before_torch_is_loaded(light, tmp_path, row):
    arguments, *fragments = (text.replace("{train}", str(TRAIN)) for text in row)
    result = light(tmp_path, *small(arguments), *arguments.split())
    assert_refused(result, *fragments)
    assert not result.torch
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["cwd"]


VALUES = [
    ("data.val_size=1.0", "data.val_size=1.0: allowed is a fraction of the images below 1, or a n"),
    (
        "data.subset=1.5",
        "data.subset=1.5: allowed is a fraction of the images up to 1, or a number",
    ),
    ("data.repeats=1001", "data.repeats=1001: allowed is a whole number from 1 to 1000"),
    ("rho=abc", "rho=abc: allowed is a number >= 0"),
    ("rho=nan", "rho=nan: allowed is a number >= 0"),
    ("rho=inf", "rho=inf: allowed is a number >= 0"),
    ("rho=null", "rho=null: allowed is a number >= 0"),
    ("rho=true", "rho=True: allowed is a number >= 0"),
    ("rho=[0.1]", "rho=[0.1]: allowed is a number >= 0"),
    ("rho=0x10", "rho=0x10: allowed is a number >= 0"),
    ("rho=${rho}", "rho=${rho}: Recursive interpolation detected"),
    ("rho=${oc.env:NOT_SET}", "rho=${oc.env:NOT_SET}: ", "'NOT_SET' not found"),
    ("+rho.x=1", "rho={'x': 1}: allowed is a number >= 0"),
    ("method.rho=-1", "method.rho=-1: allowed is a number >= 0"),
    (
        "finetune=full finetune.layer_decay=1.5",
        "finetune.layer_decay=1.5: allowed is a number from",
    ),
    ("finetune=full finetune.layer_decay=0", "finetune.layer_decay=0: allowed is a number from ab"),
    (
        "finetune=full finetune.head_lr_factor=0",
        "finetune.head_lr_factor=0: allowed is a number > 0",
    ),
    ("finetune=full finetune.head_rho=-1", "finetune.head_rho=-1: allowed is a number >= 0, or n"),
    ("finetune=full finetune.freeze=3", "finetune.freeze=3: allowed is "),
    ("finetune=full finetune.freze=[a]", "no such key; did you mean finetune.freeze?"),
    (
        "finetune=full finetune.unfreeze=3",
        "finetune.unfreeze=3: allowed is null, or as {5: [layer4]}",
    ),
    (
        "finetune=full finetune.unfreeze={x:[a]}",
        "finetune.unfreeze.x=['a']: allowed is a number of",
    ),
    ("finetune=full finetune.unfreeze={1:3}", "finetune.unfreeze.1=3: allowed is "),
    ("param_groups=3", "param_groups=3: allowed is null, or a list as [{params: [fc]}]"),
    ("param_groups=[3]", "param_groups=[3]: allowed is null, or a list"),
    ("param_groups=[{params:[fc]}]", "must have params, and one of lr_factor, weight_decay, rho"),
    ("param_groups=[{rho:1}]", "must have params, and one of lr_factor, weight_decay, rho"),
    ("param_groups=[{params:[fc],lr:1}]", "param_groups[0].lr=1: no such key"),
    ("param_groups=[{params:[fc],rho:x}]", "param_groups[0].rho=x: allowed is a number >= 0, or n"),
    ("param_groups=[{params:[],rho:1}]", "param_groups[0].params=[]: allowed is "),
    ("method.name=3", "method.name=3: allowed is a text"),
    ("method.every=2.5", "method.every=2.5: allowed is a whole number >= 1"),
    ("seed=-1", "seed=-1: allowed is a whole number from 0 to 4294967295"),
    ("seed=4294967296", "seed=4294967296: allowed is a whole number from 0 to"),
    ("seed=1.5", "seed=1.5: allowed is a whole number from 0 to"),
    ("epochs=0", "epochs=0: allowed is a whole number >= 1"),
    ("epochs=1000000000000000000000000", "0: allowed is a whole number >= 1, up to 4294967295"),
    (
        "data.split_seed=1000000000000000000000000",
        "0: allowed is a whole number >= 0, up to 4294967295",
    ),
    ("epochs=1e9", "epochs=1000000000.0: allowed is a whole number >= 1"),
    ("batch_size=-inf", "batch_size=-inf: allowed is a whole number from 1 to 1000000000"),
    ("batch_size=100000000000000000000", "=100000000000000000000: allowed is a whole number from"),
    ("weight_decay=nan", "weight_decay=nan: allowed is a number >= 0"),
    ("label_smoothing=1", "label_smoothing=1: allowed is a number from 0 to below 1"),
    ("epochs=1.5", "epochs=1.5: allowed is a whole number >= 1"),
    ("lr=0", "lr=0: allowed is a number > 0"),
    ("test=maybe", "test=maybe: allowed is true, false"),
    ("test=0", "test=0: allowed is true, false"),
    ("method=asam method.perturbation.eta=-1", "method.perturbation.eta=-1: allowed is a number"),
    ("method=asam method.perturbation.eta=x", "method.perturbation.eta=x: allowed is a number"),
    ("model.width=1e6", "model.width=1000000.0: allowed is a whole number >= 1"),
    ("model.width=wide", "model.width=wide: allowed is a whole number >= 1"),
    ("scheduler.warmup_epochs=-1", "scheduler.warmup_epochs=-1: allowed is a number >= 0"),
    ("scheduler=multistep scheduler.milestones=3", "scheduler.milestones=3: allowed is a list"),
    ("optimizer.momentum=-1", "optimizer.momentum=-1: allowed is a number >= 0"),
    ("optimizer.nesterov=5", "optimizer.nesterov=5: allowed is true, false"),
    ("optimizer=adamw optimizer.betas=[0.9]", "optimizer.betas=[0.9]: allowed is two numbers from"),
    ("optimizer._target_=torch.optim.LBFGS", "=torch.optim.LBFGS: allowed is an optimizer that"),
    ("optimizer._target_=torch.optim.SparseAdam", "=torch.optim.SparseAdam: allowed is an "),
    ("data.mean=[a,b,c]", "data.mean=['a', 'b', 'c']: allowed is a list of numbers from 0 to 1"),
    ("data.mean=0.5", "data.mean=0.5: allowed is a list of numbers from 0 to 1, or null"),
    ("data.std=[0]", "data.std=[0]: allowed is a list of numbers from above 0 to 1, or null"),
    ("data.num_workers=100000", "data.num_workers=100000: allowed is a whole number from 0 to "),
    ("data.flip=true", "data.flip=True: allowed is a number from 0 to 1"),
    ("loss.class_weights=even", "loss.class_weights=even: allowed is a list of numbers >= 0, "),
    ("data.sampler=even", "data.sampler=even: allowed is shuffled, balanced"),
    (
        "data.label_noise=1.5",
        "data.label_noise=1.5: allowed is a number from 0 to 1, a ",
    ),
    ("trainer.accelerator=cdua", "trainer.accelerator=cdua: allowed is auto, cpu, cuda, "),
    ("trainer.devices=0", "trainer.devices=0: allowed is a whole number >= 1, a list of"),
    ("trainer.devices=[0,0]", "trainer.devices=[0, 0]: allowed is "),
    ("trainer.devices=-1", "trainer.devices=-1: allowed is a whole number >= 1, a list of"),
    ("trainer.devices=1.0", "trainer.devices=1.0: allowed is a whole number >= 1, a list of"),
    ("trainer.deterministic=maybe", "trainer.deterministic=maybe: allowed is true, false, warn"),
    ("trainer.sync_batchnorm=5", "trainer.sync_batchnorm=5: allowed is true, false"),
    ("trainer.check_val_every_n_epoch=0", "check_val_every_n_epoch=0: allowed is a whole number"),
    (
        "trainer.timeout=0.5",
        "trainer.timeout=0.5: allowed is a number from 1 to 10000000, in seconds",
    ),
    ("trainer.precision=17", "trainer.precision=17: allowed is 32-true, 16-mixed, "),
    ("trainer.gradient_clip_val=0", "trainer.gradient_clip_val=0: allowed is a number > 0, or"),
    ("optimized_metric=val/accuracy", "optimized_metric=val/accuracy: allowed is val/acc, "),
    ("optimized_metric=test/acc test=false", "optimized_metric=test/acc: needs test=true"),
]


@cache
def composed(*choices):
    with initialize_config_dir(str(CONF), **DEFAULTS):
        return compose("train", ["data=digits", "output_dir=.", *choices])


@pytest.mark.parametrize("row", VALUES, ids=lambda row: row[0])
def test_wrong_values(row):
    arguments, *fragments = row
    *choices, changed = arguments.split()
    cfg = composed(*choices)
    (override,) = OverridesParser.create().parse_overrides([changed])
    OmegaConf.update(cfg := cfg.copy(), override.key_or_group, override.value(), force_add=True)
    with pytest.raises(ConfigError) as caught:
        check(cfg, top_level())
    assert all(fragment in str(caught.value) for fragment in fragments)
    assert "\n" not in str(caught.value)


ALLOWS = {  # in words: the annotation, what it allows and what not
    "a whole number >= 1": (Count, [1, 2**32 - 1], [2**32, 0, 1.0, True, "1", None, math.inf]),
    "a whole number >= -1; -1 is all": (
        Annotated[int, within(-1, None, "; -1 is all")],
        [-1, 0],
        [-2],
    ),
    "a whole number from 1 to 3": (Annotated[int, within(1, 3)], [1, 3], [0, 4, 2.0]),
    "a number > 0": (Positive, [0.1, 1], [0, -1, math.nan, math.inf, False, 10**400]),
    "a number from 0 to below 1, or null": (BelowOne | None, [0, 0.5, None], [1, -0.1]),
    "a number from above 0 to 1": (Annotated[float, within(0, 1, above=True)], [0.5, 1], [0, None]),
    "two numbers from 0 to 1": (tuple[Fraction, Fraction], [[0, 1]], [[0], [0, 2], [0, 1, 1], 1]),
    "a list of numbers from 0 to 1": (list[Fraction], [[], [0.5]], [[2], 0.5, "a"]),
    "true, false, null": (bool | None, [True, None], [0, 1, "true"]),
    "a, 32": (Literal["a", 32], ["a", 32], [64, "32", True]),
    "a text": (Text, ["a"], ["", 3, None]),
    "the path of a folder": (Folder, ["a"], ["", 3]),
    "auto, a whole number >= 1, or null": (Literal["auto"] | Count | None, [2, None], ["a", 0]),
}


@pytest.mark.parametrize("text", ALLOWS)
def test_annotations_are_read_as_they_are_said(text):
    hint, *both = ALLOWS[text]
    inside, outside = ([OmegaConf.create({"v": v}).v for v in values] for values in both)
    assert words(hint) == text
    assert all(fits(v, hint) for v in inside)
    assert not any(fits(v, hint) for v in outside)


FILES = {
    "tabs": ("source:\n\t_target_: x\n", "cannot start any token", 'tabs.yaml", line 2, column 1'),
    "unclosed": ("source: {a: b\n", "expected ',' or '}'", "unclosed.yaml"),
    "latin": ("name: café\n", "latin.yaml: cannot be read ('utf-8' codec can't decode byte 0xe9"),
    "twice": ("a: 1\na: 2\n", "found duplicate key a", 'twice.yaml", line 2'),
    "empty": ("", "data.source._target_: must be given"),
    "code": ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    "parent": (
        "defaults: [digitts, _self_]\n",
        "data=digitts: allowed are ",
        "did you mean digits?",
    ),
    "typo": ("defaults: [digits, _self_]\nsubsett: 1\n", "data.subsett=1: no such key", "subset?"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_configuration_file_is_named(light, heavy, tmp_path, name):
    (tmp_path / "conf" / "data").mkdir(parents=True)
    content, *fragments = FILES[name]
    (tmp_path / "conf" / "data" / f"{name}.yaml").write_text(content, encoding="latin-1")
    command = heavy if name == "typo" else light  # its keys are those of a class
    result = command(tmp_path, f"--config-dir={tmp_path}/conf", f"data={name}", "trainer=cpu")
    assert_refused(result, *fragments)


HEAVY = [
    # names that only the class knows
    ("+model.foo=1", "model.foo=1: no such key; allowed are width, stem, "),
    ("+model.num_classes=3", "model.num_classes=3: no such key"),
    ("+trainer.foo=1", "trainer.foo=1: no such key; allowed are accelerator, "),
    ("+trainer.limit_train_batch=1", "trainer.limit_train_batch=1: no such key; did you mean "),
    ("+trainer.max_epochs=1", "trainer.max_epochs=1: no such key"),
    ("+optimizer.foo=1", "optimizer.foo=1: no such key; allowed are ", "momentum"),
    ("+data.foo=1", "data.foo=1: no such key; allowed are ", "val_size"),
    ("+data.seed=1", "data.seed=1: no such key"),
    ("+scheduler.foo=1", "scheduler.foo=1: no such key; allowed are warmup_epochs, final"),
    ("+scheduler.total_steps=1", "scheduler.total_steps=1: no such key"),
    ("+method.foo=1", "method.foo=1: no such key; allowed are rho, "),
    ("+method.seed=1", "method.seed=1: no such key"),
    ("+callbacks.best.monitr=x", "callbacks.best.monitr=x: no such key; did you mean monitor?"),
    ("model._target_=sam_lightning.models.Net", "model._target_=sam_lightning.models.Net: "),
    ("optimizer.momentum=0", "optimizer: Nesterov momentum requires a momentum"),
    ("callbacks.best.mode=most", "callbacks.best: `mode` can be min, max but got most"),
    ("model.width=1000000", "model: ", "can't allocate memory"),
    ("model.stem=foo", "model.stem=foo: allowed is cifar, imagenet"),
    ("+trainer.max_steps=-7", "trainer: `max_steps` must be a non-negative integer or -1"),
    (
        "+trainer.limit_train_batches=-1",
        "trainer: You have passed invalid value -1 for limit_train_batches",
    ),
    ("+trainer.val_check_interval=0", "trainer.val_check_interval=0: allowed is a number > 0"),
    (
        "+trainer.profiler=nope",
        "for the `profiler` parameter of `Trainer`, it can only be one of [",
    ),
    ("+trainer.profiler.x=1", "trainer.profiler={'x': 1}: allowed is a text, or null"),
    ("+trainer.benchmark=abc", "trainer.benchmark=abc: allowed is true, false, null"),
    ("+trainer.min_epochs=abc", "trainer.min_epochs=abc: allowed is a whole number >= 0, or null"),
    ("+trainer.model_registry=3", "trainer.model_registry=3: allowed is a text, or null"),
    ("logger.tensorboard.name=3", "logger.tensorboard.name=3: allowed is a text, or null"),
    # code of one's own
    ("model._target_=my_project.Net", "=my_project.Net: cannot import my_project (No module named"),
    ("model._target_=torchvision.models.resnet1", "there is no resnet1 in torchvision.models; did"),
    ("model=custom model._target_=os.getcwd", "model._target_=os.getcwd: returned a str; must be"),
    ("model=custom model._target_=torch.optim.SGD", "=torch.optim.SGD: must be a class of kind "),
    ("model=custom model._target_=os.sep", "model._target_=os.sep: must be a class of kind "),
    (
        "model=custom model._target_=torchvision.models.resnet18",
        "model._target_=torchvision.models.resnet18: does not take images of 1 x 32 x 32 (Given",
        "1 channels instead); torchvision.models.resnet18 has no parameter for in_channels=1",
    ),
    (
        "model._target_=torchvision.models.resnet18",
        "model.width=",
        "unexpected keyword argument 'width'",
    ),
    (
        "model=custom model._target_=torch.nn.Flatten",
        "model._target_=torch.nn.Flatten: returns (2, 1024) for 2 images; must be (2, 10), a logit",
    ),
    ("optimizer._target_=torch.nn.Linear", "=torch.nn.Linear: must be a class of kind torch.opti"),
    ("scheduler._target_=os.getcwd", "scheduler.warmup_epochs=0: no such key"),
    ("callbacks.last._target_=os.getcwd", "callbacks.last.dirpath=", ": no such key"),
    ("+callbacks.x._target_=os.getcwd", "callbacks.x._target_=os.getcwd: returned a str; must be"),
    # this machine
    ("trainer=cuda", "trainer.accelerator=cuda: there is no CUDA GPU here; use cpu or auto"),
    ("trainer.sync_batchnorm=true", "trainer.sync_batchnorm=true: PyTorch has it for GPUs only;"),
    ("trainer.devices=[0]", "trainer.devices=[0]: indices are for GPUs; give a number"),
    ("trainer.devices=3", "batch_size=128: ", "must be a multiple of their number, 3"),
    (
        "trainer.num_nodes=2",
        "trainer.num_nodes=2: NODE_RANK is not set on ",
        "; give each host one",
    ),
    # the data
    ("data.val_size=1438", "data.val_size=1438: must come to 1..1437 of the 1438 training"),
    ("augment.crop.padding=33", "augment.crop.padding=33: must be <= 32 for images of 32 x 32 pi"),
    (
        "augment.cutout.side=33",
        "augment.cutout.side=33: must be <= 32 for images of 32 x 32 pixels",
    ),
    ("augment.mixup=0.2", "augment.mixup=0.2: allowed is null, or keys below it"),
    ("augment.mixup.alpha=-1", "augment.mixup.alpha=-1: must be a number >= 0"),
    (
        "+augment.x._target_=torchvision.transforms.v2.Grayscale +augment.x.num_output_channels=3",
        "augment.x: returns torch.uint8 (3, 32, 32) for images of torch.uint8 (1, 32, 32)",
    ),
    (
        "augment=randaugment augment.policy.magnitude=31",
        "augment.policy.magnitude=31: must be in 0..30",
    ),
    ("loss.class_weights=[1,2]", "loss.class_weights=[1, 2]: must be 10 numbers >= 0, one for"),
    ("loss=custom loss._target_=torch.nn.L1Loss", "loss: does not take logits 2 x 10 and labels"),
    (
        "label_smoothing=0.1 loss=custom loss._target_=torch.nn.MultiMarginLoss",
        "label_smoothing=0.1: must be 0 with loss.smoothing=null, as loss._target_=torch.nn.Multi",
    ),
    ("data=cifar10 data.root={tmp} data.download=false", "data.root=", "cannot load CIFAR10"),
    ("data=cifar10 data.root={tmp}/damaged data.download=false", "cannot load CIFAR10"),
    ("data=image_folder data.root={tmp}/damaged", "data.root=", "no folder", "train/<class>/*"),
    ("data=cifar10 data.root={tmp}/text.ckpt", "data.root=", "cannot load CIFAR10"),
    # the checkpoint
    ("ckpt_path={tmp}/text.ckpt", "text.ckpt: not a readable checkpoint of a run"),
    ("ckpt_path={tmp}/empty.ckpt", "empty.ckpt: not a readable checkpoint of a run"),
    ("ckpt_path={tmp}/damaged", "damaged: there is no checkpoint in it"),
    ("ckpt_path={tmp}/weights.ckpt", "weights.ckpt: not a readable checkpoint of a run"),
    ("ckpt_path={tmp}/width16.ckpt", "width16.ckpt: no run can continue from it"),
]


@pytest.mark.parametrize("row", HEAVY, ids=lambda row: row[0])
def test_wrong_input_is_refused_before_training(heavy, tmp_path, row):
    damaged = tmp_path / "damaged" / "cifar-10-batches-py"
    damaged.mkdir(parents=True)
    (damaged / "data_batch_1").write_text("no pickle")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "empty.ckpt").touch()
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "weights.ckpt")
    width16 = {"_target_": "sam_lightning.models.SAMResNet18", "width": 16}
    wider = {"state_dict": {}, "global_step": 0, "hyper_parameters": {"model": width16}}
    torch.save(wider, tmp_path / "width16.ckpt")
    arguments, *fragments = row
    result = heavy(tmp_path, *small(arguments), *arguments.format(tmp=tmp_path).split())
    assert_refused(result, *fragments)


@pytest.mark.long
@pytest.mark.slow
def test_an_error_of_all_ranks_is_one_line(heavy, tmp_path):
    unvalidated = ["optimized_metric=val/acc", "data.val_size=50", "+trainer.limit_val_batches=0"]
    result = heavy(tmp_path, *SMALL, "trainer.devices=2", *unvalidated)
    assert_refused(result, "optimized_metric=val/acc: there is no validation with no validation ")


def test_a_run_that_fails_ends_in_one_line_and_keeps_its_folder(heavy, tmp_path):
    result = heavy(tmp_path, *SMALL, "batch_size=50", "lr=1e30", "max_skipped_steps=1")
    assert result.code == 1
    assert result.err.startswith("error: 1 steps in a row had a gradient that is not finite")
    assert result.err.count("\n") == 1
    assert "metrics.json" in result.left


def test_a_metric_that_will_not_be_logged_is_found_before_it_trains(heavy, tmp_path):
    unvalidated = ["data.val_size=50", "trainer.check_val_every_n_epoch=2"]  # in one epoch
    result = heavy(tmp_path, *SMALL, *unvalidated, "optimized_metric=val/acc")
    assert_refused(result, "error: optimized_metric=val/acc: the first validation is after 2 steps")
