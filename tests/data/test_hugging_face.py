"""Images in parquet files that the test writes, as those of the hub are."""

import json
import os
import tarfile

import numpy as np
import pytest
import torch
from shard_files import data_of, epoch, packed, photographs

from image_files import one_line_error
from sam_lightning.data import image_folder
from sam_lightning.data.hugging_face import tables

datasets = pytest.importorskip("datasets")
arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write(root, folder, described=True, splits=("train", "test")):
    """The files of a folder of images, in two parquet files for each split."""
    folder.mkdir()
    classes = ["ant", "bee"]
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=classes)}
    )
    about = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    for split in splits:
        files = [root / name for name in getattr(image_folder(str(root), 8), split).names]
        rows = [
            {
                "picture": {"bytes": file.read_bytes(), "path": file.name},
                "kind": classes.index(file.relative_to(root / split).parts[0]),
            }
            for file in files
        ]
        if not described:
            rows = [{"image": row["picture"], "label": classes[row["kind"]]} for row in rows]
        for i, part in enumerate((rows[:7], rows[7:])):
            table = arrow.Table.from_pylist(part)
            table = table.replace_schema_metadata(about if described else None)
            parquet.write_table(table, folder / f"{split}-{i:05}-of-00002.parquet")
    return folder


@pytest.mark.parametrize("described", [True, False])
def test_batches_are_those_of_the_files(tmp_path, described):
    root = photographs(tmp_path / "photos")
    out = write(root, tmp_path / "parquet", described)
    plain, ours = data_of(root, tmp_path), data_of(out, tmp_path, num_workers=2)
    assert ours.classes == plain.classes == ["ant", "bee"]
    assert ours.sizes == plain.sizes
    assert torch.equal(ours.test.images, plain.test.images)
    for number in (0, 1):
        assert epoch(ours, number) == epoch(plain, number)
    with pytest.raises(ValueError, match=r"^window=1: must be >= 1 for images in shards"):
        data_of(out, tmp_path, window=1)
    (tmp_path / "parquet" / "test-00001-of-00002.parquet").unlink()
    assert len(data_of(out, tmp_path).test) == 7


def test_one_split_can_be_divided(tmp_path):
    root = photographs(tmp_path / "photos")
    out = write(root, tmp_path / "parquet", splits=("train",))
    data = data_of(out, tmp_path, split=[0.5, 0.25, 0.25])
    assert [len(split) for split in data.splits.values()] == [12, 6, 6]
    names = np.concatenate([[*split.names] for split in data.splits.values()])
    assert sorted(names) == [f"all/{i:08}" for i in range(24)]
    shards = packed(tmp_path / "parquet", tmp_path / "packed")
    with tarfile.open(shards / "train-000000.tar") as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"cls", "png", "jpeg"}
    whole = [data_of(root, tmp_path) for root in (out, shards)]
    assert epoch(whole[0]) == epoch(whole[1])


def test_what_cannot_be_read_is_one_line(tmp_path):
    root = photographs(tmp_path / "photos")
    out = write(root, tmp_path / "parquet")
    assert one_line_error(data_of, out, tmp_path, split=0.2).startswith("data.split=0.2: ")
    said = one_line_error(tables, "hub://nobody/nothing", None, tmp_path, False)
    assert said.startswith("data.root='hub://nobody/nothing': cannot be read (")
    file = out / "train-00000-of-00002.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    os.utime(file, (0, 0))
    assert "cannot be read" in one_line_error(data_of, out, tmp_path)
    (tmp_path / "texts").mkdir()
    parquet.write_table(arrow.table({"text": ["a"]}), tmp_path / "texts" / "train.parquet")
    said = one_line_error(data_of, tmp_path / "texts", tmp_path)
    assert said.endswith("/texts': no column of images among text")
