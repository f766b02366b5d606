"""``python train.py --help``, read from the files in ``conf`` and so always what they say."""

from pathlib import Path

HEAD = """\
Train an image classifier with Sharpness-Aware Minimization.

python train.py [group=choice ...] [key=value ...]
python train.py -m key=value,value ...              a sweep: one run for each combination
python train.py [...] --cfg job                     print the whole configuration, train nothing
python train.py ckpt_path=RUN/checkpoints/last.ckpt resume
python -m sam_lightning study conf/study/NAME.yaml  a study: methods x settings x seeds
"""


def usage(conf: Path) -> str:
    """The groups with their choices, and the top-level keys with their comments."""
    lines = [HEAD, "Groups (a choice is the file conf/<group>/<choice>.yaml):"]
    for group in sorted(folder for folder in conf.iterdir() if folder.is_dir()):
        if group.name == "study":  # no group: files of sam_lightning.studies.study
            continue
        choices = sorted({file.stem for file in group.glob("*.yaml")} - {"base"})
        lines.append(f"  {group.name + ':':<11} {', '.join(choices)}")
    lines += ["", "Keys, here with their defaults; those of a group are model.width and the like:"]
    text = (conf / "train.yaml").read_text()
    _, _, keys = text[: text.index("\nhydra:")].partition("\n\n")
    lines += [f"  {line}".rstrip() for line in keys.splitlines()]
    return "\n".join([*lines, "", "Of Hydra itself: --hydra-help"])
