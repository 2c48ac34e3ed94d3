"""Inputs that went wrong without a word: padding, special tokens nobody knows, lines taken for documents, columns, replaced data, threads left behind."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_streaming import Server
from tokenizers import AddedToken
from transformers import AutoTokenizer
from typer.testing import CliRunner

from e2e_sae_nb import RunConfig, evaluate, load_run, train
from e2e_sae_nb.cli import app
from e2e_sae_nb.core import UserError, data_path
from e2e_sae_nb.corpus import train_tokenizer
from e2e_sae_nb.data import keep_mask, open_stream, read_documents, read_rows, special_token_ids
from e2e_sae_nb.documents import DataConfig
from e2e_sae_nb.models import tiny_model
from e2e_sae_nb.readers import PART
from e2e_sae_nb.tokenization import write_shards

WIDTH, PAD = 24, 0


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"number {i} is even or odd, and so is {i + 2}" for i in range(300)], vocab_size=300)


@pytest.fixture
def said(capsys):
    "What was said on stderr; a line that is said once in a process may have been said by an earlier test, so names differ."
    return lambda: capsys.readouterr().err


# padding

def padded(side):
    "Texts of 10 to 24 tokens (from 10 on, so that none is padding), padded to 24 as a tokenizer does it; the texts too."
    rng = np.random.default_rng(0)
    texts = [rng.integers(10, 200, rng.integers(10, WIDTH + 1)).tolist() for _ in range(600)]
    rows = []
    for text in texts:
        gap = WIDTH - len(text)
        ids, mask = ([PAD] * gap + text, [0] * gap + [1] * len(text)) if side == "left" else (text + [PAD] * gap, [1] * len(text) + [0] * gap)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": 1})
    return texts, rows


def written(rows, folder, form):
    path = folder / f"rows.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif form == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "saved"])
@pytest.mark.parametrize("streaming", [True, False])
def test_no_padding_reaches_the_network(form, side, streaming, tmp_path):
    texts, rows = padded(side)
    config = DataConfig(written(rows, tmp_path, form), is_tokenized=True, n_ctx=WIDTH, streaming=streaming, held_out_share=0.2)
    assert [ids.tolist() for ids in read_documents(config)] == texts
    read = torch.cat([batch for role in ("train", "eval") for batch in open_stream(config, batch_size=4, role=role, repeat=False)])
    assert not read.eq(PAD).any() and read.numel() > 0.95 * sum(map(len, texts))  # all but two tails
    short = replace(config, n_ctx=8)  # rows that are long enough are cut: to what they are, not to padding
    first = torch.cat([batch for role in ("train", "eval") for batch in open_stream(short, batch_size=4, role=role, repeat=False)])
    assert sorted(map(tuple, first.tolist())) == sorted(tuple(text[:8]) for text in texts)


def test_no_padding_from_a_server(tmp_path):
    texts, rows = padded("left")
    for form in ("jsonl", "parquet"):
        written(rows, tmp_path, form)
    server = Server(tmp_path)
    try:
        for form in ("jsonl", "parquet"):
            config = DataConfig(f"{server.url}/rows.{form}", is_tokenized=True)
            assert [ids.tolist() for ids in read_documents(config)] == texts
    finally:
        server.kill()


def test_no_padding_from_the_hub(monkeypatch, tmp_path):
    texts, rows = padded("right")
    config = DataConfig("some/name", is_tokenized=True)
    for streaming in (True, False):
        found = datasets.Dataset.from_list(rows)
        found = found.to_iterable_dataset() if streaming else found
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, found=found, **__: found)
        assert [ids.tolist() for ids in read_documents(replace(config, streaming=streaming))] == texts


def test_padding_is_left_out_before_sides_are_chosen(tmp_path):
    "The same text padded to other widths is on the same side."
    texts, rows = padded("left")
    for name, more in (("a", 0), ("b", 5)):
        wider = [{"input_ids": [PAD] * more + row["input_ids"], "attention_mask": [0] * more + row["attention_mask"]} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wider), encoding="utf-8")
    for role in ("train", "eval"):
        one, other = (torch.cat(list(open_stream(DataConfig(str(tmp_path / f"{name}.jsonl"), is_tokenized=True, n_ctx=8, held_out_share=0.3),
                                                 batch_size=4, role=role, repeat=False))) for name in "ab")
        assert sorted(map(tuple, one.tolist())) == sorted(map(tuple, other.tolist()))


@pytest.mark.parametrize("mask, says", [([1, 1, 0, 1], "zeros in the middle of a row"), ([1, 1], "does not fit its row of 4"), ("1111", "does not fit")])
def test_masks_that_cannot_be_right(mask, says, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"input_ids": [1, 2, 3, 4], "attention_mask": mask}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=says):
        next(open_stream(DataConfig(str(tmp_path / "a.jsonl"), is_tokenized=True, n_ctx=4, held_out_share=0), batch_size=1))


def test_padding_without_a_mask(tmp_path, said):
    texts, rows = padded("right")
    bare = [{"input_ids": row["input_ids"]} for row in rows]
    config = DataConfig(written(bare, tmp_path, "jsonl"), is_tokenized=True)
    special = SimpleNamespace(pad_token_id=PAD, eos_token_id=5, bos_token_id=None)
    assert [ids.tolist() for ids in read_documents(config, special)] == texts
    assert said() == ""
    same = SimpleNamespace(pad_token_id=PAD, eos_token_id=PAD, bos_token_id=PAD)  # then nobody can tell
    assert [ids.tolist() for ids in read_documents(config, same)] == [row["input_ids"] for row in rows]
    assert said().count("which may be padding") == 1


def test_rows_that_become_short_are_said(tmp_path, said):
    rows = [{"input_ids": [7] * 8, "attention_mask": [1] * 8}] * 300 + [{"input_ids": [9] * 8, "attention_mask": [1] * 3 + [0] * 5}] * 2
    config = DataConfig(written(rows, tmp_path, "jsonl"), is_tokenized=True, n_ctx=8, held_out_share=0)
    assert len(list(read_rows(config, "train", 8, None))) == 300
    assert said().count("shorter than n_ctx = 8 are left out") == 1


# special tokens

def test_special_tokens_nobody_knows(tmp_path, tokenizer):
    with pytest.raises(UserError, match="train_data.tokenizer_name"):
        keep_mask(torch.tensor([[0, 5, 0, 7]]), special_token_ids(None), False, True)
    added = type(tokenizer).from_pretrained(_kept(tokenizer, tmp_path))
    added.add_tokens(
        [AddedToken("<turn>", special=True), "plain"])
    ids = special_token_ids(added)
    assert added.convert_tokens_to_ids("<turn>") in ids and added.convert_tokens_to_ids("plain") not in ids and added.eos_token_id in ids


def _kept(tokenizer, folder):
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def small_run(folder, data="a.jsonl", **further):
    return RunConfig.from_dict({"tlens_model_path": str(folder / "model"), "loss": {"sparsity": {"coeff": 0.3}, "out_to_in": {"coeff": 1.0}},
        "saes": {"sae_positions": "blocks.1.hook_resid_pre", "dict_size_to_input_ratio": 2.0}, "lr": 1e-3, "batch_size": 4, "n_samples": 16,
        "train_data": {"dataset_name": str(folder / data), "n_ctx": 16, "held_out_share": 0.2}, "eval_n_samples": 8, "save_dir": str(folder),
        "save_every_n_samples": 8, "compute_dtype": "float32", "compile": False, "wandb_run_name": "run", **further})


@pytest.fixture
def place(tmp_path):
    "A tiny network with the embedded tokenizer, and documents."
    tiny_model("gpt2", vocab_size=4096).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(data_path("docstrings-lm")).save_pretrained(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i} says that {i * 7} is a number. " * 4}) + "\n" for i in range(120)), encoding="utf-8")
    return tmp_path


def test_a_run_that_would_exclude_nothing_is_not_begun(place):
    for file in (place / "model").glob("*token*"):
        file.unlink()
    (place / "a.jsonl").write_text("".join(json.dumps({"input_ids": list(range(i, i + 20))}) + "\n" for i in range(120)), encoding="utf-8")
    data = {"dataset_name": str(place / "a.jsonl"), "is_tokenized": True, "n_ctx": 16, "held_out_share": 0.2}
    with pytest.raises(UserError, match="train_data.tokenizer_name"):
        train(small_run(place, exclude_special_tokens=True, train_data=data))
    assert not (place / "run").exists()
    run = train(small_run(place, train_data=data))
    evaluate(run)  # what cannot be said is not said
    found = json.loads((run.path / "evaluation.json").read_text(encoding="utf-8"))
    assert "without_first_position" in found and "without_first_position_and_special_tokens" not in found
    assert found["without_first_position"]["tokens"] == found["all_positions"]["tokens"] * 15 // 16


# text

def test_a_text_file_is_a_document(tmp_path, tokenizer, said):
    code = "def f(x):\n    if x:\n        return 1\n\n    return 2\n"
    (tmp_path / "code.txt").write_text(code, encoding="utf-8")
    assert list(read_documents(DataConfig(str(tmp_path / "code.txt")))) == [code]
    assert said() == "code.txt: 1 text file, read as 1 document; lines: true (--lines) makes each line a document\n"
    assert list(read_documents(DataConfig(str(tmp_path / "code.txt"), lines=True))) == [line for line in code.split("\n") if line]
    assert said() == "code.txt: 1 text file, each line a document: 4 documents, 1 blank lines left out\n"


def test_one_large_text_has_two_sides_that_share_nothing(tmp_path, tokenizer):
    paragraphs = [f"[{i}] number {i} is even or odd, and so is {i + 2}. " * 12 for i in range(900)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    assert (tmp_path / "book.txt").stat().st_size > 20 * PART
    config = DataConfig(str(tmp_path / "book.txt"), held_out_share=0.2, n_ctx=16, tokenizer_name=str(_kept(tokenizer, tmp_path)))
    sides = {role: tokenizer.decode(np.concatenate(list(read_rows(config, role, 16, tokenizer)))) for role in ("train", "eval")}
    numbers = {role: set(pd.Series(text).str.findall(r"\[(\d+)\]")[0]) for role, text in sides.items()}
    assert len(numbers["eval"]) > 20 and not numbers["train"] & numbers["eval"]
    assert len(numbers["train"] | numbers["eval"]) >= 898  # but for the two tails
    assert sides["train"].count("<|endoftext|>") < 0.5 * len(paragraphs)
    write_shards(config, tmp_path / "shards", tokenizer, shard_tokens=5000)
    for role in ("train", "eval"):
        pair = [list(open_stream(replace(config, dataset_name=name), batch_size=4, tokenizer=tokenizer, role=role, repeat=False))
                for name in (config.dataset_name, str(tmp_path / "shards"))]
        assert len(pair[0]) == len(pair[1]) > 5 and all(map(torch.equal, *pair))


def test_a_huge_text_is_read_in_pieces(tmp_path):
    "Memory for a text file does not grow with it."
    code = """
import sys, tracemalloc
from e2e_sae_nb.data import read_documents
from e2e_sae_nb.documents import DataConfig
tracemalloc.start()
count = sum(len(text) for text in read_documents(DataConfig(sys.argv[1])))
print(count, tracemalloc.get_traced_memory()[1])
"""
    found = []
    for megabytes in (6, 24):
        path = tmp_path / f"{megabytes}.txt"
        path.write_text("a word of it \n\n" * (megabytes * 2**20 // 15), encoding="utf-8")
        out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
        count, peak = map(int, out.stdout.split())
        assert count == path.stat().st_size
        found.append(peak)
    assert found[1] < 1.2 * found[0] < 2**25


def test_a_short_text_has_one_side_and_says_so(tmp_path, tokenizer):
    (tmp_path / "short.txt").write_text("number 1 is odd. " * 50, encoding="utf-8")
    config = DataConfig(str(tmp_path / "short.txt"), n_ctx=8, held_out_share=0.2)
    says = []
    for role in ("train", "eval"):
        try:
            next(open_stream(config, batch_size=1, tokenizer=tokenizer, role=role))
        except UserError as error:
            says.append(str(error))
    assert len(says) == 1 and "One document has one side only" in says[0] and "lines: true" in says[0]


def test_runs_of_the_time_of_lines_go_on_by_lines(place):
    "A run folder whose configuration does not know the key was trained when each line was a document."
    text = place / "old.txt"
    text.write_text("\n".join(f"line {i} says that {i * 7} is a number, and so on and so on" for i in range(300)), encoding="utf-8")
    data = {"dataset_name": str(text), "n_ctx": 16, "held_out_share": 0.2, "lines": True}
    run = train(small_run(place, train_data=data))
    file = run.path / "config.yaml"
    old = file.read_text(encoding="utf-8").replace("  lines: true\n", "")
    assert old != file.read_text(encoding="utf-8")
    file.write_text(old, encoding="utf-8")
    again = load_run(run.path)
    assert again.config.train_data.lines and evaluate(again).kl == pytest.approx(run.summary["kl"], rel=1e-9)


def test_the_commands_know_lines(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("one line\n\nanother line\n" * 200, encoding="utf-8")
    words = ["tokenize", str(tmp_path / "a.txt"), "--tokenizer", str(_kept(tokenizer, tmp_path))]
    counts = []
    for further in ([], ["--lines"]):
        out = tmp_path / f"shards{len(further)}"
        result = CliRunner().invoke(app, [*words, "--out", str(out), *further])
        assert result.exit_code == 0, result.output
        counts.append(json.loads((out / "shards.json").read_text(encoding="utf-8"))["documents"])
    # a file of 4,600 characters is read in parts of a little over 1,024, each ending at a blank line: four and the rest
    assert [sum(count.values()) for count in counts] == [5, 400]
    assert "--lines" in CliRunner().invoke(app, ["train-lm", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output


# columns

def test_a_column_more_and_another_type(tmp_path):
    for name, rows in {"a": [{"text": f"a{i}", "n": 1} for i in range(80)], "b": [{"text": f"b{i}", "n": 1.5, "more": {"x": [i]}} for i in range(80)],
                       "c": [{"more": "x", "text": f"c{i}"} for i in range(80)]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for streaming in (True, False):
        assert list(read_documents(DataConfig(str(tmp_path), streaming=streaming))) == [f"{name}{i}" for name in "abc" for i in range(80)]
    (tmp_path / "d.jsonl").write_text('{"txt": "d"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"d\.jsonl has no column 'text'; set column_name: did you mean 'txt'"):
        list(read_documents(DataConfig(str(tmp_path))))


def test_ids_that_become_fractions(tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text('{"input_ids": [1, 2]}\n{"input_ids": [1.0, 2.0]}\n', encoding="utf-8")
    assert [ids.tolist() for ids in read_documents(DataConfig(str(path), is_tokenized=True))] == [[1, 2], [1, 2]]
    path.write_text('{"input_ids": [1, 2]}\n{"input_ids": [1.5, 2.0]}\n', encoding="utf-8")
    with pytest.raises(UserError, match="does not hold lists of token ids but, for instance, '\\[1.5, 2.0\\]'"):
        list(read_documents(DataConfig(str(path), is_tokenized=True)))


@pytest.mark.parametrize("streaming", [True, False])
def test_words_that_look_like_nothing(tmp_path, streaming):
    texts = ["NA", "null", "None", "", "nan", "N/A", "1", "1.50", "true", "a, b", 'c "d"', "e\nf"]
    pd.DataFrame({"n": range(len(texts)), "text": texts}).to_csv(tmp_path / "a.csv", index=False)
    assert list(read_documents(DataConfig(str(tmp_path / "a.csv"), streaming=streaming))) == texts


# keys that stand twice

def test_keys_that_stand_twice_are_refused_by_every_command(place):
    (place / "run.yaml").write_text("lr: 1e-3\nbatch_size: 4\nlr: 1e-4\n", encoding="utf-8")
    for command in ("train", "frontier", "sweep"):
        result = CliRunner().invoke(app, [command, str(place / "run.yaml")])
        found = result.output + str(result.exception or "")
        assert result.exit_code != 0 and "line 3 gives the key 'lr' again (first in line 1)" in found, (command, found)


# the beginning of text

def test_a_beginning_that_is_missing_is_said(tmp_path, said):
    from tokenizers import processors

    tokenizer = train_tokenizer(["some words of text"] * 5, vocab_size=300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert tokenizer("a")["input_ids"][0] == bos
    (tmp_path / "bos.jsonl").write_text('{"text": "some words of text"}\n' * 200, encoding="utf-8")
    config = DataConfig(str(tmp_path / "bos.jsonl"), n_ctx=8, held_out_share=0)
    assert bos not in next(open_stream(config, batch_size=4, tokenizer=tokenizer))
    assert said().count("add_bos: true") == 1
    assert (next(open_stream(replace(config, add_bos=True), batch_size=4, tokenizer=tokenizer))[:, 0] == bos).all()
    assert said() == ""


# data that were replaced

@pytest.mark.parametrize("form", ["jsonl", "shards"])
def test_a_resume_notices_other_data(place, form, said):
    if form == "shards":
        tokenizer = AutoTokenizer.from_pretrained(place / "model")
        source = DataConfig(str(place / "a.jsonl"), held_out_share=0.2)
        write_shards(source, place / "shards", tokenizer)
    data = {"jsonl": "a.jsonl", "shards": "shards"}[form]
    run = train(small_run(place, data))
    whole = {p: p.read_bytes() for p in ([place / data] if form == "jsonl" else sorted((place / data).iterdir()))}
    for path, content in whole.items():  # written anew: another time, the same content
        path.write_bytes(content)
    said()
    assert train(resume_from=run.path).summary["kl"] == run.summary["kl"]
    evaluate(run)
    assert "other data" not in said()
    text = (place / "a.jsonl").read_text(encoding="utf-8")
    (place / "a.jsonl").write_text(text.replace("says", "said"), encoding="utf-8")  # as many bytes
    if form == "shards":
        for path in whole:
            path.unlink()
        write_shards(source, place / "shards", tokenizer)
    before = {p: p.stat().st_mtime_ns for p in sorted(run.path.rglob("*")) if p.is_file() and p.name != ".lock"}
    with pytest.raises(UserError, match="holds other data than when this position was saved") as caught:
        train(resume_from=run.path)
    assert "\n" not in str(caught.value)
    assert before == {p: p.stat().st_mtime_ns for p in sorted(run.path.rglob("*")) if p.is_file() and p.name != ".lock"}
    said()
    evaluate(run)
    assert said().count("may have been trained on") == 1


def test_old_positions_are_taken_with_a_word(place, said):
    run = train(small_run(place))
    stream = open_stream(replace(run.config.train_data, seed=0), batch_size=4, tokenizer=AutoTokenizer.from_pretrained(place / "model"))
    stream.load_state_dict({"epoch": 0, "row": 8})
    assert said().count("saved without a fingerprint") == 1
    assert stream.row == 8


# threads

@pytest.mark.parametrize("reads", ["ahead", "stream", "prefetch", "documents"])
def test_what_is_not_read_to_its_end_ends_quietly(reads, tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i} is even"}) + "\n" for i in range(20_000)), encoding="utf-8")
    code = f"""
from e2e_sae_nb.data import open_stream, read_documents
from e2e_sae_nb.documents import DataConfig
from e2e_sae_nb.prefetch import Prefetch
from e2e_sae_nb.remote import ahead
from tokenizers import AddedToken
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(_kept(tokenizer, tmp_path))!r})
config = DataConfig({str(tmp_path / 'a.jsonl')!r}, n_ctx=8, workers=3, shuffle_buffer=16)
stream = {{"ahead": lambda: ahead(lambda n: n, range(10**6), 3), "stream": lambda: open_stream(config, batch_size=2, tokenizer=tokenizer),
          "prefetch": lambda: Prefetch(open_stream(config, batch_size=2, tokenizer=tokenizer)), "documents": lambda: read_documents(config)}}[{reads!r}]()
next(stream)
print("read")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr, done.returncode) == ("read\n", "", 0)
