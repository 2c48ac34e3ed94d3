"""Text generated with a key-value cache is the text generated without one: every family of networks, kind of hook point and SAE architecture."""

import pytest
import torch

from e2e_sae_nb.architectures import ARCHITECTURES, new_sae
from e2e_sae_nb.core import UserError
from e2e_sae_nb.families import FAMILIES as EVERY
from e2e_sae_nb.generation import Reader, Sampling, compare, generate
from e2e_sae_nb.layouts import LAYOUTS
from e2e_sae_nb.models import find_point, subject_from_model, tiny_model, tiny_subject
from e2e_sae_nb.splicing import splice

FAMILIES = sorted(set(LAYOUTS) - {"gemma3", "native"})  # gemma3 is the multimodal wrapper of gemma3_text
KINDS = ["hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "mlp.hook_post", "hook_mlp_out", "hook_resid_post"]
PROMPT = [5, 11, 2, 30, 7, 7]


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_changes_nothing(family):
    "Logits and tokens, with an SAE at each kind of hook point in turn."
    subject = tiny_subject(family, dtype="float64")
    for kind in KINDS:
        place = f"blocks.1.{kind}"
        if place not in subject.points:
            assert family == "gpt_neox" and kind == "hook_resid_mid"  # attention and MLP are added at once
            continue
        sae = new_sae("relu", find_point(subject, place).width, 48, dtype=torch.float64)
        cached, whole = (generate(subject, PROMPT, 12, saes={place: sae}, use_cache=flag) for flag in (True, False))
        assert Reader(subject).cached
        assert torch.allclose(cached.logits, whole.logits, rtol=0, atol=1e-5), kind  # several families compute norms or attention in float32
        assert torch.equal(cached.tokens, whole.tokens), kind
        assert not torch.allclose(whole.logits[0], generate(subject, PROMPT, 1).logits[0], atol=1e-3), "the SAE did nothing"


@pytest.mark.parametrize("name", EVERY)
def test_every_family_generates(name):
    "Also those that take a cache and give none back: what is written with a cache asked for is what is written without one."
    kind, sizes = EVERY[name]
    try:
        subject = subject_from_model(tiny_model(kind, sizes=sizes), name=name)
    except UserError:
        pytest.skip("refused, as its row of the table says")
    place = f"blocks.{len(subject.blocks) - 1}.hook_resid_pre"
    saes = {place: new_sae("relu", find_point(subject, place).width, 48)}
    cached, whole = (generate(subject, PROMPT, 4, saes=saes, use_cache=flag) for flag in (True, False))
    assert torch.equal(cached.tokens, whole.tokens)
    assert (cached.logits - whole.logits).abs().max() < 1e-3 * whole.logits.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture):
    "In evaluation mode no architecture looks at other tokens, so feeding them one by one changes nothing."
    subject, place = tiny_subject("gpt2", dtype="float64"), "blocks.1.hook_resid_pre"
    options = {"k": 4} if architecture in ("topk", "batchtopk", "matryoshka") else {}
    sae = new_sae(architecture, 16, 48, dtype=torch.float64, **options).eval()
    cached, whole = (generate(subject, PROMPT, 12, saes={place: sae}, sampling=Sampling(1.0, seed=2), use_cache=flag) for flag in (True, False))
    assert torch.allclose(cached.logits, whole.logits, rtol=0, atol=1e-10) and torch.equal(cached.tokens, whole.tokens)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_transformers_generates_the_same(family):
    "An independent loop: transformers' own greedy search, with the SAE spliced in."
    subject, place = tiny_subject(family, dtype="float64"), "blocks.1.hook_resid_pre"
    sae = new_sae("relu", 16, 48, dtype=torch.float64)
    with splice(subject, {place: sae}), torch.no_grad():
        theirs = subject.model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=15, use_cache=True)
    assert generate(subject, PROMPT, 15, saes={place: sae}).tokens.tolist() == theirs[0, len(PROMPT) :].tolist()


def test_comparison_ends_where_the_text_ends():
    "The original ends its text early; the other continuation may go on, and the divergence is measured along the original's."
    subject, place = tiny_subject("gpt2", dtype="float64"), "blocks.1.hook_resid_pre"
    free = generate(subject, PROMPT, 12).tokens.tolist()

    class Tokenizer:
        eos_token_id = free[3]

        def decode(self, ids):
            return " ".join(map(str, ids))

    subject.tokenizer = Tokenizer()
    found = compare(subject, {place: new_sae("relu", 16, 48, dtype=torch.float64)}, PROMPT, 12)
    until = free.index(free[3]) + 1
    assert found.original == free[:until] and len(found.kl) == len(found.choices) == until
    assert found._repr_html_().count("<li") == until and ("With SAEs it goes on" in found._repr_html_()) == (len(found.spliced) > until)
