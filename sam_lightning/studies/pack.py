"""``python -m sam_lightning pack``: photographs to tar shards."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sam_lightning.config.arguments import Keys, parse
from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.config.values import Count, Folder, Positive

ABOUT = """
Pack photographs into tar files in the layout of WebDataset, with an index beside them. They are
read faster than single files, most of all if they are small, and can be copied and stored at ease.

  python -m sam_lightning pack input=photos out=packed
  python -m sam_lightning pack input=photos out=packed side=256
  python train.py data=shards data.root=packed data.image_size=224 data.view=random_resized_crop

The input is what data=image_folder reads, or shards. Every image is decoded once, to find the
broken ones. If it is stopped, the same command goes on. The same input gives the same bytes.
"""
KEYS: Keys = {
    "input": ("???", Folder, "the folder of photographs"),
    "out": ("???", Folder, "a new folder for the shards"),
    "side": (None, Count | None, "pixels that the shorter side of larger images is resized to"),
    "format": (
        None,
        Literal["keep", "jpeg", "raw"] | None,
        "keep (the files), jpeg (quality 90) or raw (PPM); null: keep, or jpeg with a side",
    ),
    "shard_mb": (256, Positive, "most of a shard, in 10^6 bytes"),
    "skip_broken": (False, bool, "leave out images that cannot be decoded"),
}


def main(argv: Sequence[str]) -> None:
    """Pack what the arguments name."""
    options = parse(KEYS, argv)
    root, out = (Path(os.path.expanduser(options[key])) for key in ("input", "out"))
    kind = options.format or ("keep" if options.side is None else "jpeg")
    if kind == "keep" and options.side is not None:
        raise ConfigError("format=keep: keeps the files as they are; set side=null, or jpeg or raw")
    if out.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"out={options.out}: is in the input; give a folder beside it")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"out={options.out}: {there} is no folder that can be written to")
    from sam_lightning.data.listing import told
    from sam_lightning.data.packing import Packing, pack
    from sam_lightning.data.shards import listed

    how = Packing(options.side, kind, options.shard_mb, options.skip_broken)
    try:
        with tempfile.TemporaryDirectory() as folder:
            listing = listed(str(root), None, Path(folder), either=True)
    except (ConfigError, OSError) as error:
        said = one_line(error).replace("data.root=", "input=").replace("data.root: ", "input: ")
        raise ConfigError(said if "input" in said else f"input={root}: {said}") from error
    index = pack(listing, out, how)
    for name, split in index.splits.items():
        size = sum(shard.size for shard in split.shards) / 1e9
        count = len(split.arrays["label"])
        print(f"{name:<6} {count:,} images in {len(split.shards):,} shards, {size:,.2f} GB")
    if index.left_out:
        print(told(index.left_out).removeprefix("; "))
