"""What does one pass over the data save? Eight SAEs in lock-step against eight solo steps, interleaved in one process.

`python benchmarks/frontier_of_eight.py` writes data/results/frontier_of_eight.json: tokens per second and SAE, solo and in lock-step, for
local and e2e at both shapes and in both precisions.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from e2e_sae_nb.bench import SHAPES, SIDES, Side, _sample, bench_losses, bench_subject
from e2e_sae_nb.core import Stopwatch, generator, pick_device, provenance, write_json
from e2e_sae_nb.losses import make_plan, objective, run_original
from e2e_sae_nb.sparse_step import sparse_forward

K, STEPS = 8, 3
OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "frontier_of_eight.json"


def lock_step(sides: list[Side], tokens: torch.Tensor) -> None:
    first = sides[0]
    plan = make_plan(first.subject, [first.place], first.loss)

    def precision() -> Any:
        return torch.autocast(first.subject.device.type, torch.bfloat16, enabled=first.method.bfloat16)

    with precision():
        original = run_original(first.subject, tokens, plan)
    original.logits = []
    for side in sides:
        with precision():
            result = objective(side.subject, original, {side.place: side.sae}, side.loss, plan,
                               forward=lambda sae, x: sparse_forward(sae, x, in_place=True))
        result.total.backward()
        side.optimizer.step()
        side.optimizer.zero_grad()


def measure(shape: str, name: str, method: str) -> dict[str, Any]:
    device = pick_device()
    subject, batch = bench_subject(shape, device), SHAPES[shape]["cuda_batch" if device.type == "cuda" else "batch"]
    place, g = SHAPES[shape]["place"], generator(0, "bench")
    tokens = [torch.randint(subject.vocab_size or 2, batch, generator=g).to(device) for _ in range(STEPS + 1)]
    sample = _sample(subject, place, tokens[0])
    loss = bench_losses(subject, place)[name]
    sides = [Side(SIDES[method], subject, place, SHAPES[shape]["ratio"], loss, sample) for _ in range(K)]
    solo, together = [], []
    for batch_tokens in tokens:
        clock = Stopwatch()
        for side in sides:
            side.run(batch_tokens)
        solo.append(float(clock))
        clock = Stopwatch()
        lock_step(sides, batch_tokens)
        together.append(float(clock))
    n = batch[0] * batch[1] * K
    middle = {key: sorted(seconds[1:])[len(seconds[1:]) // 2] for key, seconds in (("solo", solo), ("together", together))}
    return {"shape": shape, "objective": name, "method": method, "batch": batch, "saes": K,
            "tokens_per_second_and_sae": {key: n / seconds for key, seconds in middle.items()}, "ratio": middle["solo"] / middle["together"]}


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
