"""Packages that cannot live in one environment take turns: one process each, one training step at a time, never two at once.

A worker script calls `take_over_stdout()` first and `wait_for_turn()` before every step: the first call says that it is ready, each later one
reports the seconds since the last turn began, and all wait for a line on standard input. `Worker` is the other end. Standard library only, so
that any environment can use it.
"""

import os
import subprocess
import sys
import time

_pipe = None  # where a worker reports
_began = None


def take_over_stdout() -> None:
    "From now on this process prints to stderr and reports to the real stdout."
    global _pipe
    _pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def wait_for_turn() -> None:
    "Report the step just done, if any, and wait for the next turn; ends the process when there is none."
    global _began
    print("ready" if _began is None else f"{time.perf_counter() - _began:.6f}", file=_pipe, flush=True)
    if not sys.stdin.readline():
        os._exit(0)
    _began = time.perf_counter()


class Worker:
    "A worker process, ready for its first turn."

    def __init__(self, python: str, script: str, *arguments: str):
        self.process = subprocess.Popen([python, script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read("ready")

    def _read(self, expected: str | None = None) -> str:
        line = self.process.stdout.readline().strip()
        if not line or (expected and line != expected):
            self.process.kill()
            raise RuntimeError(f"{self.process.args[1]} said {line!r} and ended with status {self.process.wait()}; its messages are above")
        return line

    def step(self) -> float:
        "One training step; its seconds."
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
