"""Our training steps beside those of other packages, each in its own environment, on one machine, taking turns.

    python -m venv sparsify-env && sparsify-env/bin/pip install eai-sparsify==1.3.3
    python benchmarks/peers/compare.py sparsify --python sparsify-env/bin/python

    python -m venv e2e-env && e2e-env/bin/pip install "transformer-lens<3" "transformers<5" "numpy<2" "pyarrow<18" "pandas<2.3" "datasets<4" wandb fire python-dotenv
    python benchmarks/peers/compare.py e2e_sae --python e2e-env/bin/python --checkout FOLDER-THAT-HOLDS-e2e_sae

Writes data/results/peers_sparsify.json or peers_e2e_sae.json: median seconds per step after the first, tokens per second, ratios. GPT-2-small
shape: 12 x 768, vocabulary 50,257, layer 6, 46,080 latents, about 50 active, batch 4 x 128.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from turns import Worker

from e2e_sae_nb.core import Stopwatch, provenance, write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent.parent / "data" / "results"
BATCH, CONTEXT = 4, 128
PAIRS = {"sparsify": {"local": "fvu", "e2e": "kl"}, "e2e_sae": {"local": "local", "e2e": "e2e", "e2e+ds": "e2e+ds"}}
OURS = {"sparsify": ("ours", "ours bfloat16", "ours bfloat16 compiled"), "e2e_sae": ("reference", "ours", "ours bfloat16")}
VERSIONS = """
import importlib.metadata as m
for name in ("torch", "transformers", "transformer-lens", "eai-sparsify", "e2e-sae"):
    try: print(name, m.version(name))
    except m.PackageNotFoundError: pass
"""


def compare(peer: str, python: str, checkout: str | None, steps: int) -> list[dict]:
    rows = []
    for ours, theirs in PAIRS[peer].items():
        extra = [str(steps + 1)] if peer == "sparsify" else [checkout] if checkout else []
        workers = {peer: Worker(python, str(HERE / f"worker_{peer}.py"), theirs, str(BATCH), str(CONTEXT), *extra)}
        for side in OURS[peer]:
            workers[side] = Worker(sys.executable, str(HERE / "worker_ours.py"), ours, side, str(BATCH), str(CONTEXT))
        seconds = {name: [] for name in workers}
        for _ in range(steps + 1):
            for name, worker in workers.items():
                seconds[name].append(worker.step())
        for worker in workers.values():
            worker.close()
        middle = {name: sorted(times[1:])[len(times[1:]) // 2] for name, times in seconds.items()}
        rows.append({"objective": ours, "peer_mode": theirs, "tokens_per_second": {name: BATCH * CONTEXT / s for name, s in middle.items()},
                     "ratios": {name: middle[peer] / s for name, s in middle.items()}})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=list(PAIRS))
    parser.add_argument("--python", required=True, help="of the environment that has the peer")
    parser.add_argument("--checkout", help="a folder with e2e_sae, if it is not installed there")
    parser.add_argument("--steps", type=int, default=5)
    given, clock = parser.parse_args(), Stopwatch()
    lines = subprocess.run([given.python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = compare(given.peer, given.python, given.checkout, given.steps)
    write_json(RESULTS / f"peers_{given.peer}.json", {
        "results": rows, "batch": [BATCH, CONTEXT], "steps": given.steps, "peer_versions": dict(line.split() for line in lines),
        "provenance": provenance({"peer": given.peer, "steps": given.steps}, seed=0, seconds=float(clock), command=f"python benchmarks/peers/compare.py {given.peer}")})


if __name__ == "__main__":
    main()
