"""``python -m sam_lightning COMMAND``."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sam_lightning import __main__ as front
from sam_lightning.__main__ import COMMANDS

HEAVY = ["torch", "lightning", "matplotlib", "pandas", "scipy"]


def run(*arguments):
    """Run a command; the last line of its output says what it has imported."""
    program = f"""
import sys
from sam_lightning.__main__ import main
try:
    main()
finally:
    print(*(name for name in {HEAVY} if name in sys.modules), sep=",")
"""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True
    )


def assert_one_line(done, text):
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {text}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == "\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_alone_it_lists_its_commands(arguments):
    shown = run(*arguments)
    assert shown.returncode == 0
    for name, (_, about) in COMMANDS.items():
        assert any(line.split() == [name, *about.split()] for line in shown.stdout.splitlines())
    assert shown.stdout.endswith("\n\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_light(name):
    shown = run(name, "--help")
    assert shown.returncode == 0
    assert f"python -m sam_lightning {name} " in shown.stdout
    assert ("\n  jobs=null              runs at a time; " in shown.stdout) == (name == "study")
    keys = shown.stdout.partition("Keys, here with")[2].splitlines()[1:-1]
    assert all(re.fullmatch(r"  \S+=\S* +\S.*", key) for key in keys), keys
    assert shown.stdout.endswith("\n\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_arguments_are_refused_before_anything_heavy_is_loaded(name):
    assert_one_line(run(name, "ckpt_pth=x"), "ckpt_pth=x: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("evalute", "evalute: no such command; did you mean evaluate?"),
        ("", ": no such command; allowed are evaluate, "),
        ("os.system", "os.system: no such command; allowed are evaluate, "),
    ],
)
def test_an_unknown_command(name, message):
    assert_one_line(run(name), message)


def test_commands_that_need_the_configuration_say_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(front, "CONF", tmp_path / "conf")
    monkeypatch.setattr("sys.argv", ["sam-lightning", "cost", "rho=0"])
    with pytest.raises(SystemExit) as end:
        front.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: cost: needs the folder conf of a clone")


def test_it_is_installed_as_a_program():
    shown = subprocess.run(
        [Path(sys.executable).with_name("sam-lightning")], capture_output=True, text=True
    )
    assert shown.returncode == 0
    assert "evaluate" in shown.stdout
