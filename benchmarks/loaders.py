"""Random crops of photographs by other packages, each used as its documentation says.

Each loads the images of one epoch in an order of its own, in this process.
"""

import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

View = Callable[[Any], Any]


def installed(package: str) -> Any:
    """A package of the extra bench, or None with a line that says so."""
    try:
        return import_module(package)
    except ImportError:
        print(
            f"{package} is not installed, and is left out: pip install 'sam-lightning[bench]'",
            file=sys.stderr,
        )
        return None


def webdataset_loader(package: Any, folder: Path, view: View, count: int) -> Iterable[object]:
    """WebDataset's pipeline over the shards of a folder."""
    shards = sorted(map(str, folder.glob("train-*.tar")))
    dataset = (
        package.WebDataset(shards, shardshuffle=False)  # there are no more than one or two
        .shuffle(1000)
        .decode("pilrgb")
        .to_tuple("jpg;ppm", "cls")
        .map_tuple(view, int)
        .batched(count)
    )
    loader: Iterable[object] = package.WebLoader(dataset, batch_size=None, num_workers=0)
    return loader


def datasets_loader(package: Any, files: list[Path], view: View, count: int) -> Iterable[object]:
    """A data set of Hugging Face in a parquet file, beside the image files that it is made of."""
    table, cache = files[0].parent / "images.parquet", str(files[0].parent / "tables")
    features = package.Features({"image": package.Image(), "label": package.Value("int64")})
    images = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    rows = {"image": images, "label": [*range(len(files))]}
    package.disable_progress_bars()
    package.Dataset.from_dict(rows, features).to_parquet(str(table))
    data = package.load_dataset("parquet", data_files=str(table), split="train", cache_dir=cache)

    def seen(rows: dict[str, Any]) -> dict[str, Any]:
        images = [view(image.convert("RGB")) for image in rows["image"]]
        return {"image": images, "label": rows["label"]}

    return DataLoader(data.with_transform(seen), count, shuffle=True)
