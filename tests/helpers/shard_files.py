"""Small photographs, packed into tar shards, and what a run would get of them."""

from functools import partial

import numpy as np
from PIL import Image

from sam_lightning.data import image_folder
from sam_lightning.data.image_data import ImageData
from sam_lightning.studies.pack import main

SOURCE = ("split", "skip_broken", "cache_gb", "fetch_threads")
CROPS = {"image_size": 8, "view": "random_resized_crop"}


def photographs(root, count=12, splits=("train", "test")):
    """Noise as JPEGs and PNGs of different sizes, two classes, and what is no image."""
    generator = np.random.default_rng(0)
    for split in splits:
        for cls in ("ant", "bee"):
            (root / split / cls / "more").mkdir(parents=True)
            (root / split / cls / "notes.txt").write_text("no image")
            for i in range(count):
                pixels = generator.integers(0, 256, (*generator.integers(16, 40, 2), 3), np.uint8)
                folder = root / split / cls / ("more" if i % 3 == 0 else "")
                Image.fromarray(pixels).save(folder / f"{i}.{'jpg' if i % 2 else 'png'}")
    return root


def packed(root, out, *arguments):
    main([f"input={root}", f"out={out}", *arguments])
    return out


def data_of(root, tmp_path, **options):
    """A set as a run reads it."""
    source = {name: options.pop(name) for name in SOURCE if name in options}
    read = partial(image_folder, str(root), cache_dir=str(tmp_path / "cache"), **CROPS, **source)
    data = ImageData(read, **{"batch_size": 5, "num_workers": 0, **options})
    data.read()
    return data


def epoch(data, number=0, **loader):
    """All that training would get in an epoch."""
    return [
        (images.tolist(), labels.tolist(), key.indices.tolist())
        for images, labels, key in data.train_loader(epoch=number, **loader)
    ]
