"""One thread a process: the models of the tests are small, and threads that share cores wait."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes tests start
