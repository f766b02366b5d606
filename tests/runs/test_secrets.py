"""Secrets of a run are in none of its files, and are asked for where they are needed."""

import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from runs import SMALL, command, only_run, summary
from sam_lightning.config.errors import ConfigError
from sam_lightning.runs.secrets import given_again, hide_secrets_of, without_secrets

SECRET = "hf_0123456789"
# A model as some on hubs are: it takes a token, and says it where that is wrong.
MODEL = f"""
import logging
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes: int, in_channels: int, token: str, fail: bool = False):
        super().__init__()
        logging.getLogger(__name__).warning("logging in with %s", token)
        if fail or token != "{SECRET}":
            raise RuntimeError(f"{{token}} is not known")
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
        self.layers(__import__("torch").zeros(1, in_channels, 32, 32))
    def forward(self, images):
        return self.layers(images)
class OSErr(Exception):
    pass
class Odd(__import__("lightning").pytorch.Callback):
    def on_train_start(self, trainer, module):
        raise OSErr("{SECRET} has gone")
"""
OWN = ["model=custom", "model._target_=own_net.Net", f"+model.token={SECRET}"]
GIVEN = [a for a in SMALL if not a.startswith("model")] + OWN
NAME = "SAM_LIGHTNING_MODEL_TOKEN"


@pytest.mark.long
@pytest.mark.slow
def test_a_models_token_is_in_no_file_and_is_asked_for(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own_net.py").write_text(MODEL)
    (cwd := tmp_path / "cwd").mkdir()
    path = os.pathsep.join([str(tmp_path / "code"), os.environ["PYTHONPATH"]])
    plain = os.environ | {"PYTHONPATH": path}
    set_again = plain | {NAME: SECRET}
    done = command(cwd, *GIVEN, env=plain)
    assert done.returncode == 0, done.stderr
    folder = only_run(cwd)
    assert summary(folder)["config"]["model"]["token"] == "***"

    def evaluate(env):
        line = [sys.executable, "-m", "sam_lightning", "evaluate", f"ckpt_path={folder}"]
        return subprocess.run(
            [*line, "trust=own_net.Net"], cwd=cwd, env=env, capture_output=True, text=True
        )

    found = evaluate(plain)
    assert found.returncode == 2
    file = folder / "checkpoints" / "last.ckpt"
    advice = f"model.token=***: was not stored; set {NAME} in the environment"
    assert found.stderr == f"error: ckpt_path={file}: {advice}\n"
    found = evaluate(set_again)
    assert found.returncode == 0, found.stderr
    again = [f"ckpt_path={folder}", "epochs=3", "model._target_=own_net.Net"]
    refused = command(cwd, *again, env=plain)
    advice = f"model.token=***: was not stored; give it again, or set {NAME} in the environment"
    assert refused.stderr == f"error: {advice}\n"
    assert command(cwd, *again, env=set_again).returncode == 0
    assert command(cwd, *again, f"+model.token={SECRET}", "epochs=4", env=plain).returncode == 0
    assert summary(folder)["epochs"] == 4
    failing = command(cwd, "-m", *GIVEN, "+model.fail=true", "seed=0,1", env=plain)
    assert failing.returncode == 2
    unexpected = command(cwd, *GIVEN, "+callbacks.odd._target_=own_net.Odd", env=plain)
    assert (unexpected.returncode, unexpected.stderr) == (1, "error: OSErr: *** has gone\n")
    assert "OSErr: *** has gone" in unexpected.stdout  # the end of a traceback
    assert SECRET not in unexpected.stdout
    for file in (p for p in cwd.rglob("*") if p.is_file()):
        assert SECRET.encode() not in file.read_bytes(), file
    assert "logging in with ***" in (folder / "train.log").read_text()


def test_what_was_not_stored_may_come_from_the_environment(monkeypatch):
    stored = {"data": {"root": "s3://***@host/a"}, "model": {"part": {"api_key": "***"}, "x": 1}}
    with pytest.raises(ConfigError, match=r"^data.root=s3://\*\*\*@host/a: was not stored; give"):
        given_again(stored)
    monkeypatch.setenv("SAM_LIGHTNING_DATA_ROOT", "s3://me:word@host/a")
    with pytest.raises(ConfigError, match="set SAM_LIGHTNING_MODEL_PART_API_KEY in the"):
        given_again(stored)
    monkeypatch.setenv("SAM_LIGHTNING_MODEL_PART_API_KEY", "123")
    found = {"data.root": "s3://me:word@host/a", "model.part.api_key": "123"}
    assert given_again(stored) == found


def test_secrets_in_lists_are_hidden_and_asked_for(monkeypatch):
    given = {"model": {"hubs": [{"name": "a", "token": "ab-cdefghi"}], "tokens": ["kl-mnopqrs"]}}
    hide_secrets_of(given)
    assert without_secrets("ab-cdefghi, kl-mnopqrs") == "***, ***"
    cfg = OmegaConf.create(without_secrets(given))
    monkeypatch.setenv("SAM_LIGHTNING_MODEL_HUBS_0_TOKEN", "ab-cdefghi")
    with pytest.raises(ConfigError, match="set SAM_LIGHTNING_MODEL_TOKENS_0 in the environment"):
        given_again(OmegaConf.to_container(cfg))
    monkeypatch.setenv("SAM_LIGHTNING_MODEL_TOKENS_0", "kl-mnopqrs")
    for key, secret in given_again(OmegaConf.to_container(cfg)).items():
        OmegaConf.update(cfg, key, secret)
    assert cfg == given
