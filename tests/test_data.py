"""Data: packing and resuming for any documents and any stopping point; sides that never share a document; faults in one line."""

import json
import time
import tracemalloc

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e2e_sae_nb import data as data_module
from e2e_sae_nb.config import from_dict
from e2e_sae_nb.core import UserError
from e2e_sae_nb.corpus import train_tokenizer
from e2e_sae_nb.data import (
    ArrayRows,
    StreamedRows,
    TokenStream,
    id_rows,
    keep_mask,
    open_stream,
    read_documents,
    tokenize,
)
from e2e_sae_nb.documents import DataConfig, pack

TEXTS = [f"number {i} is {'even' if i % 2 == 0 else 'odd'}, and so is {i + 2}" for i in range(150)]
DOCUMENTS = st.lists(st.lists(st.integers(1, 50), max_size=30), max_size=25)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    "The same documents in every form that can be read."
    folder = tmp_path_factory.mktemp("data")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    ids = [tokenizer(t)["input_ids"] for t in TEXTS]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t, "meta": 1}) + "\n" for t in TEXTS))
    (folder / "a.json").write_text(json.dumps([{"text": t} for t in TEXTS]))
    (folder / "a.txt").write_text("\n".join(TEXTS))
    frame = datasets.Dataset.from_dict({"text": TEXTS})
    frame.to_parquet(folder / "a.parquet")
    frame.to_csv(folder / "a.csv", index=False)
    frame.save_to_disk(folder / "saved")
    other = datasets.Dataset.from_dict({"text": ["something else"] * 9})
    datasets.DatasetDict({"train": frame, "validation": other}).save_to_disk(folder / "splits")
    (folder / "many").mkdir()
    for i in range(3):
        (folder / "many" / f"{i}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[i * 50 : (i + 1) * 50]))
    (folder / "ids.jsonl").write_text("".join(json.dumps({"input_ids": [*i, 0]}) + "\n" for i in ids))  # of many lengths
    (folder / "rows.jsonl").write_text("".join(json.dumps({"input_ids": np.resize(i, 10).tolist()}) + "\n" for i in ids))  # all long enough
    yield folder
    patch.undo()


TEXT_SOURCES = ["a.jsonl", "a.json", "a.txt", "a.parquet", "a.csv", "saved", "splits", "many", "many/*.jsonl"]
SOURCES = [*TEXT_SOURCES, "ids.jsonl", "rows.jsonl"]


def stream(place, tokenizer, name, streaming=True, role="train", repeat=True, batch_size=3, **keys):
    keys = {"n_ctx": 8, "seed": 1, "held_out_share": 0.2, "shuffle_buffer": 16, "lines": True, **keys}
    config = DataConfig(str(place / name), is_tokenized=name in ("ids.jsonl", "rows.jsonl"), streaming=streaming, **keys)
    return open_stream(config, batch_size=batch_size, tokenizer=tokenizer, vocab_size=300, role=role, repeat=repeat)


def rows_of(s):
    return sorted(map(tuple, torch.cat(list(s)).tolist()))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("name", SOURCES)
def test_resume_at_every_batch(place, tokenizer, name, streaming):
    whole, at = stream(place, tokenizer, name, streaming), []
    batches = []
    while whole.epoch < 2:  # two ends of the data, with batches across them
        at.append(json.loads(json.dumps(whole.state_dict())))
        batches.append(next(whole))
    assert batches[0].dtype == torch.int64 and batches[0].shape == (3, 8)
    step = 1 if name in ("a.jsonl", "ids.jsonl", "rows.jsonl") else 17
    again = stream(place, tokenizer, name, streaming)
    for i in range(0, len(batches) - 2, step):
        again.load_state_dict(at[i])
        assert again.state_dict() == at[i]
        assert all(torch.equal(next(again), batches[i + j]) for j in range(3)), i


@pytest.mark.parametrize("role", ["train", "eval"])
def test_every_source_yields_the_same_rows(place, tokenizer, role):
    expected = rows_of(stream(place, tokenizer, "a.jsonl", role=role, repeat=False))
    for name in TEXT_SOURCES:
        for streaming in (True, False):
            assert rows_of(stream(place, tokenizer, name, streaming, role, repeat=False)) == expected, (name, streaming)


def test_epochs_and_seeds(place, tokenizer):
    for streaming in (True, False):
        s = stream(place, tokenizer, "a.jsonl", streaming, batch_size=1)
        epochs: list[list] = [[], [], []]
        while s.epoch < 2:
            row = next(s)
            epochs[s.epoch].append(tuple(row[0].tolist()))
        assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]  # the same rows in another order
        first, second = (next(stream(place, tokenizer, "a.jsonl", streaming, seed=seed)) for seed in (1, 2))
        assert not torch.equal(first, second)
        one, other = (list(stream(place, tokenizer, "a.jsonl", streaming, "eval", seed=seed)) for seed in (1, 2))
        assert all(map(torch.equal, one, other))  # evaluation has one order, and an end


def test_streams_read_the_sides_they_say(place):
    "End to end: rows that hold one document's number each are read by exactly one role."
    (place / "numbers.jsonl").write_text("".join(json.dumps({"input_ids": [i] * 8}) + "\n" for i in range(500)))
    def numbers(role, split="train", streaming=True, seed=0):
        config = DataConfig(str(place / "numbers.jsonl"), is_tokenized=True, n_ctx=8, split=split, held_out_share=0.1, seed=seed,
                            streaming=streaming)
        return set(torch.cat(list(open_stream(config, batch_size=7, role=role, repeat=False))).flatten().tolist())
    for streaming in (True, False):
        train = numbers("train", streaming=streaming)
        for split, seed in (("train", 42), ("held_out", 0)):  # as the reference's files have it, and by name
            held_out = numbers("eval", split, streaming, seed)
            assert len(held_out) > 20 and not train & held_out and train | held_out == set(range(500))
    for split in ("held_out", "validation", "train[:50%]"):
        with pytest.raises(UserError):
            numbers("train", split)


def test_own_validation_split_is_read_whole(place, tokenizer):
    s = stream(place, tokenizer, "splits", role="eval", split="validation")
    assert set(tokenizer.decode(torch.cat(list(s)).flatten()).replace("<|endoftext|>", "|").split("|")) >= {"something else"}
    with pytest.raises(UserError, match="there are train, validation, held_out"):
        stream(place, tokenizer, "splits", role="eval", split="test")
    with pytest.raises(UserError, match="is for evaluation"):
        stream(place, tokenizer, "splits", split="validation")


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, st.integers(2, 12), st.booleans())
def test_packing_loses_nothing_but_the_tail(documents, n_ctx, with_bos):
    bos = 99 if with_bos else None
    rows = [r.tolist() for r in pack(documents, n_ctx, 0, bos)]
    joined = [token for document in documents for token in [*document, 0]]
    width = n_ctx - (bos is not None)
    assert rows == [([] if bos is None else [bos]) + joined[i : i + width] for i in range(0, len(joined) - width + 1, width)]
    joined = [i for d in documents for i in [*d, 0]]
    width = n_ctx - with_bos
    assert all(len(r) == n_ctx for r in rows) and (not with_bos or all(r[0] == bos for r in rows))
    found = [i for r in rows for i in r[with_bos:]]
    assert found == joined[: len(found)] and len(joined) - len(found) < width


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(2, 9), st.integers(0, 12), st.integers(1, 5), st.data())
def test_resume_for_any_documents(documents, n_ctx, buffer, batch_size, pick):
    rows = list(pack(documents, n_ctx, 0))
    tokens = np.concatenate([*rows, []]).astype(int)
    sources = [StreamedRows(lambda: pack(documents, n_ctx, 0), 3, buffer), ArrayRows(tokens, n_ctx, 3, True)]
    for source in sources:
        make = lambda: TokenStream(source, batch_size, repeat=True, name="x")
        if not rows:
            with pytest.raises(UserError, match="too little"):
                next(make())
            continue
        whole, stop = make(), pick.draw(st.integers(0, 25))
        for _ in range(stop):
            next(whole)
        again = make()
        again.load_state_dict(whole.state_dict())
        assert all(torch.equal(next(whole), next(again)) for _ in range(4))
        once = TokenStream(source, batch_size, repeat=False, name="x")
        assert rows_of(once) == sorted(tuple(r.tolist()) for r in rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab cé\n ", max_size=60), max_size=80), st.integers(10, 400))
def test_tokenizing_in_pieces_keeps_text_and_order(tokenizer_once, texts, chunk):
    assert [tokenizer_once.decode(ids) for ids in tokenize(texts, tokenizer_once, chunk)] == texts


@pytest.fixture(scope="module")
def tokenizer_once(tokenizer):
    return tokenizer


def test_long_documents_are_packed_in_linear_time():
    start = time.perf_counter()
    assert sum(1 for _ in pack([list(range(2_000_000))], 64, 0)) == 2_000_001 // 64
    assert time.perf_counter() - start < 20  # the definition takes minutes


def test_streaming_memory_is_flat():
    def peak(n):
        tracemalloc.start()
        source = StreamedRows(lambda: pack(([7] * 50 for _ in range(n)), 32, 0), 0, 100)
        sum(1 for _ in TokenStream(source, 4, repeat=False))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found
    assert peak(20_000) < 1.5 * peak(2_000)


def test_tokenized_rows():
    make = lambda *rows: [np.array(r) for r in rows]
    assert [r.tolist() for r in id_rows(make([1, 2, 3, 4], [5, 6, 7]), 3, 0)] == [[1, 2, 3], [5, 6, 7]]
    assert [r.tolist() for r in id_rows(make([1, 2], [3, 0], []), 3, 0)] == [[1, 2, 0], [3, 0, 0]]
    assert [r.tolist() for r in id_rows(make([1, 2], [3]), 3, None)] == [[1, 2, 3]]  # no tokenizer, so no separator
    mixed = [*make(*[[1, 2, 3]] * 300), np.array([1])]  # a short row after the first 256 long ones is left out
    assert len(list(id_rows(mixed, 3, 0))) == 300


def test_configuration_is_read_strictly():
    legacy = {"dataset_name": "apollo-research/x", "is_tokenized": True, "tokenizer_name": "gpt2", "streaming": True, "split": "train",
              "n_ctx": 1024, "seed": 0, "column_name": "input_ids"}
    config = from_dict(DataConfig, legacy)
    assert config.column == "input_ids" and config.n_ctx == 1024
    with pytest.raises(UserError, match="did you mean 'dataset_name'"):
        from_dict(DataConfig, {"dataset_nam": "x"})


@pytest.mark.parametrize("content, keys, says", [
    ('{"text": "a"}\n{"text": "b"\nbroken\n', {}, "x.jsonl, line 2, is not valid JSON"),
    ("", {}, "is empty"),
    ('{"text": "a"}\n', {"column_name": "txt"}, "did you mean 'text'"),
    ('{"text": "a"}\n', {"is_tokenized": True, "column_name": "text"}, "set is_tokenized: false"),
    ('{"text": [1, 2]}\n', {}, "set is_tokenized: true"),
    ('{"input_ids": [1.5, 2.0]}\n', {"is_tokenized": True}, "lists of token ids"),
    ('{"input_ids": [[1], [2]]}\n', {"is_tokenized": True}, "lists of token ids"),
    ('{"input_ids": [1, 2, -100]}\n', {"is_tokenized": True, "n_ctx": 3}, "-100"),
    ('{"input_ids": [1, 2, 700]}\n', {"is_tokenized": True, "n_ctx": 3}, "token id 700, but the subject's vocabulary has 300"),
    ('{"text": "a"}\n', {"n_ctx": 1000}, "do not fill one row of n_ctx = 1000"),
    ('{"text": null}\n{"text": "a"}\n', {"n_ctx": 1000}, "of the 1 documents"),
])
@pytest.mark.parametrize("streaming", [True, False])
def test_faulty_data_is_one_line(content, keys, says, streaming, tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_text(content)
    config = DataConfig(str(tmp_path / "x.jsonl"), streaming=streaming, held_out_share=0, **{"n_ctx": 8, **keys})
    with pytest.raises(UserError, match=says) as caught:
        next(open_stream(config, batch_size=1, tokenizer=tokenizer, vocab_size=300))
    assert "\n" not in str(caught.value)


def test_no_network_is_said_at_once(monkeypatch):
    "A name on the Hub without a network: one line, in seconds; nothing is asked of the network here."
    monkeypatch.setattr(data_module, "answers", lambda url: False)
    monkeypatch.setattr(data_module, "getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data_module, "open_documents", lambda config: pytest.fail("opened"))
    with pytest.raises(UserError, match="cannot be reached. Offline, give a local .jsonl"):
        open_stream(DataConfig("some/name", n_ctx=8, is_tokenized=True), batch_size=1)


def test_unreachable_servers_do_not_answer():
    start = time.perf_counter()
    assert not data_module.answers("https://no-such-host.invalid", seconds=1)
    assert not data_module.answers("http://127.0.0.1:9", seconds=1)
    assert time.perf_counter() - start < 60


def test_a_connection_lost_on_the_way_is_one_line(monkeypatch):
    def examples(config):
        yield {"text": "a"}
        raise ConnectionResetError("gone\nwith details")
    monkeypatch.setattr(data_module, "open_documents", examples)
    with pytest.raises(UserError, match="failed after 1 documents: gone$"):
        list(read_documents(DataConfig("x")))


def test_docstrings_bring_their_own_held_out_side():
    with pytest.raises(UserError, match="is for evaluation"):
        open_stream(DataConfig("docstrings", n_ctx=8, split="held_out_all"), batch_size=1)


def test_beginning_of_text(place, tokenizer):
    for name in ("a.jsonl", "ids.jsonl", "rows.jsonl"):
        batch = next(stream(place, tokenizer, name, add_bos=True))
        assert batch.shape == (3, 8) and (batch[:, 0] == tokenizer.bos_token_id).all()
    with pytest.raises(UserError, match="add_bos needs"):
        stream(place, None, "rows.jsonl", add_bos=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=5), st.sets(st.integers(0, 9)), st.booleans(),
       st.booleans())
def test_keep_mask(rows, special, first, specials):
    if specials and not special:
        with pytest.raises(UserError, match="train_data.tokenizer_name"):
            keep_mask(torch.tensor(rows), special, first, specials)
        return
    keep = keep_mask(torch.tensor(rows), special, first, specials)
    expected = [[not (first and p == 0) and not (specials and i in special) for p, i in enumerate(row)] for row in rows]
    assert (keep is None and not first and not specials) or keep.tolist() == expected
