"""The files in ``conf``: groups, choices, keys, and the help made from them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra.utils
import yaml  # type: ignore[import-untyped]
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

LOADER = yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # Hydra reads with it too
CONF = Path(__file__).parents[2] / "conf"
# Hydra 1.3 asks which defaults it shall have. Hydra 1.4 warns of that, and asks whose code
# hydra.main may run: anybody's, as only the user's own command line and ``conf`` get there.
OLD = hydra.__version__.startswith("1.3.")
DEFAULTS: dict[str, Any] = {"version_base": "1.3"} if OLD else {}
ANY_CODE = "UNSAFE_DISABLE_EXECUTION_CHECKS"
MAIN = DEFAULTS if OLD else {"execution_whitelist": vars(hydra.utils)[ANY_CODE]}
register_resolver = vars(OmegaConf)["register_new_resolver" if OLD else "register_resolver"]
HEAD = """\
Train an image classifier with Sharpness-Aware Minimization.

python train.py [group=choice ...] [key=value ...]
python train.py -m key=value,value ...              a sweep: one run for each combination
python train.py [...] --cfg job                     print the whole configuration, train nothing
python train.py ckpt_path=RUN/checkpoints/last.ckpt resume
python -m sam_lightning study conf/study/NAME.yaml  a study: methods x settings x seeds

Groups (a choice is the file conf/<group>/<choice>.yaml):"""


def is_group(key: str) -> bool:
    """Whether ``key=...`` chooses a file. Those of conf/study are for another command."""
    return key not in ("", "study") and (CONF / key).is_dir()


def choices(group: str) -> list[str]:
    """What a group can be."""
    return sorted({file.stem for file in (CONF / group).glob("*.yaml")} - {"base"})


def top_level() -> list[str]:
    """The keys that may stand at the top of a configuration, and the names of its groups."""
    primary = yaml.load((CONF / "train.yaml").read_text(), LOADER)
    groups = [group for entry in primary["defaults"] if isinstance(entry, dict) for group in entry]
    return [*groups, *(key for key in primary if key not in ("defaults", "hydra"))]


def folders_given(arguments: list[str]) -> list[Path]:
    """The folders of configuration files that a command line adds to ``conf``."""
    given, _ = get_args_parser().parse_known_args(arguments)
    return [Path(folder) for folder in (given.config_path, given.config_dir) if folder]


def package_of(file: Path, folder: Path) -> str:
    """Where Hydra puts the content of a file: ``model.``, or nothing for the top."""
    group = ".".join(file.relative_to(folder).parts[:-1])
    found = re.match(r"# @package (\S+)", file.read_text(encoding="utf-8"))
    package = found[1] if found else "_group_"
    package = {"_global_": "", "_group_": group}.get(package, package)
    return f"{package}." if package else ""


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Every key of nested plain dictionaries in dotted form, with its value."""
    values: dict[str, Any] = {}
    for name, child in node.items():
        values[f"{prefix}{name}"] = child
        if isinstance(child, dict):
            values |= flat(child, f"{prefix}{name}.")
    return values


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Nested dictionaries and lists with every key and value changed."""
    if isinstance(value, dict):
        return {change(key): mapped(change, child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(change, child) for child in value]
    return change(value)


def usage() -> str:
    """``python train.py --help``: groups with their choices, top-level keys with their comments."""
    groups = [folder.name for folder in sorted(CONF.iterdir()) if is_group(folder.name)]
    lines = [HEAD, *(f"  {group + ':':<11} {', '.join(choices(group))}" for group in groups), ""]
    lines += ["Keys with their defaults; the keys of a group are written as model.width:"]
    text = (CONF / "train.yaml").read_text()
    _, _, keys = text[: text.index("\nhydra:")].partition("\n\n")
    lines += [f"  {line}".rstrip() for line in keys.splitlines()]
    return "\n".join([*lines, "", "Hydra's own flags: --hydra-help"])
