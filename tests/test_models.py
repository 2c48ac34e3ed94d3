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


def randomized(model_type, folder, **more):
    "Saved, with norms and biases that matter: a fresh model's are ones and zeros."
    model = tiny_model(model_type, **more)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(data_path("docstrings-lm")).save_pretrained(folder)
    return model


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama", "qwen2", "gemma2", "mistral", "gpt_neo", "qwen3"])
def test_processed_weights(model_type, tmp_path):
    "Plain modules, the same hook points and predictions; the residual stream is TransformerLens' processed one."
    plain_model = randomized(model_type, tmp_path)
    subject = load_subject(tmp_path, dtype="float64", device="cpu", processed_weights=True)
    plain = load_subject(tmp_path, dtype="float64", device="cpu")
    assert list(subject.points) == list(plain.points) and type(subject.model) is type(plain_model)
    assert isinstance(subject.head.linear, torch.nn.Linear)  # the fused divergence applies
    assert torch.allclose(subject(TOKENS).log_softmax(-1), plain(TOKENS).log_softmax(-1), rtol=0, atol=1e-4)
    check_replay(subject)
    for name, point in subject.points.items():
        with splice(subject, {name: SAE(point.width, 32, dtype=torch.float64)}) as seen:
            assert not torch.allclose(subject(TOKENS), plain(TOKENS), atol=1e-3) and name in seen
    centred = model_type in ("gpt2", "gpt_neox", "gpt_neo")
    bridge = open_bridge(tmp_path, dtype="float64", processed=True)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(TOKENS)
    names = [name for name in subject.points if name.endswith(("resid_pre", "resid_post", "attn.hook_z"))]
    ours = original_pass(subject, TOKENS, names).activations
    for name in names:
        if "resid" in name:
            assert (ours[name].mean(-1).abs().max() < 1e-5) == centred, name
        theirs = cache[name].reshape(ours[name].shape)
        assert torch.allclose(ours[name], theirs, rtol=0, atol=1e-3), name


def test_untied_on_processing():
    "The unembedding is centred, the embedding it was tied to is not touched by that."
    from e2e_sae_nb.folding import fold_weights
    from e2e_sae_nb.structure import probe_tokens

    model = tiny_model("gpt2", dtype="float64")
    before = model.transformer.wte.weight.clone()
    fold_weights(model, probe_tokens(37))
    assert model.lm_head.weight.mean(0).abs().max() < 1e-12
    assert torch.allclose(model.transformer.wte.weight, before - before.mean(1, keepdim=True))


@pytest.mark.parametrize("drop, says", [("layers.1.mlp", "would be random: model.layers.1.mlp.down_proj.weight"), (None, "holds NaN"),
                                        ("extra", "no place for: model.layers.0.self_attn.q_norm.weight"),
                                        ("shape", "q_proj")])
def test_weights_that_are_not_the_models(drop, says, tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if drop is None:
        weights["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    elif drop == "extra":
        weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    elif drop == "shape":
        weights["model.layers.0.self_attn.q_proj.weight"] = torch.ones(3, 3)
    else:
        weights = {key: value for key, value in weights.items() if drop not in key}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=says) as caught:
        load_subject(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["codegen", "gptj", "gpt_neox"])
def test_buffers_in_the_files_are_no_other_architecture(name, tmp_path):
    "Older versions of transformers wrote masks and frequencies; a mask of an unknown name shows by its type. A foreign weight is still refused."
    from safetensors.torch import load_file, save_file

    from e2e_sae_nb.families import FAMILIES

    kind, sizes = FAMILIES[name]
    tiny_model(kind, sizes=sizes).save_pretrained(tmp_path)
    plain, path = load_subject(tmp_path, device="cpu")(TOKENS), tmp_path / "model.safetensors"
    weights, block = load_file(path), {"gpt_neox": "gpt_neox.layers.0.attention"}.get(name, "transformer.h.0.attn")
    buffers = {"causal_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool), "bias": torch.ones(1, 1, 8, 8), "masked_bias": torch.tensor(-1e9),
               "rotary_emb.inv_freq": torch.ones(2), "scale_attn": torch.tensor(2.0), "odd_mask": torch.ones(8, dtype=torch.uint8)}
    weights |= {f"{block}.{key}": value for key, value in buffers.items()}
    save_file(weights, path, metadata={"format": "pt"})
    assert torch.allclose(load_subject(tmp_path, device="cpu")(TOKENS), plain, atol=1e-5)
    save_file(weights | {f"{block}.odd.weight": torch.ones(8)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"1 tensors of blocks .*: {block}.odd.weight$"):
        load_subject(tmp_path, device="cpu")


@pytest.mark.parametrize("name, content, says", [
    ("model.safetensors", b"\x10", "no complete safetensors"), ("config.json", b"{", "cannot be read as JSON"),
    ("config.json", b"{}", "no model_type"), ("adapter_config.json", b'{"base_model_name_or_path": "b"}', "adapter for b"),
    ("tokenizer.json", b"{", "tokenizer.json cannot be read"), ("config.json", b'{"model_type": "t5"}', "encoder")])
def test_folders_as_they_are_found(name, content, says, tmp_path):
    tiny_model("gpt2", vocab_size=64).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_subject(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_any_module_with_logits():
    "What is no transformer can still be explained by hand: every module's output is a hook point."
    from e2e_sae_nb.losses import e2e_loss, make_plan, objective, run_original
    from e2e_sae_nb.models import Subject

    mamba = Subject.from_module(tiny_model("mamba", sizes={"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}))
    place = next(name for name in mamba.points if name.endswith("layers.0"))
    saes, loss = {place: SAE(16, 48)}, e2e_loss(1e-3)
    plan = make_plan(mamba, [place], loss)
    result = objective(mamba, run_original(mamba, TOKENS, plan), saes, loss, plan)
    result.total.backward()
    assert result.terms["logits_kl"] > 0 and saes[place].W_enc.grad.abs().max() > 0
