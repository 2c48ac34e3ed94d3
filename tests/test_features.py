"""What a feature page shows is what it says: direct effects against the networks themselves, positions that a run leaves out,
each run on its own network, and the texts of tokens."""

import json

import pytest
import torch
from torch import nn

from e2e_sae_nb.core import UserError
from e2e_sae_nb.dashboard import features, pane, subjects_of
from e2e_sae_nb.families import FAMILIES
from e2e_sae_nb.features import describe, direct_effects, direct_path, firings, no_direct_path
from e2e_sae_nb.generation import compare, generate
from e2e_sae_nb.models import Subject, load_subject, subject_from_model, tiny_model, tiny_subject
from e2e_sae_nb.passages import cases_of
from e2e_sae_nb.runs import RunConfig
from e2e_sae_nb.sae import SAE
from e2e_sae_nb.splicing import edit, original_pass, splice
from e2e_sae_nb.state import data_for, keep_for
from e2e_sae_nb.token_texts import TokenTexts
from e2e_sae_nb.training import train

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

# modules whose outputs are added to the residual stream, by family: what a direct effect holds fixed
ADDERS = {"gpt2": ("attn", "mlp"), "gpt_neo": ("attn", "mlp"), "gpt_neox": ("attention", "mlp"), "llama": ("self_attn", "mlp"),
          "qwen3": ("self_attn", "mlp"), "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
          "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
          "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm")}
CAPPED = ("gemma2",)


def network(family: str) -> Subject:
    "A tiny network whose norms have weights (and biases) of their own."
    subject = tiny_subject(family, dtype="float64")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for module in subject.model.modules():
            if "norm" in type(module).__name__.lower():
                for parameter in module.parameters():
                    nn.init.normal_(parameter, 0.5, 0.5)
    return subject


def blocks_and_adders(subject: Subject, family: str) -> list[tuple[int, nn.Module]]:
    return [(i, block.get_submodule(path)) for i, block in enumerate(subject.blocks) for path in ADDERS[family]]


def with_the_rest_fixed(subject: Subject, family: str, place: str, tokens: torch.Tensor, new) -> torch.Tensor:
    "Logits after changing an activation while every module that adds to the residual stream later says what it said before."
    block, kind = int(place.split(".")[1]), place.split(".", 2)[2]
    order = blocks_and_adders(subject, family)
    first_free = {"hook_resid_pre": 2 * block, "attn.hook_z": 2 * block + 1, "hook_attn_out": 2 * block + 1,
                  "mlp.hook_post": 2 * block + 2, "hook_mlp_out": 2 * block + 2}[kind]  # from here on nothing may answer
    said, handles = {}, []
    for number, (_, module) in enumerate(order):
        handles.append(module.register_forward_hook(lambda m, a, out, n=number: said.__setitem__(n, out)))
    with torch.no_grad():
        subject(tokens)
        for handle in handles:
            handle.remove()
        fixed = [module.register_forward_hook(lambda m, a, out, n=number: said[n])
                 for number, (_, module) in enumerate(order) if number >= first_free]
        try:
            with edit(subject, [(place, new)]):
                return subject(tokens)
        finally:
            for handle in fixed:
                handle.remove()


KINDS = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "mlp.hook_post", "hook_mlp_out")


@pytest.mark.parametrize("family", ADDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_direct_effects_are_the_networks_own(family, kind):
    "A finite difference of the network itself, in which all that comes later is held fixed; the mean over real positions."
    subject, place = network(family), f"blocks.1.{kind}"
    tokens = torch.randint(37, (3, 9), generator=torch.Generator().manual_seed(0))
    width = original_pass(subject, tokens, [place]).activations[place].shape[-1]
    rows = nn.functional.normalize(torch.randn(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), dim=-1)
    step, expected = 0.01, []
    for row in rows:
        ends = [with_the_rest_fixed(subject, family, place, tokens, lambda x, s=s, row=row: x + s * step * row).flatten(0, 1).mean(0) for s in (1, -1)]
        expected.append((ends[0] - ends[1]) / (2 * step))
    expected = torch.stack(expected)
    expected -= expected.mean(-1, keepdim=True)
    found = direct_path(subject, place, tokens).logits(rows)
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < (0.03 if family in CAPPED else 1e-3), error
    top = direct_effects(subject, rows, k=1, place=place, tokens=tokens)
    if family not in CAPPED:
        assert [effect["up"][0][0] for effect in top] == expected.argmax(-1).tolist()
        assert [effect["down"][0][0] for effect in top] == expected.argmin(-1).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_direct_effects(name):
    "Final norms that are divided, called twice or missing, too: a finite difference at the end of the residual stream."
    kind, sizes = FAMILIES[name]
    try:
        subject = subject_from_model(tiny_model(kind, sizes=sizes, dtype="float64"), name=name)
    except UserError:
        pytest.skip("refused, as its row of the table says")
    end, tokens = f"blocks.{len(subject.blocks) - 1}.hook_resid_post", torch.arange(18).view(2, 9)
    row, step, passed = torch.linspace(-1, 1, subject.points[end].width, dtype=torch.float64).sin(), 0.01, []
    ends = []
    for sign in (1, -1):
        with torch.no_grad(), edit(subject, [(end, lambda x, sign=sign: passed.append(sign) or x + (sign * step * row).to(x))]):
            ends.append(subject(tokens).double().flatten(0, 1).mean(0))
    assert passed == [1, -1]  # once per pass
    expected = (ends[0] - ends[1]) / (2 * step)
    expected -= expected.mean()
    found = direct_path(subject, end, tokens).logits(row[None])[0]
    assert (found - expected).norm() < (0.03 if subject.head.softcap else 1e-3) * expected.norm()
    inner = [place for place in subject.points if place.startswith(f"blocks.{len(subject.blocks) - 1}.")]
    assert inner
    assert all(direct_effects(subject, torch.eye(subject.points[place].width)[:1], k=1, place=place, tokens=tokens) for place in inner)


def test_only_counted_positions_are_averaged():
    "With a mask, the effect is the mean over its positions, which a huge first position does not touch."
    subject, place = network("llama"), "blocks.1.hook_resid_pre"
    tokens = torch.arange(18).view(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, 0] = False
    whole, later = direct_path(subject, place, tokens), direct_path(subject, place, tokens, mask)
    first = direct_path(subject, place, tokens, ~mask)
    assert torch.allclose(whole.matrix, (first.matrix + 8 * later.matrix) / 9, atol=1e-6)
    assert not torch.allclose(first.matrix, later.matrix, atol=1e-3)


def test_a_capped_head_with_large_logits():
    "Where the cap bends, its mean slope per token of the vocabulary is not one, and effects still follow the network."
    subject, place = tiny_subject("gemma2", dtype="float64"), "blocks.2.hook_resid_post"
    nn.init.normal_(subject.norm.weight, 12.0, 0.5, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(37, (4, 16), generator=torch.Generator().manual_seed(0))
    path = direct_path(subject, place, tokens)
    assert (path.slope < 0.9).any() and (path.slope > 0).all()
    rows, step = torch.eye(16, dtype=torch.float64)[:4], 0.01
    for row, found in zip(rows, path.logits(rows), strict=True):
        ends = []
        for sign in (1, -1):
            with torch.no_grad(), edit(subject, [(place, lambda x, sign=sign, row=row: x + sign * step * row)]):
                ends.append(subject(tokens).flatten(0, 1).mean(0))
        expected = (ends[0] - ends[1]) / (2 * step)
        assert torch.corrcoef(torch.stack([found, expected - expected.mean()]))[0, 1] > 0.95


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_processed_weights_have_effects(family, tmp_path):
    "A wrapped head and a folded norm are asked like any other: the effects are those that the plain network has."
    tiny_model(family).save_pretrained(tmp_path)
    plain, processed = (load_subject(tmp_path, processed_weights=flag) for flag in (False, True))
    tokens = torch.randint(37, (3, 9), generator=torch.Generator().manual_seed(0))
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    for kind in ("hook_resid_pre", "hook_mlp_out", "attn.hook_z"):
        effects = [direct_path(subject, f"blocks.1.{kind}", tokens).logits(rows) for subject in (plain, processed)]
        assert effects[1].abs().max() > 0
        # processing takes the mean off what is written, which the norm would take off anyhow
        assert torch.allclose(effects[0], effects[1], atol=1e-4 * effects[0].abs().max().item()), kind


def test_no_path_is_said():
    subject = tiny_subject("llama")
    assert "more than a linear map" in no_direct_path(subject, "blocks.0.mlp.hook_in")
    assert no_direct_path(Subject.from_module(nn.Linear(3, 3)), "weight") == "the network has no unembedding"
    assert direct_effects(subject, torch.eye(16)[:2], place="blocks.0.mlp.hook_in") == [{"up": [], "down": []}] * 2
    with pytest.raises(UserError, match="more than a linear map"):
        direct_path(subject, "blocks.0.mlp.hook_in", torch.zeros(1, 3, dtype=torch.long))


# ---- runs on small networks of their own ----


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Folders of two tiny networks with tokenizers of their own, and text."
    root = tmp_path_factory.mktemp("models")
    words = [f"{a}{b}" for a in ("red", "blue", "old", "new") for b in ("cat", "dog", "tree", "sea", "sun")]
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(words[i] for i in torch.randint(len(words), (40,), generator=generator).tolist()) for _ in range(60)]
    (root / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for family, size in (("gpt2", 300), ("llama", 320)):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False))
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
        fast.save_pretrained(root / family)
        tiny_model(family, vocab_size=len(fast)).save_pretrained(root / family)
    return root


def trained(models, family, places="blocks.1.hook_resid_pre", **further):
    values = {"tlens_model_path": str(models / family), "saes": {"sae_positions": places, "dict_size_to_input_ratio": 4},
              "loss": {"sparsity": {"coeff": 0.1}, "out_to_in": {"coeff": 1.0}}, "lr": 1e-3, "batch_size": 4, "n_samples": 20,
              "eval_n_samples": 8, "save_dir": str(models / "runs"), "wandb_run_name": f"{family}-{len(places)}-{len(further)}",
              "train_data": {"dataset_name": str(models / "docs.jsonl"), "n_ctx": 16, "held_out_share": 0.4}}
    return train(RunConfig.from_dict(values | further))


@pytest.fixture(scope="module")
def excluding(models):
    return trained(models, "gpt2", exclude_first_position=True, exclude_special_tokens=True)


def shout(subject, tokens, sae):
    "What the SAE does on every position, by definition."
    x = original_pass(subject, tokens, ["blocks.1.hook_resid_pre"]).activations["blocks.1.hook_resid_pre"]
    return sae(x).c.detach()


def test_excluded_positions_rule_nothing(models, excluding):
    "Densities, maxima, contexts and company are those of the positions that count, by hand; the page says what is left out."
    subject = load_subject(models / "gpt2", device="cpu")
    tokens = next(iter(data_for(excluding.config, subject, "eval")))
    keep = keep_for(excluding.config, subject)
    end = subject.tokenizer.eos_token_id
    mask = (torch.arange(tokens.shape[1]) > 0) & (tokens != end)
    assert torch.equal(keep(tokens), mask) and (tokens[:, 1:] == end).any(), "special tokens inside sequences as well"
    sae = excluding.saes["blocks.1.hook_resid_pre"]
    code = shout(subject, tokens, sae)
    facts = describe(subject, "blocks.1.hook_resid_pre", sae, [tokens], keep=keep, ablate=False, around=30)
    assert facts["tokens"] == int(mask.sum()) and facts["excluded"] == int((~mask).sum())
    active = code[mask] > 0
    assert [latent["id"] for latent in facts["latents"]] == active.any(0).nonzero()[:, 0].tolist()
    for latent in facts["latents"]:
        values = code[..., latent["id"]]
        assert latent["density"] == pytest.approx(active[:, latent["id"]].float().mean().item())
        assert latent["max"] == pytest.approx(values[mask].max().item(), abs=1e-5)
        for context in latent["contexts"]:
            assert context["at"] not in context["excluded"] and 0 in context["excluded"]  # whole sequences, here
            assert all(context["activation"][i] == 0 for i in context["excluded"])
            assert {i for i, token in enumerate(context["tokens"]) if token == end} <= set(context["excluded"])
    both = [(a & b).sum().item() / (a | b).sum().item() for a, b in [(active[:, facts["latents"][0]["id"]], active[:, j]) for j, _ in facts["latents"][0]["company"]]]
    assert [share for _, share in facts["latents"][0]["company"]] == pytest.approx(both)
    page = features(excluding, n_tokens=200)
    assert "left out, as in the run: the first position of each sequence and special tokens" in page.panes[0]["subtitle"]


def test_ablation_keeps_excluded_activations(models, excluding):
    "The effect of removing a latent, in the spliced network that the run has: by hand, with the mask."
    subject, place = load_subject(models / "gpt2", device="cpu"), "blocks.1.hook_resid_pre"
    tokens, keep, sae = next(iter(data_for(excluding.config, subject, "eval"))), keep_for(excluding.config, subject), excluding.saes["blocks.1.hook_resid_pre"]
    facts = describe(subject, place, sae, [tokens], keep=keep)
    found = firings(subject, place, sae, [tokens], keep)
    seen = 0
    for latent in facts["latents"][:6]:
        s, p = divmod(found.top(latent["id"], 1)[0], tokens.shape[1])
        text, counts = tokens[s : s + 1], keep(tokens[s : s + 1])[..., None]

        def new(x, gone, at=p, n=latent["id"], counts=counts):
            acts = sae(x)
            output = acts.output.clone()
            output[0, at] -= gone * acts.c[0, at, n] * sae.dictionary[n]
            return torch.where(counts, output, x)

        logits, everywhere = [], []
        for gone in (0, 1):
            with torch.no_grad(), edit(subject, [(place, lambda x, gone=gone: new(x, gone))]):
                logits.append(subject(text)[0, p].log_softmax(-1))
            with torch.no_grad(), edit(subject, [(place, lambda x, gone=gone: new(x, gone, counts=torch.ones_like(counts)))]):
                everywhere.append(subject(text)[0, p].log_softmax(-1))
        kl = lambda pair: (pair[0].exp() * (pair[0] - pair[1])).sum().item()
        assert latent["ablation"]["kl"] == pytest.approx(kl(logits), abs=1e-6)
        seen += abs(kl(logits) - kl(everywhere)) > 1e-6
    assert seen, "the mask must matter for this to test anything"


def test_passages_show_what_counts(models, excluding):
    subject = load_subject(models / "gpt2", device="cpu")
    cases = cases_of(excluding, subject, 5, n_tokens=5000, explain=2, test=4, width=10)
    tokens = torch.cat(list(data_for(excluding.config, subject, "eval")))
    texts = TokenTexts(subject.tokenizer)
    starts = {tuple(texts.within(row[:10])) for row in tokens.tolist()}
    passages = [p for case in cases for p in (*case.explain, *case.test)]
    assert passages and not any(p.tokens in starts for p in passages), "none begins at the first position"
    for p in passages:
        assert [not c for c in p.counts or [True] * len(p.tokens)] == [t == "<end>" for t in p.tokens]
        assert all(v == 0 for v, t in zip(p.values, p.tokens, strict=True) if t == "<end>")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("cached", [True, False])
def test_generation_keeps_excluded_activations(models, family, cached):
    "Position 0 and special tokens, in the prompt and in what is written, with the cache and without: the whole text again, masked."
    subject, place = load_subject(models / family, device="cpu", dtype="float64"), "blocks.1.hook_resid_pre"
    end = subject.tokenizer.eos_token_id
    config = RunConfig.from_dict({"tlens_model_path": "x", "saes": {"sae_positions": place}, "loss": {"sparsity": {"coeff": 1}}, "lr": 1e-3, "batch_size": 1, "n_samples": 1,
                                  "train_data": {"dataset_name": "x"}, "exclude_first_position": True, "exclude_special_tokens": True})
    keep, saes = keep_for(config, subject), {place: SAE(16, 40, dtype=torch.float64)}
    prompt = [5, end, 17, 30]
    found = generate(subject, prompt, 10, saes=saes, keep=keep, use_cache=cached)
    text = list(prompt)
    for token, logits in zip(found.tokens.tolist(), found.logits, strict=True):
        whole = torch.tensor([text])
        mask = torch.tensor([[i > 0 and t != end for i, t in enumerate(text)]])
        with splice(subject, saes, keep=mask), torch.no_grad():
            expected = subject(whole)[0, -1]
        assert torch.allclose(logits, expected, atol=1e-5) and token == int(expected.argmax())
        text.append(token)
    assert not torch.allclose(found.logits[0], generate(subject, prompt, 1, saes=saes).logits[0], atol=1e-3), "the mask did nothing"
    both = compare(subject, saes, prompt, 5, keep=keep, excluded="these")
    assert both.counts == [True] * 5 and both.summary.endswith("not counted: these")


def test_each_run_on_its_own_network(models):
    "A pane beside another is the pane alone; one network for two different runs is refused; the same one is loaded once."
    first, second = trained(models, "gpt2", ["blocks.0.hook_resid_post", "blocks.2.hook_mlp_out"]), trained(models, "llama")
    both, alone = features([first, second], n_tokens=200), features(second, n_tokens=200)
    strip = lambda pane: {key: value for key, value in pane.items() if key not in ("provenance", "run")}
    assert [(p["run"], p["place"]) for p in both.panes] == [(0, "blocks.0.hook_resid_post"), (0, "blocks.2.hook_mlp_out"), (1, "blocks.1.hook_resid_pre")]
    assert strip(both.panes[2]) == strip(alone.panes[0])
    assert str(models / "llama") in both.panes[2]["subtitle"] and str(models / "gpt2") in both.panes[0]["subtitle"]
    with pytest.raises(UserError, match="different networks"):
        features([first, second], load_subject(models / "gpt2"))
    with pytest.raises(UserError, match="2 runs need a network each"):
        features([first, second], [load_subject(models / "gpt2")])
    shared = subjects_of([first, first, second])
    assert shared[0] is shared[1] is not shared[2]


def test_a_run_of_processed_weights_is_another_network(models):
    "One folder, but not one network: not shared."
    runs = [trained(models, "gpt2"), trained(models, "gpt2", processed_weights=True)]
    plain, processed = subjects_of(runs)
    assert plain is not processed
    page = features(runs, n_tokens=200)
    assert ["processed weights" in p["subtitle"] for p in page.panes] == [False, True]
    assert all(latent["up"] for p in page.panes for latent in p["latents"])


# ---- the texts of tokens ----

TEXT = "The thin cat\nsat: é, €5, 🙂 there  and\tthere."


def tokenizer_of(kind: str):
    "A small tokenizer of each kind, trained here."
    decoders, models, normalizers = tokenizers.decoders, tokenizers.models, tokenizers.normalizers
    pre, trainers = tokenizers.pre_tokenizers, tokenizers.trainers
    quiet = {"show_progress": False, "special_tokens": ["<unk>"]}
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fused = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    model, trainer, decoder, before, normalizer = {
        "bytes": (models.BPE(), trainers.BpeTrainer(vocab_size=290, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False), decoders.ByteLevel(), pre.ByteLevel(add_prefix_space=False), None),
        "bytes-prefixed": (models.BPE(), trainers.BpeTrainer(vocab_size=290, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False), decoders.ByteLevel(), pre.ByteLevel(add_prefix_space=True), None),
        "llama": (models.BPE(byte_fallback=True, unk_token="<unk>"), trainers.BpeTrainer(vocab_size=300, **quiet), fused, None, spaces),
        "metaspace": (models.Unigram(), trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", **quiet), decoders.Metaspace(), pre.Metaspace(), None),
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=80, **quiet), decoders.WordPiece(), pre.BertPreTokenizer(), None),
        "words": (models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(vocab_size=80, **quiet), None, pre.Whitespace(), None),
        "suffix": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer(vocab_size=80, end_of_word_suffix="</w>", **quiet), decoders.BPEDecoder(), pre.BertPreTokenizer(), None)}[kind]
    tokenizer = tokenizers.Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    if before is not None:
        tokenizer.pre_tokenizer = before
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(["The theory of the other thing, then.", "It costs nothing", "that the thin cat sat there"], trainer)
    if kind == "llama":
        state = json.loads(tokenizer.to_str())
        state["model"]["vocab"] |= {f"<0x{b:02X}>": len(state["model"]["vocab"]) + b for b in range(256)}
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>" if tokenizer.token_to_id("<unk>") is not None else None)


TOKENIZERS = ("bytes", "bytes-prefixed", "llama", "metaspace", "wordpiece", "words", "suffix")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_join_to_the_text(kind):
    "Of any stretch of tokens the texts joined are the decoded text, but for the space that a decoder takes off a text's beginning."
    tokenizer = tokenizer_of(kind)
    texts, ids = TokenTexts(tokenizer), tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert texts.anchor
    for start in range(len(ids)):
        for stop in range(start + 1, len(ids) + 1):
            part = ids[start:stop]
            words = texts.within(part)
            assert len(words) == len(part)
            # a stretch that begins inside a character has no whole text of its own
            if "\ufffd" not in (whole := tokenizer.decode(part)):
                assert "".join(words) in (whole, f" {whole}")
    assert "".join(texts.within(ids)) == texts(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_token_alone_keeps_its_space(kind):
    "The same token at a text's beginning and in its middle shows the same text."
    tokenizer = tokenizer_of(kind)
    texts = TokenTexts(tokenizer)
    (first, *_) = tokenizer(" cat" if kind.startswith("bytes") else "cat", add_special_tokens=False)["input_ids"]
    alone, after = texts.alone(first), texts.within([*texts.anchor, first])[-1]
    assert alone == after and alone.strip() and "\ufffd" not in alone
    if kind in ("llama", "metaspace", "wordpiece", "words", "bytes-prefixed"):
        assert alone.startswith(" ")


def test_parts_of_characters():
    llama, gpt2 = tokenizer_of("llama"), tokenizer_of("bytes")
    for tokenizer, names in ((llama, ["<0xE2>", "<0x82>", "<0xAC>"]), (gpt2, ["â", "Ĥ", "¬"])):
        euro, texts = tokenizer.convert_tokens_to_ids(names), TokenTexts(tokenizer)
        assert texts.within(euro) == ["", "", "€"] and [texts.alone(t) for t in euro] == ["\\xe2", "\\x82", "\\xac"]
    assert TokenTexts(llama).alone(llama.convert_tokens_to_ids("<0x0A>")) == "\n"


def test_texts_on_a_page(models):
    "Contexts show characters where they are complete; single tokens their bytes."
    subject = load_subject(models / "gpt2", device="cpu")
    ids = torch.tensor([subject.tokenizer("redcat €5 🙂 bluedog" * 3)["input_ids"][:30]])
    facts = describe(subject, "blocks.1.hook_resid_pre", SAE(16, 24, seed=0), [ids], ablate=False)
    made = pane(facts, subject, "a")
    some = [(c, made["words"]) for latent in made["latents"] for c in latent["contexts"]]
    assert any("texts" in c and "€" in c["texts"] for c, _ in some)
    for context, words in some:
        shown = context.get("texts") or [words[token] for token in context["tokens"]]
        assert len(shown) == len(context["tokens"]) and "\ufffd" not in "".join(words.values())


def test_a_cut_out_case_of_llama_2():
    "Fuse and Strip, as Llama 2, Mistral 7B and Phi-3 have them: decoding one token drops its space."
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"<s>": 0, "▁the": 1, "▁cat": 2, "s": 3}, merges=[], unk_token="<s>"))
    d = tokenizers.decoders
    inner.decoder = d.Sequence([d.Replace("▁", " "), d.Fuse(), d.Strip(" ", 1, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    assert "".join(tokenizer.decode([i]) for i in (1, 2, 3, 1, 2)) == "thecatsthecat"
    assert "".join(TokenTexts(tokenizer).within([1, 2, 3, 1, 2])) == " the cats the cat"
    assert TokenTexts(tokenizer).within([0, 1]) == ["<s>", " the"]
