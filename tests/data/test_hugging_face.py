"""Images in parquet files that the test writes, as those of the hub are."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
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


def rows(folder, labels, images=None, split="train", name="image", **options):
    """A file of a split, with these labels and noise, or images, as Arrow infers their types."""
    folder.mkdir(parents=True, exist_ok=True)
    images = images or [{"bytes": noise(i), "path": None} for i in range(len(labels))]
    found = [{name: image, "label": label} for image, label in zip(images, labels, strict=True)]
    file = folder / f"{split}.parquet"
    parquet.write_table(arrow.Table.from_pylist(found), file, **options)
    return file


def noise(seed):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "BMP")
    return buffer.getvalue()


def read(folder, tmp_path, **options):
    """Labels and pixels of the training images, and the whole source."""
    source = image_folder(str(folder), 9, str(tmp_path / "cache"), **options)
    return source.train.labels.tolist(), source.train.images, source


def test_images_are_bytes_in_groups_of_any_size(tmp_path):
    contents = [noise(i) for i in range(24)]
    expected = torch.stack(
        [torch.tensor(np.array(Image.open(io.BytesIO(c)))).permute(2, 0, 1) for c in contents]
    )
    labels = [i % 12 for i in range(24)]
    file = rows(tmp_path / "clone" / "data", labels, contents, name="jpg", row_group_size=5)
    schema = parquet.read_schema(file)
    parquet.write_table(schema.empty_table(), file.with_name("train-more.parquet"))
    found, images, source = read(tmp_path / "clone", tmp_path)
    assert found == labels  # by their numbers, not as texts
    assert source.classes == [str(i) for i in range(12)]
    assert torch.equal(images, expected)
    assert source.left_out == {"empty .parquet": 1}
    with parquet.ParquetWriter(file, schema) as writer:
        for part in (
            schema.empty_table(),
            arrow.Table.from_pylist(
                [
                    {"jpg": content, "label": label}
                    for content, label in zip(contents, labels, strict=True)
                ],
                schema,
            ),
        ):
            writer.write_table(part)
    found, images, _ = read(tmp_path / "clone", tmp_path)
    assert found == labels
    assert torch.equal(images, expected)
    file.rename(file.with_name("0000.parquet"))
    file.with_name("train-more.parquet").unlink()
    found, _, source = read(tmp_path / "clone", tmp_path, split=0.5)
    assert len(found) == len(source.test) == 12
    said = one_line_error(read, tmp_path / "clone", tmp_path)
    assert said.endswith("no split train, only all; give data.split")


@pytest.mark.parametrize("missing", [None, -1, ""])
def test_rows_without_a_label_are_left_out(tmp_path, missing):
    labels = [0, 1, missing, 1] if missing != "" else ["0", "1", "", "1"]
    rows(tmp_path / "set", labels)
    rows(tmp_path / "set", [missing] * 3, split="test")
    found, images, source = read(tmp_path / "set", tmp_path)
    assert found == [0, 1, 1]
    assert source.test is None
    assert source.left_out == {"images without a label": 4}
    pixels = np.array(Image.open(io.BytesIO(noise(3))))
    assert torch.equal(images[2].permute(1, 2, 0), torch.tensor(pixels))


def test_pixels_that_changed_at_the_same_time_and_length_are_seen(tmp_path):
    file = rows(tmp_path / "set", [0, 1])
    _, before, _ = read(tmp_path / "set", tmp_path)
    content, status = bytearray(file.read_bytes()), file.stat()
    content[content.index(noise(0)[-60:]) + 5] ^= 255
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    _, after, _ = read(tmp_path / "set", tmp_path)
    assert (before != after).sum() == 1


LABELS = {
    "one class": ([0, 0], "needs two classes, train has 1"),
    "lists": ([[0], [1]], "labels in 'label' are of type list<"),
    "none": ([None, None], "no image of train has a label in 'label'"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_no_classes_are_refused(tmp_path, case):
    labels, said = LABELS[case]
    rows(tmp_path / "set", labels)
    assert said in one_line_error(read, tmp_path / "set", tmp_path)


def test_files_that_name_classes_differently_are_refused(tmp_path):
    root = photographs(tmp_path / "photos")
    out = write(root, tmp_path / "parquet")
    for split, said in (("test", "test has other columns or classes"), ("train", "has other clas")):
        file = out / f"{split}-00000-of-00002.parquet"
        table = parquet.read_table(file)
        about = table.schema.metadata[b"huggingface"].replace(b'"ant", "bee"', b'"bee", "ant"')
        assert about != table.schema.metadata[b"huggingface"]
        parquet.write_table(table.replace_schema_metadata({"huggingface": about}), file)
        if split == "test":
            (out / "test-00001-of-00002.parquet").unlink()
        assert said in one_line_error(read, out, tmp_path)


def test_a_row_without_an_image_is_broken(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # which would be waited for
    images = [{"bytes": noise(i), "path": None} for i in range(4)]
    images += [None, {"bytes": None, "path": None}, {"bytes": None, "path": f"{tmp_path}/pipe"}]
    rows(tmp_path / "set", [0, 1, 0, 1, 0, 1, 0], images)
    said = one_line_error(read, tmp_path / "set", tmp_path)
    assert said.startswith("data.root: 3 of 7 images cannot be decoded: ")
    assert "train/00000004 (its row has no image), train/00000005 (its row" in said
    assert "train/00000006 (is no ordinary file)" in said


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
