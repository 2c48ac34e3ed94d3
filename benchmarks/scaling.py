"""How does the cost of a training step grow? One size varied at a time, ours and the reference-equivalent step interleaved in one process.

`python benchmarks/scaling.py` writes data/results/scaling.json (some ten minutes on 2 cores): tokens per second of an e2e and of a local step against
vocabulary, context, dictionary size, layer, L0 and tokens per batch, around a GPT-2-like network of half GPT-2 small's width.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from e2e_sae_nb.bench import SIDES, Side, bench_losses, set_l0
from e2e_sae_nb.core import Stopwatch, generator, pick_device, provenance, write_json
from e2e_sae_nb.losses import local_loss, make_plan, run_original
from e2e_sae_nb.models import subject_from_model

BASE = {"vocabulary": 16384, "context": 128, "ratio": 32, "layer": 3, "l0": 50, "tokens": 512}
VARIED = {"vocabulary": (4096, 16384, 65536, 262144), "context": (64, 128, 256, 512), "ratio": (8, 32, 128), "layer": (1, 3, 4), "l0": (10, 50, 250),
          "tokens": (128, 512, 2048)}
WIDTH, LAYERS, STEPS = 384, 6, 3
METHODS = ("reference", "ours", "ours bfloat16")
OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "scaling.json"


def measure(sizes: dict[str, int]) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=sizes["vocabulary"], n_positions=max(512, sizes["context"]), n_embd=WIDTH, n_layer=LAYERS, n_head=6,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    subject = subject_from_model(GPT2LMHeadModel(config).to(pick_device()), name="GPT-2-like")
    place, g = f"blocks.{sizes['layer']}.hook_resid_pre", generator(0, "scaling")
    batch = (sizes["tokens"] // sizes["context"], sizes["context"])
    found = {}
    for name in ("local", "e2e"):
        draw = [torch.randint(sizes["vocabulary"], batch, generator=g).to(subject.device) for _ in range(STEPS + 1)]
        sample = run_original(subject, draw[0], make_plan(subject, [place], local_loss(0.0))).activations[place]
        sides = {key: Side(SIDES[key], subject, place, sizes["ratio"], bench_losses(subject, place)[name], sample) for key in METHODS}
        for side in sides.values():
            set_l0(side.sae, sample, sizes["l0"])
        for tokens in draw:
            for side in sides.values():
                side.run(tokens)
        found[name] = {key: side.tokens_per_second(sizes["tokens"]) for key, side in sides.items()}
    return {**sizes, "tokens_per_second": found}


def main() -> None:
    clock, rows = Stopwatch(), []
    for key, values in VARIED.items():
        for value in values:
            rows.append({"varied": key} | measure(BASE | {key: value}))
            print(key, value, rows[-1]["tokens_per_second"], file=sys.stderr, flush=True)
    write_json(OUT, {"base": BASE | {"width": WIDTH, "layers": LAYERS}, "rows": rows, "provenance": provenance(
        {"steps": STEPS, "varied": {k: list(v) for k, v in VARIED.items()}}, seed=0, seconds=float(clock), command="python benchmarks/scaling.py")})


if __name__ == "__main__":
    main()
