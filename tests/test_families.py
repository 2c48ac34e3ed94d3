"""Every family's hook points, proven on a tiny random model, are those of the stored table, and TransformerLens means the same by them."""

import pytest
import torch
from transformers import AutoTokenizer

from e2e_sae_nb.core import UserError, data_path, load_result
from e2e_sae_nb.families import FAMILIES, broken_promises, family_row
from e2e_sae_nb.folding import fold_weights, is_vector_norm, stream_norms
from e2e_sae_nb.inner import points_of
from e2e_sae_nb.layouts import LAYOUTS
from e2e_sae_nb.models import load_subject, open_bridge, subject_from_model, tiny_model
from e2e_sae_nb.splicing import check_replay, original_pass
from e2e_sae_nb.structure import find_structure, probe_tokens, watch

STORED = load_result(data_path("results/families.json"))["families"]
TOKENS = torch.randint(37, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    row = family_row(name)
    assert row == STORED[name]
    if "refused" in row:
        assert "\n" not in row["refused"] and "broken" not in row["refused"] and "report" not in row["refused"]
    else:
        assert row["resid_pre, resid_post"] == "proven"  # whatever has blocks has these


@pytest.mark.parametrize("name", FAMILIES)
def test_processed_weights_of_every_family(name, capfd):
    "Folding keeps the predictions; norms of the residual stream have no weight left, or a line says how many have."
    kind, sizes = FAMILIES[name]
    model = tiny_model(kind, sizes=sizes)
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.ndim == 1):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)).to(parameter)
    try:
        before = subject_from_model(model, name=name)(TOKENS).log_softmax(-1)
    except UserError:
        pytest.skip("refused, as its row of the table says")
    capfd.readouterr()
    fold_weights(model, probe_tokens(37), name)
    said = "".join(capfd.readouterr())
    assert (model(TOKENS).logits.log_softmax(-1) - before).abs().max() < 1e-3 * before.abs().max()
    trace = watch(model, probe_tokens(37))
    structure = find_structure(model, trace, name)
    parts = points_of(structure, trace, model.config)[1]
    blocks = [trace.calls[path][0] for path in structure.blocks]
    norms = [c.module for block, part in zip(blocks, parts, strict=True) for c in stream_norms(trace, block, part)]
    norms += [c.module for c in (trace.calls[path][0] for path in structure.tail[-1:]) if is_vector_norm(c)]
    weights = [norm.weight for norm in norms]
    left = sum(not (w == 0).all() and not (w == 1).all() for w in weights)
    assert (f"leaves {left} of {len(norms)} norms unfolded" in said) == (left > 0), said


def test_enough_families():
    served = [row for row in STORED.values() if "refused" not in row]
    assert len(served) >= 35 and sum(row["mlp.hook_post"] == "proven" for row in served) >= 35


@pytest.mark.parametrize("kind", sorted(set(LAYOUTS) - {"gemma3", "native"}))
def test_the_search_finds_what_was_written_by_hand(kind):
    subject, layout = subject_from_model(tiny_model(kind)), LAYOUTS[kind]
    here = f"{layout.blocks}.1."
    assert {name: subject.points[f"blocks.1.{name}"].module for name in (
        "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post")} == {
        "hook_attn_out": here + layout.attn_out, "hook_mlp_out": here + layout.mlp_out, "attn.hook_z": here + layout.z,
        "mlp.hook_post": here + layout.post}
    assert subject.norm is subject.model.get_submodule(layout.norm)


@pytest.mark.parametrize("name", ["granite", "minicpm3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_residual_multipliers(name, dtype):
    "The multiplier is the configuration's number where it has one, and what is added is the module's output times it."
    kind, sizes = FAMILIES[name]
    subject = subject_from_model(tiny_model(kind, sizes=sizes, dtype=dtype))
    config = subject.model.config
    expected = config.residual_multiplier if name == "granite" else config.scale_depth / config.num_hidden_layers**0.5
    assert subject.points["blocks.1.hook_attn_out"].scale == pytest.approx(expected, rel=1e-6 if dtype == "float32" else 2e-3)
    check_replay(subject)


@pytest.mark.parametrize("kind", ["olmo2", "bloom", "falcon", "opt", "granite", "mixtral"])
def test_half_precision_keeps_the_points(kind):
    "Sixteen bit neither hides a point nor lets a wrong one pass."
    kind, sizes = FAMILIES[kind]
    full, half = (subject_from_model(tiny_model(kind, sizes=sizes, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert list(full.points) == list(half.points)
    assert not broken_promises(half, TOKENS)
    check_replay(half)


def test_what_goes_between_blocks_beside_the_stream_is_noticed():
    "Granite's mixtures keep a key-value cache although asked for none; a replay that got it would attend to the original's keys."
    kind, sizes = FAMILIES["granitemoe"]
    check_replay(subject_from_model(tiny_model(kind, sizes=sizes)))


def test_encoder_with_decoder_is_refused():
    from transformers import BartConfig, BartForCausalLM

    config = BartConfig(vocab_size=37, d_model=16, decoder_layers=2, encoder_layers=1, decoder_attention_heads=2, encoder_attention_heads=2,
                        decoder_ffn_dim=32, encoder_ffn_dim=32, max_position_embeddings=32)
    config.is_encoder_decoder = True
    model = BartForCausalLM(config)
    model.config.is_encoder_decoder = True
    with pytest.raises(UserError, match="encoder and a decoder"):
        subject_from_model(model)


@pytest.mark.parametrize("name", ["olmo2", "phi", "gptj", "stablelm", "phi3", "bloom", "opt", "cohere"])
def test_transformer_lens_means_the_same(name, tmp_path):
    kind, sizes = FAMILIES[name]
    tiny_model(kind, sizes=sizes).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(data_path("docstrings-lm")).save_pretrained(tmp_path)  # a bridge wants one
    subject, bridge = load_subject(tmp_path, device="cpu"), open_bridge(tmp_path)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(TOKENS)
    ours, compared, differ = original_pass(subject, TOKENS, list(subject.points)).activations, set(), []
    for point, value in ours.items():
        if point in cache.keys():
            theirs = cache[point].reshape(value.shape)
            compared.add(point.split(".", 2)[2])
            if not torch.allclose(value, theirs, rtol=1e-3, atol=1e-4):
                differ.append(point)
    assert not differ, differ
    assert {"hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z"} <= compared
