"""The machine as the tests see it: one thread a process, and no GPU but with ``-m gpu``."""

import os
from pathlib import Path

import pytest

# The models of the tests are small, and threads that share cores wait. Set before torch is
# imported, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# For the processes of torchrun, which run test files as scripts.
helpers = str(Path(__file__).parent / "helpers")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [helpers, os.environ.get("PYTHONPATH")]))


def pytest_configure(config: pytest.Config) -> None:
    """Hide CUDA's GPUs, so that ``trainer=auto`` is the same with and without them."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str) -> None:
    """End the run at once if a worker dies, as from a fault in a native library.

    The others would go on for minutes, and what was left to the worker would not run.
    """
    pytest.exit(f"a worker of the test runner died in {crashitem}", returncode=1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what needs a GPU where there is none."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
