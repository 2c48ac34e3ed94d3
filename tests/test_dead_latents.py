"""Resampling in whole runs: taken up again to the bit, in a frontier as alone, and refused where it cannot be meant."""

import json
import random

import pytest
import torch

from e2e_sae_nb import RunConfig, frontier, train
from e2e_sae_nb.architectures import ARCHITECTURES
from e2e_sae_nb.core import UserError
from e2e_sae_nb.models import tiny_subject
from e2e_sae_nb.state import begin, resume, save
from e2e_sae_nb.training import train_step

PLACE = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def subject():
    return tiny_subject("gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "tokens.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [rng.randrange(37) for _ in range(8)]}) for _ in range(2000)))
    return path


def config(architecture, data, folder=None, saes=None, **changes):
    k = {"k": 2} if "topk" in architecture or architecture == "matryoshka" else {}
    return RunConfig.from_dict({
        "tlens_model_name": "tiny", "lr": 3e-2, "batch_size": 4, "n_samples": 160, "seed": 1, "save_dir": folder, "eval_n_samples": 20, "max_grad_norm": 1.0,
        "loss": {"sparsity": {"coeff": 0.0 if k else 2.0}, "logits_kl": {"coeff": 1.0}}, "log_every_n_grad_steps": 1,
        "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 8, "architecture": architecture, "dead_after": 100, "resample_every_n_samples": 20,
                 "resample_until_n_samples": 120, **k, **(saes or {})},
        "train_data": {"dataset_name": str(data), "n_ctx": 8, "tokenizer_name": None, "is_tokenized": True, "seed": 0, "column_name": "input_ids"}} | changes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resumes_to_the_bit(architecture, subject, data, tmp_path):
    whole, cut = (begin(config(architecture, data, tmp_path / name), subject) for name in ("whole", "cut"))
    for _ in range(28):
        train_step(whole)
    for _ in range(13):
        train_step(cut)
    save(cut)
    cut = resume(cut.folder, subject)
    for _ in range(15):
        train_step(cut)
    assert whole.dead.resampled.get(PLACE, 0) > 0, "the test would prove nothing"
    assert whole.dead.resampled == cut.dead.resampled and torch.equal(whole.dead.silent[PLACE], cut.dead.silent[PLACE])
    for (name, p), (_, q) in zip(whole.saes[PLACE].state_dict().items(), cut.saes[PLACE].state_dict().items(), strict=True):
        assert torch.equal(p, q), name


def test_frontier_as_alone_and_in_the_log(subject, data, tmp_path):
    configs = [config("relu", data, tmp_path), config("relu", data, tmp_path, {"resample_every_n_samples": None, "resample_until_n_samples": None}), config("topk", data, tmp_path)]
    runs = frontier(configs, subject=subject)
    for run, c in zip(runs, configs, strict=True):
        alone = train(c, subject=subject)
        assert torch.equal(run.saes[PLACE].W_dec, alone.saes[PLACE].W_dec)
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert lines[5][f"dead/{PLACE}"] >= 0 and run.summary["dead"].keys() == {PLACE}
    assert runs[0].summary["resampled"][PLACE] > 0 and runs[1].summary["resampled"] == {}
    assert runs[0].summary["dead"][PLACE] < runs[1].summary["dead"][PLACE]


def test_older_checkpoints_begin_counting(subject, data, tmp_path):
    t = begin(config("relu", data, tmp_path), subject)
    train_step(t)
    t.dead.silent.clear()
    save(t)
    again = resume(t.folder, subject)
    train_step(again)
    assert int(again.dead.silent[PLACE].max()) <= 32


@pytest.mark.parametrize("saes", [{"resample_every_n_samples": 0}, {"resample_every_n_samples": None}])
def test_refuses(saes, data):
    with pytest.raises(UserError, match="resample_every_n_samples must be at least 1"):
        config("relu", data, saes=saes)
