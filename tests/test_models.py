"""Our hook points mean what TransformerLens means by them, on every supported architecture, in float64 on tiny random models.

The models are saved in Hugging Face format and loaded back from the folder, by us as plain modules and by TransformerLens as a bridge.
"""

import pytest
import torch
from transformers import AutoTokenizer

from e2e_sae_nb.architectures import make_saes
from e2e_sae_nb.core import UserError, data_path
from e2e_sae_nb.layouts import LAYOUTS
from e2e_sae_nb.models import load_subject, native_subject, open_bridge, tiny_model
from e2e_sae_nb.sae import SAE, SAEConfig
from e2e_sae_nb.splicing import check_replay, edit, original_pass, reconstruction, replay, replay_start, splice

ARCHITECTURES = sorted(set(LAYOUTS) - {"gemma3", "native"})  # gemma3 is the multimodal wrapper of gemma3_text
# These families compute attention or norms in float32 whatever the weights' precision, so two orders of summation differ by 1e-6
FLOAT32_INSIDE = {"gpt_neo", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"}
TOKENS = torch.randint(37, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for model_type in ARCHITECTURES:
        made[model_type] = tmp_path_factory.mktemp(model_type)
        tiny_model(model_type).save_pretrained(made[model_type])
        AutoTokenizer.from_pretrained(data_path("docstrings-lm")).save_pretrained(made[model_type])  # a bridge wants one
    return made


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_points_agree_with_transformer_lens(model_type, folders):
    subject = load_subject(folders[model_type], dtype="float64", device="cpu")
    bridge = open_bridge(folders[model_type], dtype="float64")
    atol = 2e-5 if model_type in FLOAT32_INSIDE else 1e-9
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(TOKENS)
        ours = original_pass(subject, TOKENS, list(subject.points)).activations
        assert torch.allclose(subject(TOKENS), logits, rtol=0, atol=atol)
    compared = 0
    for name, value in ours.items():
        if name not in cache.keys():
            continue
        theirs = cache[name]
        theirs = theirs.flatten(-2) if theirs.ndim == 4 else theirs  # heads x d_head
        assert torch.allclose(value, theirs, rtol=0, atol=atol), name
        compared += 1
    assert compared >= 5 * len(subject.blocks)  # all kinds of points were met


def identity_sae(width: int) -> SAE:
    "Exact on any input: reads x and -x, writes them back."
    sae = SAE(width, 2 * width, dtype=torch.float64)
    with torch.no_grad():
        eye = torch.eye(width, dtype=torch.float64)
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_identity_and_error_term(model_type, folders):
    subject = load_subject(folders[model_type], dtype="float64", device="cpu")
    check_replay(subject)
    plain = subject(TOKENS)
    for name, point in subject.points.items():
        with splice(subject, {name: identity_sae(point.width)}):
            assert torch.allclose(subject(TOKENS), plain, rtol=0, atol=1e-9), name
        with splice(subject, {name: SAE(point.width, 3 * point.width, dtype=torch.float64)}, error_term=True):
            assert torch.equal(subject(TOKENS), plain), name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_gradients_agree_with_bridge_hooks(model_type, folders):
    "An SAE spliced at the middle of the residual stream: our replay against TransformerLens' own hooks over a full run."
    subject = load_subject(folders[model_type], dtype="float64", device="cpu")
    bridge = open_bridge(folders[model_type], dtype="float64")
    atol = 2e-5 if model_type in FLOAT32_INSIDE else 1e-9
    name = "blocks.1.hook_resid_pre"
    saes = make_saes({name: 16}, SAEConfig((name,), 3.0), dtype=torch.float64)
    original = original_pass(subject, TOKENS, start=replay_start(subject, [name]))
    fast = subject.logits(replay(subject, original, {name: reconstruction(saes[name], None, False)}).hidden)
    slow = bridge.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: saes[name](x).output)])
    assert torch.allclose(fast, slow, rtol=0, atol=atol)
    weights = torch.linspace(-1, 1, fast.numel(), dtype=torch.float64).view_as(fast)
    for a, b in zip(*(torch.autograd.grad((z * weights).sum(), list(saes[name].parameters())) for z in (fast, slow)), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_half_precision_replay(model_type):
    "The replay check's tolerance follows the subject's precision."
    from e2e_sae_nb.models import tiny_subject

    check_replay(tiny_subject(model_type, dtype="bfloat16"))


def test_native_model():
    "TransformerLens' own tiny models, which never touch the Hub: replay and splice work on the bridge's module tree."
    subject = native_subject(n_layers=2, d_model=16, n_ctx=16, d_head=8, n_heads=2, d_vocab=37, act_fn="gelu", d_mlp=32, seed=0)
    check_replay(subject)
    plain = subject(TOKENS)
    for name, point in subject.points.items():
        assert point.width in (16, 32)
        with splice(subject, {name: SAE(point.width, 32)}, error_term=True):
            assert torch.equal(subject(TOKENS), plain), name
        with splice(subject, {name: SAE(point.width, 32)}):
            assert not torch.allclose(subject(TOKENS), plain), name


def test_plain_mlp_end_to_end():
    "The reference's multilayer perceptrons: an SAE on a hidden layer, trained on the KL of the module's outputs."
    from torch import nn

    from e2e_sae_nb.losses import e2e_loss, make_plan, objective, run_original
    from e2e_sae_nb.models import Subject

    torch.manual_seed(0)
    mlp = Subject.from_module(nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 5)))
    saes, loss = {"1": SAE(16, 48)}, e2e_loss(1e-3)
    plan, x = make_plan(mlp, ["1"], loss), torch.randn(64, 4)
    optimizer = torch.optim.Adam(saes["1"].parameters(), lr=1e-2)
    history = []
    for _ in range(60):
        result = objective(mlp, run_original(mlp, x, plan), saes, loss, plan)
        optimizer.zero_grad()
        result.total.backward()
        optimizer.step()
        history.append(result.terms["logits_kl"].item())
    assert history[-1] < 0.2 * history[0]


def test_hooks_are_gone_after_an_exception():
    from e2e_sae_nb.models import tiny_subject

    subject = tiny_subject("gpt2")
    with pytest.raises(RuntimeError), edit(subject, [("blocks.0.hook_resid_mid", lambda x: None)]):
        raise RuntimeError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


@pytest.mark.parametrize("name, says", [
    ("no-such-model-anywhere", "docstrings"), ("someone/no-such-model", "offline"), ("./missing", "there is no folder"),
    ("weights.pt", "convert it to a Hugging Face folder")])
def test_what_cannot_be_loaded(name, says):
    with pytest.raises(UserError, match=says):
        load_subject(name)


def test_folder_without_weights(tmp_path):
    tiny_model("gpt2").config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_subject(tmp_path)
