"""Run a command and print its exit code, seconds and peak memory: python child.py COMMAND ...

It needs a process of its own: Linux counts the memory of the process that starts a command in the
command's peak, and a process that has loaded torch is larger than the command.
"""

import json
import os
import subprocess
import sys
import time


def main() -> None:
    """Run the command with its output on our stderr."""
    started = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    # Linux counts in kilobytes, macOS in bytes
    megabytes = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    print(json.dumps({"code": code, "seconds": seconds, "megabytes": megabytes}))


if __name__ == "__main__":
    main()
