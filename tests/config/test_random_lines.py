"""Random wrong command lines: exit code 2, one line that names the argument, and nothing left."""

import random

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from commands import SMALL, serve
from sam_lightning.config.conf import CONF, DEFAULTS, choices, flat, is_group

NONSENSE = (
    *("[", "{a", "'", "[[[1]]]", "{a: {b: 1}}", "nope nope", "${nope}", "${oc.env:NOPE}", "???"),
    *("nan", "1e400", "\x1b[31m", "\u202eabc", "[/b]", "a=b", "💥", "x" * 5000, "[" * 60),
)


def lines(draw, keys):
    """Without end: a wrong value, key, choice or flag, alone or between jobs of a sweep."""
    groups = [folder.name for folder in CONF.iterdir() if is_group(folder.name)]
    while True:
        key, wrong, group = draw.choice(keys), draw.choice(NONSENSE), draw.choice(groups)
        if key.endswith(("name", "path", "root", "dir")):
            continue  # any text may be right
        yield draw.choice(
            [
                [f"{key}={wrong}"],
                [f"{key[:-1]}={draw.random()}", f"{key}x=1"],
                [f"++{key}.x.y={wrong}", "rho=nan"],
                [f"{group}={draw.choice(choices(group))}x"],
                [f"{draw.choice(['', '+', '++', '~'])}{group}=[[{wrong}]]"],
                [f"{key}@x={wrong}"],
                ["-m", "seed=0,1", f"{group}={draw.choice(choices(group))},nope"],
                [f"--{key}", f"{key}=1"],
                [f"hydra.{draw.choice(['run.dir', 'job_logging.version'])}={{a: 1}}"],
            ]
        )


@pytest.mark.long
def test_random_wrong_lines_end_in_one_line_and_leave_nothing(tmp_path):
    with initialize_config_dir(str(CONF), **DEFAULTS):
        cfg = compose("train", ["data=digits", "output_dir=x"])
    keys = [*flat(OmegaConf.to_container(cfg))]
    drawn = lines(random.Random(0), keys)
    command = serve("sam_lightning.cli", "sam_lightning.training.run", "sklearn.datasets")
    light = next(command)
    for i in range(30):
        arguments = next(drawn)
        (folder := tmp_path / str(i)).mkdir()
        given = {a.partition("=")[0].lstrip("+~") for a in arguments}
        result = light(folder, *(s for s in SMALL if s.partition("=")[0] not in given), *arguments)
        told = (result.code, result.err.startswith("error: "), result.err.count("\n"), result.left)
        assert told == (2, True, 1, []), (arguments, result.err)
