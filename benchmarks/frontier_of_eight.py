"""What does one pass over the data save? Eight SAEs in lock-step against eight solo steps, in turns in one process.

`python benchmarks/frontier_of_eight.py` writes data/results/frontier_of_eight.json: tokens per second and SAE, solo and in lock-step, for
local and e2e at both shapes and in both precisions; the ratio is the median of five steps'.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from e2e_sae_nb.bench import SHAPES, SIDES, Side, _sample, bench_losses, bench_subject
from e2e_sae_nb.core import Stopwatch, generator, pick_device, provenance, write_json
from e2e_sae_nb.losses import make_plan, objective, run_original
from e2e_sae_nb.sparse_step import sparse_forward

K, STEPS = 8, 5
OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "frontier_of_eight.json"


def lock_and_solo(sides: list[Side], tokens: torch.Tensor) -> tuple[float, float]:
    "Seconds of a step of all SAEs, each by itself and in lock-step, in turns: one SAE's solo step, then its share of the other way."
    first, solo = sides[0], 0.0
    plan = make_plan(first.subject, [first.place], first.loss)
    clock = Stopwatch()
    with first.precision():
        original = run_original(first.subject, tokens, plan)
    original.logits, together = [], float(clock)
    for side in sides:
        clock = Stopwatch()
        side.run(tokens)
        solo, clock = solo + float(clock), Stopwatch()
        with side.precision():
            result = objective(side.subject, original, {side.place: side.sae}, side.loss, plan,
                               forward=lambda sae, x: sparse_forward(sae, x, in_place=True))
        result.total.backward()
        side.optimizer.step()
        side.optimizer.zero_grad()
        result.total.item()  # waits for the device
        together += float(clock)
    return solo, together


def measure(shape: str, name: str, method: str) -> dict[str, Any]:
    device = pick_device()
    subject, batch = bench_subject(shape, device), SHAPES[shape]["cuda_batch" if device.type == "cuda" else "batch"]
    place, g = SHAPES[shape]["place"], generator(0, "bench")
    tokens = [torch.randint(subject.vocab_size or 2, batch, generator=g).to(device) for _ in range(STEPS + 1)]
    sample = _sample(subject, place, tokens[0])
    loss = bench_losses(subject, place)[name]
    sides = [Side(SIDES[method], subject, place, SHAPES[shape]["ratio"], loss, sample) for _ in range(K)]
    seconds = [lock_and_solo(sides, batch_tokens) for batch_tokens in tokens][1:]
    n, ratios = batch[0] * batch[1] * K, sorted(solo / together for solo, together in seconds)
    best = [min(column) for column in zip(*seconds, strict=True)]
    return {"shape": shape, "objective": name, "method": method, "batch": batch, "saes": K, "ratio": ratios[len(ratios) // 2], "ratios": ratios,
            "tokens_per_second_and_sae": {"solo": n / best[0], "together": n / best[1]}}


def main() -> None:
    clock, results = Stopwatch(), []
    for shape in SHAPES:
        for name in ("local", "e2e"):
            for method in ("ours", "ours bfloat16"):
                results.append(measure(shape, name, method))
                print(results[-1], file=sys.stderr, flush=True)
    write_json(OUT, {"results": results, "provenance": provenance({"steps": STEPS}, seed=0, seconds=float(clock),
                                                                  command="python benchmarks/frontier_of_eight.py")})


if __name__ == "__main__":
    main()
