"""The experiments on architectures and fine-tuning, in small: the sweep file as it stands and the benchmark's runs on a tiny network, interrupted and taken up."""

import importlib.util
import json
import random
from dataclasses import replace

import pytest
import yaml
from conftest import ROOT

from e2e_sae_nb.compute import step_flops
from e2e_sae_nb.config import read_yaml
from e2e_sae_nb.core import read_json
from e2e_sae_nb.documents import DataConfig
from e2e_sae_nb.losses import run_type
from e2e_sae_nb.members import members
from e2e_sae_nb.models import load_subject, tiny_subject
from e2e_sae_nb.sae import SAE, TAKE_K
from e2e_sae_nb.sweeps import read_sweep, run_sweep

PLACE = "blocks.1.hook_resid_pre"


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def subject():
    return tiny_subject("gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "tokens.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [rng.randrange(37) for _ in range(8)]}) for _ in range(2000)))
    return path


def test_architectures_sweep(subject, data, tmp_path):
    values = read_yaml(ROOT / "data" / "sweeps" / "architectures.yaml")
    values["base"] |= {"train_data": {"dataset_name": str(data), "n_ctx": 8, "tokenizer_name": None, "is_tokenized": True, "seed": 0, "column_name": "input_ids"},
                       "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 16}, "n_samples": 12, "warmup_samples": 4, "save_every_n_samples": 4, "eval_n_samples": 4,
                       "compile": False, "seeds": [0]}
    names = ("rate 3e-3", "jumprelu", "jumprelu local", "topk", "topk local")
    values["parts"] = {name: values["parts"][name] | {"n_samples": 12, "warmup_samples": 4, "save_every_n_samples": 4, "eval_n_samples": 4} for name in names}
    del values["parts"]["rate 3e-3"]["seeds"]
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    table = read_json(run_sweep(path, tmp_path / "out", subject=subject, only=["topk"]))
    assert table["missing"] == [name for name in names if name != "topk"]
    assert [(r["type"], r["architecture"], r["target_l0"], r["l0"]) for r in table["rows"]] == [(t, "topk", k, k) for t in ("e2e", "e2e+ds") for k in (20, 45)]
    table = read_json(run_sweep(path, tmp_path / "out", subject=subject))
    assert table["missing"] == [] and len(table["rows"]) == 6 + 6 + 21
    found = {(r["type"], r["architecture"], r["p_end"]) for r in table["rows"] if r["part"] == "rate 3e-3"}
    assert len(found) == 21 and ("e2e", "relu", 0.5) in found and all(r["target_l0"] == 30 for r in table["rows"] if r["part"] == "rate 3e-3")


def test_the_architectures_sweep_is_fair():
    "Every architecture with every objective at the same targets and seeds; local parts have so many times more samples as their steps take fewer operations."
    parts = read_sweep(ROOT / "data" / "sweeps" / "architectures.yaml")
    mains = {name: part for name, part in parts.items() if not name.startswith("rate")}
    assert len(parts) == 2 + 2 * 7 == len(mains) + 2
    subject, place = load_subject("docstrings", device="cpu"), "blocks.3.hook_resid_pre"
    cost = {run_type(c.loss): step_flops(subject, place, SAE(192, 3072), c.loss, 256, 30).total
            for name in ("relu", "relu local") for c in members(replace(mains[name], base=replace(mains[name].base, save_dir=None)), subject)}
    samples = {name: part.base.n_samples for name, part in mains.items()}
    for name, part in mains.items():
        kinds = ["local"] if name.endswith("local") else ["e2e", "e2e+ds"]
        asked = {kind: sorted(c.saes.k if c.saes.architecture in TAKE_K else c.loss.sparsity.target_l0 for c in members(part, subject) if run_type(c.loss) == kind) for kind in kinds}
        assert asked == dict.fromkeys(kinds, sorted([20, 45] * 3)) and tuple(part.seeds) == (0, 1, 2), name
        assert samples[name] * cost[kinds[0]] == pytest.approx(samples["relu"] * cost["e2e"], rel=0.01)
    assert cost["e2e+ds"] == pytest.approx(cost["e2e"], rel=0.05)


@pytest.mark.parametrize("architecture", ["relu", *(pytest.param(name, marks=pytest.mark.full) for name in ("topk", "gated"))])
def test_finetune_compute(architecture, subject, data, tmp_path, monkeypatch):
    module = benchmark("finetune_compute")
    monkeypatch.setattr(module, "PLACE", PLACE)
    monkeypatch.setattr(module, "L0", 5)
    monkeypatch.setattr(module, "N_CTX", 8)
    made, trained, config, train = DataConfig(str(data), is_tokenized=True, n_ctx=8, seed=0, tokenizer_name=None), [], module.config, module.train
    monkeypatch.setattr(module, "config", lambda *args: replace(config(*args), train_data=made, compute_dtype="float32"))
    monkeypatch.setattr(module, "train", lambda c, **kwargs: (trained.append(kwargs["name"]), train(c, **kwargs))[1])
    rows = module.part(architecture, 0, 80, tmp_path, subject)
    methods = ["local", "local, then 5% fine-tune", "local, then 10% fine-tune"]
    assert [r["method"] for r in rows] == methods * 2 + ["e2e"] * 3 and len(trained) == 5
    assert [r["tokens"] for r in rows[3:6]] == [640, 640 + 32, 640 + 64] and [r["tokens"] for r in rows[6:]] == [160, 320, 640]
    assert rows[3]["flops"] < rows[4]["flops"] < rows[5]["flops"] < rows[8]["flops"]
    last = next(folder for folder in tmp_path.iterdir() if folder.name == "e2e_40")
    (last / "summary.json").unlink()  # as if interrupted
    again = module.part(architecture, 0, 80, tmp_path, subject)
    assert trained[5:] == ["e2e_40"] and [r["kl"] for r in again] == pytest.approx([r["kl"] for r in rows], rel=1e-6)
