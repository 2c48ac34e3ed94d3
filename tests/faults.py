"""Kills training at seeded random moments and checks that nothing is lost: `make faults` (see data/results/faults.json).

A run is killed (SIGKILL) and resumed again and again until it ends. After every kill each checkpoint is read with its checksums; at the
end all checkpoints, the log and the results are compared, byte for byte, with those of a run that was left alone. Every life of a run is
a process of its own that executes the command line; it is forked from a process that has done the imports, which only saves their time.
A kill counts as "during a write" if it left an unfinished checkpoint behind (a temporary folder, or an old one that had stepped aside).
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import yaml

import e2e_sae_nb.training  # noqa: F401  what the processes need, imported once
from e2e_sae_nb.checkpoint import checkpoints, load_saes, load_state, load_tensors, read_cfg
from e2e_sae_nb.cli import main
from e2e_sae_nb.core import Stopwatch, UserError, provenance, write_json
from e2e_sae_nb.demonstration import demo  # noqa: F401
from e2e_sae_nb.models import tiny_model

ROOT = Path(__file__).resolve().parent.parent
TIMES = {"seconds", "seconds_shared", "tokens_per_second", "peak_memory_bytes", "provenance", "path"}  # may differ between equal runs
CONFIG = {
    "tlens_model_path": "model", "device": "cpu", "batch_size": 8, "lr": 1e-2, "n_samples": 960, "save_every_n_samples": 48, "warmup_samples": 64,
    "eval_every_n_samples": 240, "eval_n_samples": 16, "log_every_n_grad_steps": 3, "act_frequency_n_tokens": 1000,
    "collect_act_frequency_every_n_samples": 200, "save_dir": "out",
    "train_data": {"dataset_name": "tokens.jsonl", "is_tokenized": True, "n_ctx": 16, "held_out_share": 0.1, "shuffle_buffer": 50},
    "saes": {"sae_positions": "blocks.1.hook_resid_pre", "dict_size_to_input_ratio": 32},
}
LOSS = {"sparsity": {"coeff": 0.5}, "logits_kl": {"coeff": 1.0}}
FRONTIER = {"local": {"lr": 1e-2, "sparsity": [0.5]}, "e2e": {"lr": 1e-2, "sparsity": [0.1, 1.0]}}


def prepare(folder: Path, compiled: bool = False) -> None:
    "A small random network, random tokens and the configurations, in a folder."
    tiny_model("gpt2", n_layer=3, n_embd=32, n_positions=16, vocab_size=50).save_pretrained(folder / "model")
    rng = random.Random(0)
    (folder / "tokens.jsonl").write_text("".join(json.dumps({"input_ids": rng.choices(range(50), k=16)}) + "\n" for _ in range(1500)))
    (folder / "train.yaml").write_text(yaml.safe_dump(CONFIG | {"loss": LOSS, "wandb_run_name": "run", "compile": compiled}))
    (folder / "frontier.yaml").write_text(yaml.safe_dump(CONFIG | {"frontier": FRONTIER, "save_every_n_samples": 96, "compile": compiled}))


def start(words: list[str], folder: Path) -> int:  # The process's number
    "Execute the command line in a process of its own."
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    out = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["e2e-sae", *words]
    try:
        main()  # ends the process
    finally:
        traceback.print_exc()
        os._exit(70)


def ended(process: int) -> int | None:  # Exit status, None while it runs
    number, status = os.waitpid(process, os.WNOHANG)
    return None if number == 0 else os.waitstatus_to_exitcode(status)


def unfinished(kept: list[Path]) -> list[str]:
    "What is half written below the runs' checkpoint folders."
    found = []
    for folder in kept:
        with contextlib.suppress(OSError):
            found += [entry.name for entry in os.scandir(folder) if entry.name[0] == "."]
    return found


def examine(runs: list[Path]) -> int:
    "The number of checkpoints that cannot be read in full."
    corrupt = 0
    for path in (path for run in runs for path in checkpoints(run).values()):
        try:
            load_saes(path)
            load_tensors(path, "training.safetensors", read_cfg(path))
            load_state(path, read_cfg(path))
        except UserError as error:
            print(error)
            corrupt += 1
    return corrupt


def content(runs: list[Path]) -> dict[str, object]:
    "Everything that has to be equal: per run all tensors and states saved on the way, the log and the results without their times."
    plain = lambda value: {k: plain(v) for k, v in value.items() if k not in TIMES} if isinstance(value, dict) else value
    found: dict[str, object] = {}
    for run in runs:
        for path in checkpoints(run).values():
            cfg = read_cfg(path)
            found |= {f"{run.name}/{path.name}/{file}": cfg["sha256"][file] for file in ("saes.safetensors", "training.safetensors")}
            found[f"{run.name}/{path.name}/state"] = plain(load_state(path, cfg))
        found[f"{run.name}/metrics"] = (run / "metrics.jsonl").read_text()
        for file in ("summary.json", "evaluation.json"):
            found[f"{run.name}/{file}"] = plain(json.loads((run / file).read_text()))
        found[f"{run.name}/left"] = [str(p) for p in run.rglob(".*") if p.name != ".lock"]
    return found


class Suite:
    "Kills until there are enough."

    def __init__(self, seed: int, compiled: bool = False):
        self.rng, self.compiled = random.Random(seed), compiled
        self.counts = dict.fromkeys(("kills", "kills_during_a_write", "kills_before_the_first_checkpoint", "resumes", "finished_runs", "corrupt_checkpoints",
                                     "failed_resumes", "differing_results"), 0)

    def short_of(self, kills: int) -> bool:
        "Whether there were fewer kills, or fewer resumes after them."
        return min(self.counts["kills"], self.counts["resumes"]) < kills

    def words(self, kind: str, resume: bool) -> list[str]:
        if kind == "train":
            return ["train", "--resume", "out/run"] if resume else ["train", "train.yaml"]
        return ["frontier", "frontier.yaml", "--out", "out"] + (["--resume"] if resume else [])

    def runs(self, kind: str, folder: Path) -> list[Path]:
        where = folder / "out" / ("runs" if kind == "frontier" else "")
        return sorted(path for path in where.glob("*") if (path / "config.yaml").is_file())

    def alone(self, kind: str, folder: Path) -> dict[str, object]:
        "A run that is left alone; how long it takes sets the scale of the moments of killing."
        prepare(folder, self.compiled)
        clock = Stopwatch()
        process = start(self.words(kind, False), folder)
        while not any((run / "checkpoints").exists() for run in self.runs(kind, folder)):
            if ended(process) is not None:
                said = (folder / "output.txt").read_text()[-2000:]
                raise SystemExit(f"the run that was to be left alone ended before its first checkpoint: {said}")
            time.sleep(0.001)
        self.begin = float(clock)
        _, status = os.waitpid(process, 0)
        assert status == 0, (folder / "output.txt").read_text()[-2000:]
        self.whole = float(clock)
        return content(self.runs(kind, folder))

    def cut(self, kind: str, folder: Path, kills: int, expected: dict[str, object]) -> None:
        "One run, killed until it ends or until there were enough kills and resumes; then it is left to end."
        prepare(folder, self.compiled)
        status = None
        resume = False
        while status is None:
            process = start(self.words(kind, resume), folder)
            self.counts["resumes"] += resume
            status = self.wait(kind, folder, process) if self.short_of(kills) else os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            runs = self.runs(kind, folder)
            if status is None:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                self.counts["kills"] += 1
                self.counts["kills_during_a_write"] += bool(unfinished([run / "checkpoints" for run in runs]))
                self.counts["corrupt_checkpoints"] += examine(runs)
                self.counts["kills_before_the_first_checkpoint"] += not any(checkpoints(run) for run in runs)
            # before its folder is complete there is nothing to go on with, and the same command begins anew
            resume = (folder / "out" / "runs" / "frontier.json").exists() if kind == "frontier" else bool(runs)
            if not resume:
                shutil.rmtree(folder / "out", ignore_errors=True)
        if status:
            self.counts["failed_resumes"] += 1
            print((folder / "output.txt").read_text()[-2000:])
            return
        self.counts["finished_runs"] += 1
        found = content(self.runs(kind, folder))
        differing = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        self.counts["differing_results"] += bool(differing)
        if differing:
            print("differing:", sorted(differing)[:8])

    def wait(self, kind: str, folder: Path, process: int) -> int | None:  # Exit status if it ended before its moment came
        "Until a random moment: anywhere in the life of a process, or within the writing of a checkpoint."
        if self.rng.random() < 0.5:
            until = time.perf_counter() + self.rng.uniform(0, self.begin + 0.25 * (self.whole - self.begin))
            while time.perf_counter() < until:
                if (status := ended(process)) is not None:
                    return status
                time.sleep(0.002)
            return None
        last = self.rng.randint(1, 4)
        for write in range(1, last + 1):
            while not self._own(unfinished(kept := [run / "checkpoints" for run in self.runs(kind, folder)]), process):
                if (status := ended(process)) is not None:
                    return status
                time.sleep(0.0005)
            if write < last:
                while self._own(unfinished(kept), process):
                    time.sleep(0.0005)
        time.sleep(self.rng.uniform(0, 0.012))
        return None

    @staticmethod
    def _own(found: list[str], process: int) -> bool:
        return any(f".{process}." in name for name in found)


def faults(kills: int = 200, seed: int = 0, kinds: tuple[str, ...] = ("train", "train", "train", "frontier"), compiled: bool = False) -> dict[str, int]:
    "The counts after so many kills, spread over training runs and frontiers."
    torch.set_num_threads(1)
    suite = Suite(seed, compiled)
    folder = tempfile.mkdtemp()  # not an object with a finalizer, which the forked processes would run, too
    try:
        alone: dict[str, tuple] = {}
        turn = 0
        while suite.short_of(kills) and not suite.counts["failed_resumes"]:
            kind = kinds[turn % len(kinds)]
            if kind not in alone:
                (Path(folder) / kind).mkdir()
                alone[kind] = (suite.alone(kind, Path(folder) / kind), suite.begin, suite.whole)
            expected, suite.begin, suite.whole = alone[kind]
            place = Path(folder) / f"turn_{turn}"
            place.mkdir()
            suite.cut(kind, place, kills, expected)
            shutil.rmtree(place)
            turn += 1
            print(json.dumps(suite.counts), flush=True)
    finally:
        shutil.rmtree(folder)
    return suite.counts


def complaint(counts: dict[str, int], kills: int) -> str | None:
    "What is wrong with these counts; None: so many kills, and nothing lost."
    lost = {key: n for key in ("corrupt_checkpoints", "failed_resumes", "differing_results") if (n := counts[key])}
    if lost:
        return "something was lost: " + ", ".join(f"{n} {key.replace('_', ' ')}" for key, n in lost.items())
    few = min(counts["kills"], counts["resumes"]) < max(1, kills) or not counts["finished_runs"]
    seen = ", ".join(f"{counts[key]} {key.replace('_', ' ')}" for key in ("kills", "resumes", "finished_runs"))
    return f"nothing was shown: {seen}" if few else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiled", type=int, default=0, help="kills of compiled runs, after the others")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "faults.json")
    asked = parser.parse_args()
    clock = Stopwatch()
    result = {"eager": faults(asked.kills, asked.seed)}
    if asked.compiled:
        result["compiled"] = faults(asked.compiled, asked.seed, ("train",), compiled=True)
    settings = {"kills": asked.kills, "compiled": asked.compiled, "config": CONFIG, "loss": LOSS, "frontier": FRONTIER}
    write_json(asked.out, result | {"provenance": provenance(settings, seed=asked.seed, seconds=float(clock), command="make faults")})
    wished = {"eager": asked.kills, "compiled": asked.compiled}
    wrong = [f"{name}: {said}" for name, counts in result.items() if (said := complaint(counts, wished[name]))]
    sys.exit("; ".join(wrong) or None)
