"""What does each idea bring? The e2e step from the reference's way to ours, one idea after the other, interleaved in one process.

`python benchmarks/ladder.py` writes data/results/ladder.json: seconds per step and working memory of every rung, at both shapes, with the time
that the unavoidable multiply-adds would take at the measured matrix rates. Memory is measured in one fresh process per rung.
"""

import json
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from e2e_sae_nb.bench import (
    SHAPES,
    SIDES,
    Method,
    Side,
    _sample,
    bench_losses,
    bench_subject,
    floor_multiply_adds,
    matrix_rate,
    side_memory,
)
from e2e_sae_nb.compiling import compile_blocks
from e2e_sae_nb.core import Stopwatch, generator, pick_device, progress, provenance, write_json
from e2e_sae_nb.losses import dense_forward, kl_term, make_plan, objective, run_original, sae_terms, weigh
from e2e_sae_nb.sparse_step import sparse_forward
from e2e_sae_nb.splicing import _until_unembedding, original_pass, splice

RUNGS = ("reference", "no logits", "suffix replay", "sparse step", "bfloat16", "compiled blocks")
STEPS = 5
OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "ladder.json"


class Rung(Side):
    "A side of the benchmark that uses the first few ideas only."

    def __init__(self, rung: str, *args: Any):
        self.level = RUNGS.index(rung)
        method = SIDES["reference"] if self.level == 0 else Method(self.level >= 3, self.level >= 4, self.level >= 5)
        super().__init__(method, *args)

    def loss_of(self, tokens: Tensor, in_place: bool = False) -> Tensor:
        if self.level == 0:
            return super().loss_of(tokens, in_place)
        with self.precision():
            if self.level == 1:  # two whole passes, but the divergence straight from hidden states
                original = original_pass(self.subject, tokens)
                with splice(self.subject, {self.place: self.sae}) as seen, ExitStack() as stack:
                    hidden = _until_unembedding(self.subject, tokens, stack)
                terms = sae_terms({self.place: self.sae}, seen, original, self.loss, None)
                terms["logits_kl"] = kl_term(self.subject.head, original.hidden, hidden, None)
                return weigh(terms, self.loss, 0)
            plan = make_plan(self.subject, [self.place], self.loss)
            forward = partial(sparse_forward, in_place=in_place) if self.level >= 3 else dense_forward
            return objective(self.subject, run_original(self.subject, tokens, plan), {self.place: self.sae}, self.loss, plan, forward=forward).total


def build(shape: str, rung: str, tokens: Tensor, subject: Any) -> Rung:
    place = SHAPES[shape]["place"]
    side = Rung(rung, subject, place, SHAPES[shape]["ratio"], bench_losses(subject, place)["e2e"], _sample(subject, place, tokens))
    if side.method.compiled:
        side.subject = bench_subject(shape, subject.device)
        compile_blocks(side.subject, tokens, side.precision)
    return side


def times(shape: str) -> dict[str, Any]:
    device, g = pick_device(), generator(0, "ladder")
    subject, batch = bench_subject(shape, device), SHAPES[shape]["cuda_batch" if device.type == "cuda" else "batch"]
    draw = [torch.randint(subject.vocab_size or 2, batch, generator=g).to(device) for _ in range(STEPS + 1)]
    sides = {rung: build(shape, rung, draw[0], subject) for rung in RUNGS}
    losses = {}
    for i, tokens in enumerate(progress(draw, desc=shape)):
        for rung, side in sides.items():
            value = side.run(tokens)
            losses |= {rung: value} if i == 0 else {}
    assert all(abs(losses[r] / losses["reference"] - 1) < (1e-4 if RUNGS.index(r) < 4 else 0.02) for r in RUNGS), losses
    floor = floor_multiply_adds(subject, SHAPES[shape]["place"], sides["reference"].sae.d_sae, False) * batch[0] * batch[1]
    rates = {"float32": matrix_rate(device), "bfloat16": matrix_rate(device, torch.bfloat16)}
    return {"shape": shape, "batch": batch, "seconds": {r: batch[0] * batch[1] / s.tokens_per_second(batch[0] * batch[1]) for r, s in sides.items()},
            "floor_seconds": {name: floor / rate for name, rate in rates.items()}}


def memory(shape: str, rung: str) -> int:
    device = pick_device()
    subject, batch = bench_subject(shape, device), SHAPES[shape]["cuda_batch" if device.type == "cuda" else "batch"]
    tokens = torch.randint(subject.vocab_size or 2, batch, generator=generator(0, "ladder")).to(device)
    side = build(shape, rung, tokens[:1], subject)
    return side_memory(side, tokens)["working_memory_bytes"]


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(memory(sys.argv[2], sys.argv[3])))
        return
    clock, rows = Stopwatch(), []
    for shape in SHAPES:
        rows.append(times(shape))
        print(rows[-1], file=sys.stderr, flush=True)
        runs = {r: subprocess.run([sys.executable, __file__, "memory", shape, r], capture_output=True, text=True, check=True) for r in RUNGS[:-1]}
        rows[-1]["working_memory_bytes"] = {r: json.loads(done.stdout.strip().splitlines()[-1]) for r, done in runs.items()}
        print(rows[-1]["working_memory_bytes"], file=sys.stderr, flush=True)
    write_json(OUT, {"rows": rows, "provenance": provenance({"steps": STEPS}, seed=0, seconds=float(clock), command="python benchmarks/ladder.py")})


if __name__ == "__main__":
    main()
