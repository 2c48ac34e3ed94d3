"""What does a second thread bring, and what does it cost beside other work? Steps of the embedded network, forth and back, with one thread and with two.

    python benchmarks/threads.py

Two cores are compared with one in a process of their own each, since the number of threads is a process's; both stand ready and take a step by turns, first on
the machine as it is found (its load average is noted), then beside one more process that keeps a core busy. Written to data/results/threads.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from e2e_sae_nb.core import data_path, provenance, write_json

OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "threads.json"
SHAPES = {"embedded, 4 x 256": ("embedded", 4, 256), "embedded, 4 x 64": ("embedded", 4, 64), "tiny, 4 x 8": ("tiny", 4, 8)}


def stepper(threads: int) -> None:
    "Answer each line 'shape' on stdin with the seconds of a pass forth and back through all blocks."
    import torch

    from e2e_sae_nb.compiling import pass_seconds
    from e2e_sae_nb.models import load_subject, tiny_subject

    torch.set_num_threads(threads)
    subjects = {"embedded": load_subject(data_path("docstrings-lm"), device="cpu"), "tiny": tiny_subject("gpt2")}
    print("ready", flush=True)
    for line in sys.stdin:
        name, rows, length = SHAPES[line.strip()]
        tokens = torch.randint(subjects[name].vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
        print(pass_seconds(subjects[name], tokens), flush=True)


def neighbour() -> None:
    "Keep one core busy."
    import torch

    torch.set_num_threads(1)
    a = torch.randn(512, 512)
    print("ready", flush=True)
    while True:
        a = torch.nn.functional.normalize(a @ a)


def start(*arguments: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} | {"E2E_SAE_PROGRESS": "0"}
    process = subprocess.Popen([sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline().strip() == "ready"
    return process


def ask(process: subprocess.Popen, shape: str) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(shape + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=15)
    options.add_argument("--out", type=Path, default=OUT)
    options.add_argument("--stepper", type=int)
    options.add_argument("--neighbour", action="store_true")
    chosen = options.parse_args()
    if chosen.neighbour:
        return neighbour()
    if chosen.stepper:
        return stepper(chosen.stepper)
    began, results = time.perf_counter(), []
    steppers, beside = {n: start("--stepper", str(n)) for n in (1, 2)}, None
    try:
        for situation in ("as found", "beside one process more"):
            if situation != "as found":
                beside = start("--neighbour")
            for shape in SHAPES:
                times = {n: [ask(process, shape)] for n, process in steppers.items()}  # warms up
                for _ in range(chosen.steps):
                    for n, process in steppers.items():
                        times[n].append(ask(process, shape))
                medians = {n: statistics.median(found[1:]) for n, found in times.items()}
                results.append({"situation": situation, "shape": shape, "seconds": {str(n): value for n, value in medians.items()},
                                "speedup_of_two": medians[1] / medians[2], "load_average": os.getloadavg()[0]})
                print(results[-1], file=sys.stderr, flush=True)
    finally:
        for process in (*steppers.values(), *([beside] if beside else [])):
            process.kill()
            process.wait()
    write_json(chosen.out, {"results": results, "cores": os.cpu_count(), "steps": chosen.steps, "provenance": provenance(
        {"steps": chosen.steps, "shapes": SHAPES}, seed=0, seconds=time.perf_counter() - began, command="python benchmarks/threads.py")})


if __name__ == "__main__":
    main()
