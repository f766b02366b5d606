"""``python -m sam_lightning COMMAND``, installed as ``sam-lightning COMMAND`` too."""

from sam_lightning.config.process import importing

with importing():
    import logging
    import os
    import sys
    from importlib import import_module

    from sam_lightning.config.arguments import help_of
    from sam_lightning.config.cluster import number
    from sam_lightning.config.conf import CONF
    from sam_lightning.config.errors import ConfigError, did_you_mean, one_line_errors

# The module in the package, and what the command does. A module has main(argv).
COMMANDS = {
    "evaluate": ("inference.evaluate", "test a checkpoint: accuracies, calibration, by class"),
    "predict": ("inference.predict", "classify image files with a checkpoint"),
    "export": ("inference.export", "write a checkpoint as ONNX or for torch.export"),
    "sharpness": ("analysis.sharpness", "measure how sharp and curved the loss of checkpoints is"),
    "landscape": ("analysis.landscape", "draw the loss around checkpoints"),
    "report": ("studies.report.command", "make tables, tests and figures of runs"),
    "study": ("studies.study", "run methods x settings x seeds, then report"),
    "rerun": ("studies.rerun", "train with the settings of a run once more"),
    "diff": ("studies.diff", "compare the settings and metrics of two runs"),
    "preview": ("studies.preview", "show the data of a run, as counts and pictures"),
    "pack": ("studies.pack", "pack photographs into tar shards"),
    "list-models": ("studies.list_models", "list models: size, FLOPs, pretrained weights"),
    "cost": ("studies.cost", "estimate FLOPs and hours of a run or a sweep"),
}
NEEDS_CONF = ("study", "rerun", "cost", "preview")


def main() -> None:
    """Run the command that the first argument names; without one, list the commands."""
    with one_line_errors():
        _run(*sys.argv[1:] or ["--help"])


def _run(name: str, *rest: str) -> None:
    if name in ("-h", "--help"):
        print("python -m sam_lightning COMMAND [key=value ...]", "", "Commands:", sep="\n")
        for known, (_, about) in COMMANDS.items():
            print(f"  {known:<11} {about}")
        print("", "python -m sam_lightning COMMAND --help explains one.", sep="\n")
        print("python train.py trains; python train.py --help explains it.")
        return
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f"; allowed are {', '.join(COMMANDS)}"
        raise ConfigError(f"{name}: no such command{hint}")
    command = import_module(f"sam_lightning.{COMMANDS[name][0]}")
    if {"-h", "--help"} & {*rest}:
        print(help_of(command.ABOUT, getattr(command, "KEYS", {})))
        return
    if name in NEEDS_CONF and not CONF.is_dir():
        raise ConfigError(f"{name}: needs the folder conf of a clone; there is no {CONF}")
    processes = number("WORLD_SIZE", 1) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if processes > 1 and name != "rerun":  # which trains
        raise ConfigError(
            f"{name}: is done by one process, and torchrun has started {processes}, which would "
            "all do the same; leave torchrun out"
        )
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sam_lightning").setLevel(logging.INFO)
    command.main([*rest])


if __name__ == "__main__":
    main()
