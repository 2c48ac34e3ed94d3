"""The docstrings in any tokenizer's tokens: the same documents on the same sides, whatever they are cut into."""

import contextlib
import hashlib
import io

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from e2e_sae_nb.core import UserError, cache_dir, config_hash, data_path
from e2e_sae_nb.corpus import (
    END_OF_TEXT,
    corpus_for,
    docstring_corpus,
    package_versions,
    read_docstrings,
    split_by_hash,
    tokenizer_definition,
    train_tokenizer,
)
from e2e_sae_nb.data import docstring_tokens, open_stream, warn_of_other_data
from e2e_sae_nb.data_commands import tokenize
from e2e_sae_nb.documents import DataConfig
from e2e_sae_nb.shards import read_index

NAME = "docstrings:networkx"
SPLITS = ("train", "held_out", "held_out_all")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("E2E_SAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def texts():
    return [text for _, text in read_docstrings(["networkx"])]


@pytest.fixture(scope="module")
def other(texts):
    tokenizer = train_tokenizer(texts[:400], vocab_size=700)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


@pytest.fixture(scope="module")
def embedded():
    return AutoTokenizer.from_pretrained(data_path("docstrings-lm"))


def documents(tokens, tokenizer) -> list[str]:
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


def test_the_embedded_networks_own_streams_stay(texts, embedded):
    "Its key and its tokens are those of all earlier runs: documents in the order of their hashes, each ended, in 16 bits."
    corpus, raw = docstring_corpus(data_path("docstrings-lm"), ["networkx"]), (data_path("docstrings-lm") / "tokenizer.json").read_bytes()
    key = config_hash({"versions": package_versions(["networkx"]), "recipe": 1, "held_out": 20, "tokenizer": hashlib.sha256(raw).hexdigest()})
    assert corpus.folder == cache_dir(f"docstrings-{key}") and "dtype" not in corpus.info
    train, held_out = split_by_hash(texts)
    for split, side in (("train", train), ("held_out_all", held_out)):
        wanted = np.concatenate([[*embedded(text)["input_ids"], 0] for text in side]).astype(np.uint16)
        assert (corpus.folder / f"{split}.bin").read_bytes() == wanted.tobytes()
    for tokenizer in (None, embedded):
        assert np.array_equal(docstring_tokens(NAME, "held_out", tokenizer), corpus.tokens("held_out"))


def test_the_same_documents_in_other_tokens(texts, other, embedded):
    for split in SPLITS:
        theirs, ours = docstring_tokens(NAME, split, other), docstring_tokens(NAME, split)
        assert theirs.dtype == np.uint16 and not np.array_equal(theirs, ours)
        assert documents(theirs, other) == documents(ours, embedded)
    assert documents(docstring_tokens(NAME, "train", other), other) == split_by_hash(texts)[0]


def test_a_large_vocabulary(other):
    "Ids beyond 16 bits are not cut."
    wide = PreTrainedTokenizerFast(tokenizer_object=other.backend_tokenizer, eos_token=END_OF_TEXT)
    wide.add_tokens([f"<never {i}>" for i in range(2**16)])
    wide.add_special_tokens({"eos_token": "<the end>"})
    assert wide.eos_token_id > 2**16
    tokens = docstring_tokens(NAME, "held_out", wide)
    assert tokens.dtype == np.uint32 and documents(tokens, wide) == documents(docstring_tokens(NAME, "held_out", other), other)


def test_the_key_is_the_whole_definition(other):
    plain = tokenizer_definition(other)
    other("a b c d", truncation=True, max_length=2)  # what a call leaves behind is no part of it
    assert tokenizer_definition(other) == plain
    changed = PreTrainedTokenizerFast(tokenizer_object=other.backend_tokenizer, eos_token=END_OF_TEXT)
    changed.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    assert changed.get_vocab() == other.get_vocab() and tokenizer_definition(changed) != plain
    first, second = corpus_for(other, ["networkx"]), corpus_for(changed, ["networkx"])
    assert first.folder != second.folder and not np.array_equal(first.tokens("train"), second.tokens("train"))


def test_streams_and_positions(other):
    config = DataConfig(NAME, n_ctx=32, seed=3)
    opened = lambda **kw: open_stream(config, batch_size=4, tokenizer=other, vocab_size=len(other), **kw)
    first, second = opened(), opened()
    batches = [next(first) for _ in range(6)]
    for _ in range(3):
        next(second)
    state = second.state_dict()
    assert torch.equal(next(second), batches[3]) and max(int(batch.max()) for batch in batches) < len(other)
    third = opened()
    third.load_state_dict(state)
    assert torch.equal(next(third), batches[3])
    with pytest.raises(UserError, match="holds other data than when this position was saved"):
        open_stream(config, batch_size=4).load_state_dict(state)  # the embedded tokens are other data
    with contextlib.redirect_stderr(io.StringIO()) as said:
        warn_of_other_data(state, config, other)
    assert said.getvalue() == ""
    assert len(list(opened(role="eval"))) == -(-(len(docstring_tokens(NAME, "held_out", other)) // 32) // 4)


def test_beginnings_and_faults(other, embedded):
    config = DataConfig(NAME, n_ctx=16, add_bos=True)
    batch = next(open_stream(config, batch_size=8, tokenizer=other))
    assert (batch[:, 0] == other.bos_token_id).all()
    for tokenizer in (embedded, None):
        with pytest.raises(UserError, match="add_bos needs"):
            open_stream(config, batch_size=8, tokenizer=tokenizer)
    without_end = PreTrainedTokenizerFast(tokenizer_object=other.backend_tokenizer)
    with pytest.raises(UserError, match="a tokenizer with an end-of-text token"):
        open_stream(DataConfig(NAME), batch_size=1, tokenizer=without_end)


def test_shards_by_the_command(other, tmp_path, capsys):
    other.save_pretrained(tmp_path / "tokenizer")
    for name, words in (("other", str(tmp_path / "tokenizer")), ("own", "docstrings")):
        tokenize(NAME, tokenizer=words, out=tmp_path / name)
        index = read_index(tmp_path / name)
        assert index["tokenizer"]["name"] == words and index["held_out_share"] is None
        for side in ("train", "held_out"):
            stored = np.concatenate([np.load(tmp_path / name / entry["file"]) for entry in index["sides"][side]])
            assert np.array_equal(stored, docstring_tokens(NAME, side, other if name == "other" else None))
    assert capsys.readouterr().out.count("held_out: ") == 2
    for flags, says in (({"held_out_share": 0.1}, "held_out_share cannot be chosen"), ({"split": "held_out_all"}, "split cannot be chosen")):
        with pytest.raises(UserError, match=says):
            tokenize(NAME, tokenizer="docstrings", out=tmp_path / "no", **flags)
        assert not (tmp_path / "no").exists()
