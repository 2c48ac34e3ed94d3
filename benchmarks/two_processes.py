"""What do two processes gain? One with one thread, one with two, and two with one each train in turns on the same machine.

`python benchmarks/two_processes.py` writes data/results/two_processes.json (some minutes on 2 cores, which should have nothing else to do): tokens per
second of the embedded model's e2e and local steps, with one batch per step and with four, as ratios to one process with one thread; and the share of
the time that two processes spend on adding their gradients, waiting for each other included.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "data" / "results" / "two_processes.json"
SIDES = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}
LOSSES = {"local": {"sparsity": {"coeff": 4.0}, "out_to_in": {"coeff": 1.0}}, "e2e": {"sparsity": {"coeff": 0.8}, "logits_kl": {"coeff": 1.0}}}
BATCHES_PER_STEP, STEPS, ROUNDS = (1, 4), 4, int(os.environ.get("ROUNDS", 3))


def measure(out: str) -> None:
    "One side, started by torchrun: tokens per second of every case."
    import torch

    import e2e_sae_nb.training as training
    from e2e_sae_nb import RunConfig, load_subject
    from e2e_sae_nb.core import Stopwatch
    from e2e_sae_nb.devices import add, rank
    from e2e_sae_nb.state import begin

    subject, found, plain, waiting = load_subject("docstrings", device="cpu"), [], training.add_gradients, [0.0]

    def timed(parameters: Any) -> None:
        clock = Stopwatch()
        plain(parameters)
        waiting[0] += float(clock)

    training.add_gradients = timed
    for name, loss in LOSSES.items():
        for batches in BATCHES_PER_STEP:
            config = RunConfig.from_dict({
                "tlens_model_name": "docstrings", "train_data": {"dataset_name": "docstrings", "n_ctx": 256, "seed": 0}, "loss": loss, "lr": 1e-3,
                "saes": {"sae_positions": "blocks.3.hook_resid_pre", "dict_size_to_input_ratio": 16}, "n_samples": 10_000, "batch_size": 4,
                "effective_batch_size": 4 * batches, "save_dir": None, "collect_act_frequency_every_n_samples": 0})
            t = begin(config, subject)
            training.train_step(t)
            add(torch.zeros(1), "batch")  # begin together
            before, clock, waiting[0] = t.tokens, Stopwatch(), 0.0
            for _ in range(STEPS):
                training.train_step(t)
            seconds = float(clock)
            found.append({"objective": name, "batches_per_step": batches, "tokens_per_second": (t.tokens - before) / seconds,
                          "share_of_adding_gradients": waiting[0] / seconds,
                          "gradient_bytes": sum(p.numel() * p.element_size() for sae in t.saes.values() for p in sae.parameters())})
    if rank() == 0:
        Path(out).write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    from e2e_sae_nb.core import Stopwatch, provenance, write_json

    clock, rounds = Stopwatch(), {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            for side, (processes, threads) in SIDES.items():
                path = f"{folder}/found.json"
                environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "E2E_SAE_PROGRESS": "0"}
                subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__, path],
                               env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                rounds[side].append(json.loads(Path(path).read_text(encoding="utf-8")))
                print(side, [round(case["tokens_per_second"]) for case in rounds[side][-1]], file=sys.stderr, flush=True)
    one = rounds["1 process, 1 thread"]
    results = []
    for i, case in enumerate(one[0]):
        speeds = {side: [found[i]["tokens_per_second"] for found in several] for side, several in rounds.items()}
        ratios = {side: [v / s for v, s in zip(values, speeds["1 process, 1 thread"], strict=True)] for side, values in speeds.items()}
        adding = [found[i]["share_of_adding_gradients"] for found in rounds["2 processes, 1 thread each"]]
        results.append({key: case[key] for key in ("objective", "batches_per_step", "gradient_bytes")} | {
            "tokens_per_second": {side: median(values) for side, values in speeds.items()},
            "ratio": {side: median(values) for side, values in ratios.items()}, "ratios": ratios, "share_of_adding_gradients": median(adding)})
    write_json(OUT, {"results": results, "cores": os.cpu_count(), "load_average": os.getloadavg(), "provenance": provenance(
        {"rounds": ROUNDS, "steps": STEPS, "batch": [4, 256], "sides": SIDES}, seed=0, seconds=float(clock), command="python benchmarks/two_processes.py")})


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
