"""Transcoders: every loss against its slow definition, training to export, and configurations that cannot be meant."""

import json
import random

import pytest
import torch
import torch.nn.functional as F

from e2e_sae_nb import RunConfig, evaluate, frontier, load_run, train
from e2e_sae_nb.architectures import ARCHITECTURES, make_saes
from e2e_sae_nb.config import from_dict
from e2e_sae_nb.core import UserError
from e2e_sae_nb.features import describe
from e2e_sae_nb.finetuning import finetune
from e2e_sae_nb.losses import LossConfig, dense_forward, make_plan, objective, run_original
from e2e_sae_nb.members import FrontierConfig
from e2e_sae_nb.models import tiny_subject
from e2e_sae_nb.sae import SAEConfig
from e2e_sae_nb.sparse_step import sparse_forward
from e2e_sae_nb.state import begin, resume, save
from e2e_sae_nb.training import train_step

PLACE, SOURCE, LATER = "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_in", "blocks.2.hook_resid_pre"
TERMS = {
    "local": {"out_to_in": {"coeff": 1.0}},
    "to the original": {"out_to_orig": {"coeff": 1.0}},
    "e2e": {"logits_kl": {"coeff": 1.0}},
    "e2e+ds": {"logits_kl": {"coeff": 0.5}, "in_to_orig": {"hook_positions": [LATER], "total_coeff": 1.0}},
    "balanced": {"logits_kl": {"coeff": 0.5, "balance": True}, "out_to_in": {"coeff": 0.5}},
}
LOSSES = {kind: from_dict(LossConfig, {"sparsity": {"coeff": 0.1}, **terms}) for kind, terms in TERMS.items()}


@pytest.fixture(scope="module")
def subject():
    return tiny_subject("gpt2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "tokens.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [rng.randrange(37) for _ in range(8)]}) for _ in range(2000)))
    return path


def config(kind, data, folder=None, architecture="relu", **changes):
    k = {"k": 4, "dead_after": 400} if "topk" in architecture or architecture == "matryoshka" else {}
    return RunConfig.from_dict({
        "tlens_model_name": "tiny", "lr": 3e-3, "batch_size": 4, "n_samples": 240, "seed": 1, "save_dir": folder, "eval_n_samples": 40,
        "loss": {"sparsity": {"coeff": 0.0 if k else 0.02}, **TERMS[kind]}, "log_every_n_grad_steps": 1,
        "saes": {"sae_positions": PLACE, "input_positions": SOURCE, "dict_size_to_input_ratio": 16, "architecture": architecture, **k},
        "train_data": {"dataset_name": str(data), "n_ctx": 8, "tokenizer_name": None, "is_tokenized": True, "seed": 0, "column_name": "input_ids"}} | changes)


def by_hand(subject, sae, tokens, loss, local):
    "The loss with plain hooks and two whole passes."
    mlp, seen = subject.blocks[1].mlp, {}

    def run(*hooks):
        handles = [module.register_forward_pre_hook(hook) if pre else module.register_forward_hook(hook) for module, pre, hook in hooks]
        try:
            return subject.model(tokens).logits
        finally:
            for handle in handles:
                handle.remove()

    keep = lambda key: (lambda _, args, *out: seen.__setitem__(key, out[0] if out else args[0]))
    with torch.no_grad():
        orig = run((mlp, False, keep("y")), (mlp, True, keep("x")), (subject.blocks[2], True, keep("later")))
    plain = dict(seen)

    def replace(_, args, out):
        seen["acts"] = sae(args[0])
        seen["real"] = out
        return seen["acts"].output

    new = None if local else run((mlp, False, replace), (subject.blocks[2], True, keep("later")))
    if local:
        seen |= {"acts": sae(plain["x"]), "real": plain["y"]}
    acts, total = seen["acts"], 0.0
    error = F.mse_loss(acts.output, seen["real"])
    if loss.out_to_in:
        total = total + loss.out_to_in.coeff * error
    if loss.out_to_orig:
        total = total + loss.out_to_orig.coeff * F.mse_loss(acts.output, plain["y"])
    if loss.in_to_orig:
        total = total + loss.in_to_orig.total_coeff * F.mse_loss(seen["later"], plain["later"])
    if loss.logits_kl:
        kl = (orig.softmax(-1) * (orig.log_softmax(-1) - new.log_softmax(-1))).sum(-1).mean()
        total = total + loss.logits_kl.coeff * kl * (error.detach() / (kl.detach() + 1e-8) if loss.logits_kl.balance else 1.0)
    penalty = acts.c.sum(-1).mean() if acts.penalty is None else acts.penalty.mean()
    total = total + loss.sparsity.coeff * penalty / sae.d_in
    if sae.architecture == "gated":  # its auxiliary loss: the gate's code, decoded by the frozen dictionary, against the target
        gate = torch.relu(sae.pre_activations(acts.input))
        total = total + (gate @ sae.dictionary.detach() + sae.b_dec.detach() - seen["real"]).square().mean(-1).mean()
    return total


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("architecture", ["relu", "topk", "gated"])
def test_losses_and_gradients_equal_the_slow_definition(architecture, kind):
    subject = tiny_subject("gpt2", dtype="float64")
    options = {"k": 5} if architecture == "topk" else {}
    sae = make_saes({PLACE: 16}, SAEConfig((PLACE,), 4.0, architecture=architecture, **options), {PLACE: (SOURCE, 16)}, dtype=torch.float64)[PLACE]
    tokens, loss = torch.randint(37, (3, 9), generator=torch.Generator().manual_seed(0)), LOSSES[kind]
    plan = make_plan(subject, [PLACE], loss, [SOURCE])
    assert plan.local == (kind in ("local", "to the original"))
    slow = by_hand(subject, sae, tokens, loss, plan.local)
    slow.backward()
    wanted = {name: p.grad.clone() for name, p in sae.named_parameters()}
    for forward in (dense_forward, lambda sae, *x: sparse_forward(sae, *x, limit=1.0)):
        sae.zero_grad()
        result = objective(subject, run_original(subject, tokens, plan), {PLACE: sae}, loss, plan, forward=forward)
        result.total.backward()
        assert result.total.item() == pytest.approx(slow.item(), rel=1e-10)
        for name, p in sae.named_parameters():
            assert torch.allclose(p.grad, wanted[name], rtol=1e-8, atol=1e-12), name


@pytest.mark.parametrize("kind", ["local", "e2e", "e2e+ds"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trains_and_comes_back(architecture, kind, subject, data, tmp_path):
    run = train(config(kind, data, tmp_path, architecture), subject=subject)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    key = next(k for k in lines[0] if k.startswith("loss/") and k.split("/")[1] in ("out_to_in", "logits_kl"))
    course = [line[key] for line in lines if key in line]
    assert sum(course[-10:]) < 0.9 * sum(course[:10]), course
    again = load_run(run.path)
    assert again.saes[PLACE].reads == SOURCE and type(again.saes[PLACE]) is ARCHITECTURES[architecture]
    assert evaluate(again, subject=subject).kl == pytest.approx(run.summary["kl"], rel=1e-5)


def test_widths_may_differ_and_a_run_resumes(subject, data, tmp_path):
    changed = {"saes": {"sae_positions": "blocks.1.hook_attn_out", "input_positions": "blocks.1.attn.hook_z", "dict_size_to_input_ratio": 4, "activation_norm": "unit"}}
    whole, cut = (begin(config("e2e", data, tmp_path / name, **changed), subject) for name in ("whole", "cut"))
    for _ in range(8):
        train_step(whole)
    for _ in range(3):
        train_step(cut)
    save(cut)
    cut = resume(cut.folder, subject)
    for _ in range(5):
        train_step(cut)
    for p, q in zip(*(t.saes["blocks.1.hook_attn_out"].parameters() for t in (whole, cut)), strict=True):
        assert torch.equal(p, q)


def test_in_a_frontier_fine_tuned_and_described(subject, data, tmp_path):
    values = {"tlens_model_name": "tiny", "batch_size": 4, "n_samples": 80, "eval_n_samples": 20, "save_dir": str(tmp_path), "train_data": {
        "dataset_name": str(data), "n_ctx": 8, "tokenizer_name": None, "is_tokenized": True, "seed": 0, "column_name": "input_ids"},
        "saes": {"sae_positions": PLACE, "input_positions": SOURCE, "dict_size_to_input_ratio": 8}}
    runs = frontier(FrontierConfig.from_dict(values | {"frontier": {"local": {"lr": 1e-3, "sparsity": [0.1]}, "e2e": {"lr": 1e-3, "target_l0": [5]}, "e2e topk": {"lr": 1e-3, "k": [4]}}}), subject=subject)
    assert [run.saes[PLACE].reads for run in runs] == [SOURCE] * 3
    tuned = finetune(runs[0], 16, subject=subject)
    assert tuned.saes[PLACE].reads == SOURCE and tuned.config.saes.input_positions == (SOURCE,)
    batches = [torch.randint(37, (4, 8), generator=torch.Generator().manual_seed(0))]
    facts = describe(subject, PLACE, runs[0].saes[PLACE], batches, limit=5)
    assert facts["fired"] > 0 and facts["latents"][0]["ablation"]["kl"] >= 0
    with pytest.raises(UserError, match="would read blocks.1.hook_mlp_out"):  # a transcoder cannot go on as an SAE
        train(config("local", data, None, saes={"sae_positions": PLACE, "dict_size_to_input_ratio": 16, "pretrained_sae_paths": [str(next((runs[0].path / "checkpoints").iterdir()))],
                                                "retrain_saes": True}), subject=subject)


@pytest.mark.parametrize("inputs, message", [("blocks.2.mlp.hook_in", "does not come before"), ("mlp.hook_in", "one place per SAE"), ("blocks.1.mlp.hook_inn", "did you mean")])
def test_refuses(inputs, message, subject, data):
    with pytest.raises(UserError, match=message):
        begin(config("local", data, saes={"sae_positions": PLACE, "input_positions": inputs, "dict_size_to_input_ratio": 4}), subject)
