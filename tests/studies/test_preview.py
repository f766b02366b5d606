"""``preview``: what it counts, what it draws, what it refuses."""

import numpy as np
import pytest
from PIL import Image

from image_files import write_images
from sam_lightning.config.errors import ConfigError
from sam_lightning.studies import preview


@pytest.mark.parametrize("colour", [False, True])
def test_a_preview_counts_and_draws_what_the_network_sees(tmp_path, monkeypatch, capsys, colour):
    monkeypatch.chdir(tmp_path)
    arguments = ["data=digits", "data.val_size=100"]
    if colour:
        for i, cls in enumerate(("ant", "a $b$ [b] 照片")):
            (tmp_path / "photos" / cls).mkdir(parents=True)
            for j in range(10):
                pixels = np.full((30 + j, 40, 3), 255 * np.eye(3)[i], np.uint8)
                pixels[:, 18:22] = 255
                Image.fromarray(pixels).save(tmp_path / "photos" / cls / f"{j}.png")
        (tmp_path / "photos" / "ant" / "broken.png").write_bytes(b"no image")
        (tmp_path / "photos" / "ant" / "notes.txt").touch()
        arguments = ["data=image_folder", "data.root=photos", "data.split=[0.5,0.2,0.3]"]
        arguments += ["data.image_size=24", "augment=none"]
    preview.main([*arguments, "out=seen.png", "images=6"])
    out = capsys.readouterr().out
    if not colour:
        assert "1,338" in out
        assert "the network sees 32 x 32 pixels, grey" in out
        return
    assert "│ a $b$ [b] 照片 │" in out
    assert "the network sees 24 x 24 pixels, RGB" in out
    assert "not used: 1 .txt, 1 broken" in out
    assert "broken: ant/broken.png (cannot identify image file)" in out
    assert "height of files, train" in out
    with Image.open("seen.png") as image:
        seen = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for pure in ((255, 0, 0), (0, 255, 0)):  # as they were, after normalisation and back
        assert (np.abs(seen.astype(int) - pure).max(1) <= 1).sum() > 10_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "photos", "seen.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data=digits", "out=a.jpg"], r"^out=a.jpg: must be a file that ends in \.png"),
        (["data=digits", "-m"], "^-m: no such flag"),
        (["data=digits", "images=0"], "^images=0: allowed is a whole number >= 1"),
        (["data=digit"], "^data=digit: allowed are "),
        (["ckpt_path=/"], "^ckpt_path=/: is not the folder of a run, and in none"),
        (["data=image_folder", "data.root=gone"], "^data.root=gone: no such folder"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        preview.main(arguments)
    assert [*tmp_path.iterdir()] == []


def test_images_that_training_would_refuse_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos")
    Image.new("RGB", (5, 4)).save(tmp_path / "photos" / "train" / "ant" / "0.png")
    with pytest.raises(ConfigError, match=r"set data\.image_size"):
        preview.main(["data=image_folder", "data.root=photos"])
