"""Runs in an environment with the real sae-bench and sae-probes: hands them our SAEs and writes down what they say.

`python suites_side.py FOLDER MODEL`: FOLDER/tokens.safetensors holds tokens, FOLDER/saes/NAME our checkpoints, FOLDER/saelens/NAME the same SAEs in
SAELens' format; MODEL is a GPT-2 in a folder. Each SAE goes through both suites twice: behind our adapter, and as SAELens itself loads it. The results
go to FOLDER/theirs.json. Nothing is fetched: the model and the tokens are local, the probing texts travel inside sae-probes.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import sae_probes
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import get_featurewise_weight_based_metrics, run_evals
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from sae_lens import SAE
from sae_probes.generate_model_activations import ensure_dataset_activations
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import AutoTokenizer, GPT2LMHeadModel

from e2e_sae_nb.checkpoint import load_saes
from e2e_sae_nb.suites import SuiteSAE, TokenStore

folder, source = Path(sys.argv[1]), Path(sys.argv[2])
MODEL, DATASET, KS = "docstrings", "118_us_state_CA", [1, 4, 16]


def hooked() -> HookedTransformer:
    "The model under TransformerLens, weights as they are."
    c = json.loads((source / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(str(source))
    tokenizer.eos_token = tokenizer.bos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(c["eos_token_id"])
    cfg = HookedTransformerConfig(
        n_layers=c["n_layer"], d_model=c["n_embd"], n_ctx=c["n_positions"], n_heads=c["n_head"], d_head=c["n_embd"] // c["n_head"], d_mlp=4 * c["n_embd"],
        d_vocab=c["vocab_size"], act_fn=c["activation_function"], eps=c["layer_norm_epsilon"], normalization_type="LN", model_name=MODEL,
        default_prepend_bos=False, device="cpu")
    model = HookedTransformer(cfg, tokenizer=tokenizer)
    weights = convert_gpt2_weights(GPT2LMHeadModel.from_pretrained(source).float(), cfg)
    model.load_and_process_state_dict(weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    return model.eval()


def core(sae, model, tokens) -> dict:
    "SAEBench's core evaluation on these tokens."
    _, sae, _ = load_and_format_sae("ours", sae, "cpu")
    config = CoreEvalConfig(
        model_name=MODEL, batch_size_prompts=len(tokens), n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1, compute_kl=True, compute_ce_loss=True,
        compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True, compute_featurewise_density_statistics=True)
    metrics, features = run_evals(sae, TokenStore(tokens), model, config)
    features |= get_featurewise_weight_based_metrics(sae)
    means = {key: sum(values) / len(values) for key, values in features.items() if key in ("feature_density", "max_decoder_cosine_sim", "encoder_decoder_cosine_sim")}
    return {key: value for group in metrics.values() for key, value in group.items()} | means


def probes(sae, model, name: str) -> list[dict]:
    "sae-probes' k-sparse logistic regressions on one of its data sets."
    results, cache = folder / f"probes_{name}", folder / "activations"
    hook = sae.cfg.hook_name
    ensure_dataset_activations(MODEL, [DATASET], [hook], cache, device="cpu", max_seq_len=64, batch_size=64, model=model)
    sae_probes.run_sae_evals(sae, MODEL, hook, reg_type="l1", setting="normal", ks=KS, datasets=[DATASET], results_path=results, model_cache_path=cache, device="cpu")
    (file,) = results.rglob("*.json")
    return [{key: row[key] for key in row if key.startswith("test_") or key in ("k", "indices")} for row in json.loads(file.read_text())]


tokens, model, theirs = load_file(folder / "tokens.safetensors")["tokens"], hooked(), {}
for path in sorted((folder / "saes").iterdir()):
    ((place, sae),) = load_saes(path).items()
    pair = {"adapter": SuiteSAE(sae, place, MODEL, context_size=tokens.shape[1]), "sae_lens": SAE.load_from_disk(folder / "saelens" / path.name)}
    theirs[path.name] = {}
    for side, each in pair.items():
        found = {"core": core(each, model, tokens)}
        if path.name in ("relu", "topk"):
            found["probes"] = probes(each, model, f"{path.name}_{side}")
        theirs[path.name][side] = found
rows = len(pd.read_csv(Path(sae_probes.__file__).parent / "data" / "cleaned_data" / f"{DATASET}.csv.zst", compression="zstd"))
versions = {name: version(name) for name in ("sae-bench", "sae-probes", "sae-lens", "transformer-lens", "transformers", "torch")}
(folder / "theirs.json").write_text(json.dumps({"theirs": theirs, "versions": versions, "dataset": DATASET, "dataset_rows": rows}))
