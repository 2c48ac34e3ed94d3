"""How much end-to-end training is needed? Compute against CE gap: local, end to end from scratch, and local with a short fine-tune, per architecture.

`python benchmarks/finetune_compute.py` writes data/results/finetune_compute.json (about an hour on one core). Every run is trained alone, so that its
seconds are its own; operations are counted from shapes (e2e_sae_nb.compute). Local and end-to-end runs have several lengths; each local
run is fine-tuned on 5% and on 10% more tokens. All aim at the same number of active latents. A seed's runs of one architecture are a part; parts
that are in the file are not run again, and within a part finished runs are taken from the folder --runs. `--samples 16 --out FILE` is a quick look.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from e2e_sae_nb.compute import step_flops
from e2e_sae_nb.core import Stopwatch, provenance, read_json, write_json
from e2e_sae_nb.finetuning import finetune
from e2e_sae_nb.models import Subject, load_subject
from e2e_sae_nb.runs import Run, RunConfig, load_run
from e2e_sae_nb.training import train

PLACE, SEEDS, SAMPLES, EVALUATED, L0, N_CTX = "blocks.3.hook_resid_pre", (0, 1, 2), 640, 200, 40, 256
ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu", "gated")
LENGTHS = {"local": (0.5, 1.0), "e2e": (0.25, 0.5, 1.0)}  # shares of SAMPLES
SHARES = (0.05, 0.1)  # of a fine-tune, of the local run's tokens
LR, TUNING_LR = 1e-2, 1e-3
START = {"local": 1.2, "e2e": 0.5}  # coefficients that the target then moves
STARTS = {"jumprelu": {"local": 0.1, "e2e": 0.03}, "gated": {"local": 1.2, "e2e": 1.0}}  # where an architecture wants another
OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "finetune_compute.json"


def config(architecture: str, kind: str, seed: int, samples: int, folder: Path) -> RunConfig:
    "A run from scratch."
    takes_k = architecture in ("topk", "batchtopk")
    penalty = {"coeff": 0.0} if takes_k else {"coeff": STARTS.get(architecture, START)[kind], "target_l0": L0, "control": 0.05}
    term = {"out_to_in": {"coeff": 1.0}} if kind == "local" else {"logits_kl": {"coeff": 1.0}}
    return RunConfig.from_dict({
        "tlens_model_name": "docstrings", "seed": seed, "lr": LR, "batch_size": 2, "n_samples": samples, "warmup_samples": samples // 4, "min_lr_factor": 0.1,
        "max_grad_norm": 10.0, "compute_dtype": "auto", "compile": "auto", "eval_n_samples": min(EVALUATED, samples), "save_dir": folder,
        "collect_act_frequency_every_n_samples": 0, "loss": {"sparsity": penalty, **term}, "train_data": {"dataset_name": "docstrings", "n_ctx": N_CTX, "seed": seed},
        "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 16, "architecture": architecture, **({"k": L0} if takes_k else {})}})


def once(folder: Path, name: str, make: Callable[[str], Run]) -> Run:
    "A finished run of that name, or a new one."
    if (folder / name / "summary.json").is_file():
        return load_run(folder / name)
    number = len(list(folder.glob(f"{name}.cut*")))
    if (folder / name).exists():  # interrupted
        (folder / name).rename(folder / f"{name}.cut{number}")
    return make(name)


def facts(run: Run, subject: Subject, method: str, before: dict[str, Any] | None = None) -> dict[str, Any]:
    "A row; a fine-tune's compute includes that of the run it began with."
    s, position = run.summary, run.summary["positions"][PLACE]
    flops = step_flops(subject, PLACE, run.saes[PLACE], run.config.loss, N_CTX, position["l0"]).total * s["tokens"]
    start = before or {"tokens": 0, "flops": 0.0, "seconds": 0.0}
    return {"method": method, "architecture": run.config.saes.architecture, "seed": run.config.seed, "tokens": start["tokens"] + s["tokens"],
            "flops": start["flops"] + flops, "seconds": start["seconds"] + s["seconds"], "l0": position["l0"], "alive": position["alive"],
            "ce_increase": s["ce_increase"], "kl": s["kl"], "explained_variance": position["explained_variance"], "samples": s["samples"]}


def part(architecture: str, seed: int, samples: int, folder: Path, subject: Subject) -> list[dict[str, Any]]:
    "Every run of one architecture with one seed."
    rows = []
    for kind, lengths in LENGTHS.items():
        for length in lengths:
            n = max(4, round(length * samples) // 4 * 4)
            run = once(folder, f"{kind}_{n}", lambda name, kind=kind, n=n: train(config(architecture, kind, seed, n, folder), subject=subject, name=name))
            rows.append(facts(run, subject, kind))
            if kind == "local":
                for share in SHARES:
                    m = max(4, round(share * n) // 4 * 4)
                    tuned = once(folder, f"local_{n}_tuned_{m}", lambda name, run=run, m=m: finetune(run, m, TUNING_LR, subject=subject, wandb_run_name=name, compile=run.config.compile))
                    rows.append(facts(tuned, subject, f"local, then {share:.0%} fine-tune", rows[-1 - SHARES.index(share)]))
    return rows


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--samples", type=int, default=SAMPLES)
    options.add_argument("--out", type=Path, default=OUT)
    options.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="only these")
    options.add_argument("--runs", type=Path, default=Path("out/finetune_compute"))
    chosen = options.parse_args()
    subject = load_subject("docstrings", device="cpu")
    parts = read_json(chosen.out)["parts"] if chosen.out.is_file() else {}
    for seed in SEEDS:
        for architecture in chosen.architectures:
            name = f"{architecture} {seed}"
            if name in parts:
                continue
            clock, folder = Stopwatch(), chosen.runs / f"{chosen.samples}" / f"{architecture}_{seed}"
            rows = part(architecture, seed, chosen.samples, folder, subject)
            origin = provenance({"samples": chosen.samples, "lr": LR, "tuning_lr": TUNING_LR, "l0": L0, "architecture": architecture}, seed=seed, tokens=sum(r["tokens"] for r in rows),
                                seconds=float(clock), command="python benchmarks/finetune_compute.py")
            parts[name] = {"rows": rows, "provenance": origin}
            write_json(chosen.out, {"place": PLACE, "eval_tokens": min(EVALUATED, chosen.samples) * N_CTX, "parts": parts})
            print(name, f"{float(clock):.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
