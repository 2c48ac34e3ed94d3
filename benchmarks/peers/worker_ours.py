"""Training steps of this project, taking turns: `worker_ours.py OBJECTIVE SIDE BATCH CONTEXT`, SIDE a key of `e2e_sae_nb.bench.SIDES`."""

import sys

import torch
from turns import take_over_stdout, wait_for_turn

from e2e_sae_nb.bench import SHAPES, SIDES, Side, _sample, bench_losses, bench_subject
from e2e_sae_nb.compiling import compile_blocks
from e2e_sae_nb.core import generator, pick_device

take_over_stdout()
objective, method, batch, context = sys.argv[1], SIDES[sys.argv[2]], int(sys.argv[3]), int(sys.argv[4])
subject, shape = bench_subject("gpt2-small", pick_device()), SHAPES["gpt2-small"]
g = generator(0, "bench")


def draw() -> torch.Tensor:
    return torch.randint(subject.vocab_size, (batch, context), generator=g).to(subject.device)


side = Side(method, subject, shape["place"], shape["ratio"], bench_losses(subject, shape["place"])[objective], _sample(subject, shape["place"], draw()))
if method.compiled:
    compile_blocks(subject, draw(), side.precision)
while True:
    wait_for_turn()
    side.run(draw())
