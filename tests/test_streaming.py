"""Streams from a server in a process of its own that is killed, restarted and moody; shards whose writer is killed: not a token changes."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_commands import CLI, CONFIGS, cli, local

from e2e_sae_nb import load_run
from e2e_sae_nb.core import UserError
from e2e_sae_nb.corpus import train_tokenizer
from e2e_sae_nb.data import open_stream, read_documents
from e2e_sae_nb.documents import DataConfig
from e2e_sae_nb.models import tiny_model
from e2e_sae_nb.prefetch import Prefetch
from e2e_sae_nb.remote import REMOTE_KINDS, fetch
from e2e_sae_nb.tokenization import write_shards

TEXTS = [f"number {i} is {'even' if i % 2 == 0 else 'odd'}, and so is {i + 2}; " * (1 + i % 5) for i in range(3000)]


class Server:
    "Serves a folder from a process of its own, on a port that stays the same over restarts."

    def __init__(self, folder: Path, moods: str = ""):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.folder, self.moods, self.kills = folder, moods, 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        moods = []
        if self.moods:
            (self.folder.parent / "moods").write_text(self.moods)
            moods = [str(self.folder.parent / "moods")]
        script = str(Path(__file__).with_name("range_server.py"))
        self.process = subprocess.Popen([sys.executable, script, str(self.folder), str(self.port), *moods])
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError("the server does not start")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.kills += 1

    def trouble(self, seed: int, times: int, up: float = 0.4) -> threading.Thread:
        "Kill and restart at moments that follow from the seed."
        def run() -> None:
            rng = random.Random(seed)
            for _ in range(times):
                time.sleep(rng.uniform(0.02, up))
                self.kill()
                time.sleep(rng.uniform(0, 0.3))
                self.start()
        thread = threading.Thread(target=run)
        thread.start()
        return thread


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS[:200], vocab_size=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "files"
    folder.mkdir()
    for number in range(3):
        part = TEXTS[number * 1000 : (number + 1) * 1000]
        pd.DataFrame({"text": part}).to_parquet(folder / f"part-{number}.parquet", row_group_size=100)
        (folder / f"part-{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    (folder / "all.txt").write_text("\n".join(TEXTS))
    return folder


@pytest.fixture
def server(folder):
    server = Server(folder)
    yield server
    server.kill()


def remote(server, name="part-*.parquet", **keys):
    return DataConfig(f"{server.url}/{name}", **{"n_ctx": 16, "seed": 3, "held_out_share": 0.1, "shuffle_buffer": 50, "lines": True, **keys})


def batches(config, tokenizer, role="train"):
    return list(open_stream(config, batch_size=4, tokenizer=tokenizer, vocab_size=300, role=role, repeat=False))


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("name", ["part-*.parquet", "part-*.jsonl", "all.txt"])
def test_remote_files_read_like_local_ones(server, folder, tokenizer, name, workers):
    config = remote(server, name, workers=workers)
    assert list(read_documents(config)) == TEXTS
    for role in ("train", "eval"):
        here, there = (batches(replace(config, dataset_name=place), tokenizer, role) for place in (str(folder / name), config.dataset_name))
        assert len(here) == len(there) > 5 and all(map(torch.equal, here, there))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in (1, 2))])
def test_killed_and_restarted(folder, tokenizer, seed):
    "Documents and batches are those of an undisturbed stream, each once."
    server = Server(folder)
    config, rng = remote(server, workers=seed), random.Random(seed)
    expected = batches(replace(config, dataset_name=str(folder / "part-*.parquet")), tokenizer)
    trouble, found = server.trouble(seed, 4), []
    for document in read_documents(config):
        found.append(document)
        if rng.random() < 0.01:
            time.sleep(0.05)  # so that the stream is read while the server goes and comes
    assert found == TEXTS
    stream, again = Prefetch(open_stream(config, batch_size=4, tokenizer=tokenizer, vocab_size=300, repeat=False)), []
    for batch in stream:
        again.append(batch)
        time.sleep(0.003)
    trouble.join()
    assert server.kills == 4 and len(again) == len(expected) and all(map(torch.equal, again, expected))
    server.kill()


@pytest.mark.parametrize("stop", [0, 7, 61])
def test_resume_in_a_stream(server, folder, tokenizer, stop):
    make = lambda: Prefetch(open_stream(remote(server), batch_size=4, tokenizer=tokenizer, vocab_size=300))
    whole, first, later = make(), make(), make()
    expected = [next(whole) for _ in range(stop + 10)]
    for _ in range(stop):
        next(first)
    later.load_state_dict(json.loads(json.dumps(first.state_dict())))
    trouble = server.trouble(stop, 2)
    assert all(torch.equal(next(later), batch) for batch in expected[stop:])
    trouble.join()


def test_moods(folder, tokenizer):
    "Errors, bodies cut short, drips and silences, in an order that follows from a seed."
    server = Server(folder, "\n".join(random.Random(0).choices(["500", "cut", "drip", "silent", "ok"], [4, 4, 1, 0.2, 3], k=60)))
    try:
        assert list(read_documents(remote(server, workers=2))) == TEXTS
        server.kill()
        server.moods = "silent\nsilent\nok"
        server.start()
        path = folder / "part-0.parquet"
        assert fetch(f"{server.url}/{path.name}", 0, 1000, timeout=0.3).body == path.read_bytes()[:1000]
    finally:
        server.kill()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_part(served, folder, data):
    content = (folder / "part-1.jsonl").read_bytes()
    start = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.integers(1, 3000))
    assert fetch(f"{served.url}/part-1.jsonl", start, length).body == content[start : start + length]


@pytest.fixture(scope="module")
def served(folder):
    server = Server(folder)
    yield server
    server.kill()


def test_a_server_that_stays_away_is_said_within_the_bound(folder, tokenizer):
    server = Server(folder)
    stream = open_stream(remote(server, retry_seconds=2, workers=1), batch_size=4, tokenizer=tokenizer, vocab_size=300)
    next(stream)
    server.kill()
    start = time.monotonic()
    with pytest.raises(UserError, match="nothing has come for 2 s .*train --resume") as caught:
        for _ in stream:
            pass
    assert "\n" not in str(caught.value) and 1.5 < time.monotonic() - start < 30


def test_what_waiting_cannot_mend_is_said_at_once(server, tokenizer):
    start = time.monotonic()
    for name, says in (("nothing.parquet", "404"), ("*.csv", "none in the listing"), ("x.zip", ", ".join(REMOTE_KINDS))):
        with pytest.raises(UserError, match=says):
            batches(remote(server, name), tokenizer)
    with pytest.raises(UserError, match="did you mean 'text'"):
        batches(remote(server, column_name="txt"), tokenizer)
    assert time.monotonic() - start < 30


def test_a_file_that_changes_is_noticed(folder, tmp_path):
    (tmp_path / "x").mkdir()
    path = tmp_path / "x" / "a.parquet"
    pd.DataFrame({"text": TEXTS}).to_parquet(path, row_group_size=100)
    server = Server(path.parent)
    try:
        documents = read_documents(remote(server, "a.parquet", workers=0))
        next(documents)
        pd.DataFrame({"text": TEXTS[::-1]}).to_parquet(path, row_group_size=100)
        with pytest.raises(UserError, match="has changed while it was being read"):
            list(documents)
    finally:
        server.kill()


def test_training_through_kills(folder, tokenizer, tmp_path):
    """A run by the command line whose server dies in every sixth answer and comes back ends with the weights of an undisturbed one, bit for bit.

    The server's deaths follow from what it was asked for, not from a clock, so they lie in the run on any machine."""
    tiny_model("gpt2", n_layer=2, n_embd=8, n_positions=16, vocab_size=300).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = lambda place, name: ["train", CONFIGS[0], *local(tmp_path, save_dir=tmp_path, wandb_project="null", n_samples=4096, wandb_run_name=name,
        save_every_n_samples=1024, eval_every_n_samples="null", log_every_n_grad_steps=1, **{"saes.sae_positions": "blocks.1.hook_resid_pre"}, **{f"{side}_data.{key}": value for side in ("train", "eval")
        for key, value in {"dataset_name": place, "is_tokenized": "false", "column_name": "text", "shuffle_buffer": 20}.items()})]
    whole = cli(*words(folder / "part-*.parquet", "whole"))
    assert whole.returncode == 0, whole.stderr[-2000:]
    server = Server(folder, "\n".join(["ok"] * 5 + ["die"]))
    process = subprocess.Popen([*CLI, *map(str, words(f"{server.url}/part-*.parquet", "shaken"))], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deaths, log = [], tmp_path / "shaken" / "metrics.jsonl"
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until:
        if server.process.poll() is not None:
            deaths.append(len(log.read_text().splitlines()) if log.is_file() else 0)
            time.sleep(0.1)  # away for a moment
            server.start()
        time.sleep(0.01)
    assert process.wait(timeout=60) == 0, process.stderr.read()[-2000:]
    server.kill()
    print(deaths)
    assert len(deaths) >= 3 and len({steps for steps in deaths if steps > 0}) >= 2, deaths
    a, b = (load_run(tmp_path / name).saes["blocks.1.hook_resid_pre"] for name in ("whole", "shaken"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert load_run(tmp_path / "whole").summary["kl"] == load_run(tmp_path / "shaken").summary["kl"]


def test_tokenize_goes_on_after_kills(folder, tokenizer, tmp_path):
    "SIGKILL at several moments; the folder is that of an uninterrupted writing, and what a stream reads is the text's."
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = folder / "part-*.parquet"
    words = ["tokenize", source, "--tokenizer", tmp_path / "tokenizer", "--held-out-share", "0.1", "--shard-tokens", "1000"]
    whole = cli(*words, "--out", tmp_path / "whole")
    assert whole.returncode == 0 and "3,000 documents" in whole.stdout, whole.stderr[-2000:]
    total = len(list((tmp_path / "whole").glob("train-*.npy")))
    for share in (0.05, 0.3, 0.7):  # killed as soon as so many of the files are there
        process = subprocess.Popen([*CLI, *map(str, words), "--out", str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while len(list((tmp_path / "cut").glob("train-*.npy"))) < share * total and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "cut" / "shards.json").exists(), "the writing ended before it could be killed"
    with pytest.raises(UserError, match="is not complete"):
        batches(DataConfig(str(tmp_path / "cut"), n_ctx=16, held_out_share=0.1), tokenizer)
    assert cli(*words, "--out", tmp_path / "cut").returncode == 0
    files = lambda name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.name != "shards.json"}
    assert files("whole") == files("cut")
    text = DataConfig(str(source), n_ctx=16, seed=3, held_out_share=0.1, shuffle_buffer=50)
    for streaming in (True, False):
        for role in ("train", "eval"):
            pair = [batches(replace(text, dataset_name=str(place), streaming=streaming), tokenizer, role) for place in (source, tmp_path / "cut")]
            assert len(pair[0]) == len(pair[1]) and all(map(torch.equal, *pair))
    wrong = cli(*words[:-2], "--out", tmp_path / "cut", "--shard-tokens", "999")
    assert wrong.returncode == 2 and "begun with another shard_tokens" in wrong.stderr and "Traceback" not in wrong.stderr


def test_shards_of_large_vocabularies(folder, tokenizer, tmp_path):
    tokenizer = type(tokenizer).from_pretrained(_saved(tokenizer, tmp_path))
    tokenizer.add_tokens([f"<extra {i}>" for i in range(70_000)])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{text} <extra {69_000 + i}>"}) + "\n" for i, text in enumerate(TEXTS[:50])))
    config = DataConfig(str(tmp_path / "a.jsonl"), n_ctx=8, held_out_share=0)
    assert write_shards(config, tmp_path / "shards", tokenizer)["dtype"] == "uint32"
    pair = [list(open_stream(replace(config, dataset_name=str(tmp_path / n)), batch_size=4, tokenizer=tokenizer, repeat=False)) for n in ("a.jsonl", "shards")]
    assert all(map(torch.equal, *pair)) and max(int(b.max()) for b in pair[1]) > 2**16


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


@pytest.mark.full
def test_memory_is_flat(root):
    "Ten times the input, the same memory; the stored figures (data/results/flat_memory.json) are of 0.2 and 2 GB."
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, root / "benchmarks" / "flat_memory.py", "0.1", "1.0"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks: dict[str, list[int]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{'stage'"):
            row = json.loads(line.replace("'", '"'))
            peaks.setdefault(row["stage"], []).append(row["peak_bytes"])
    assert set(peaks) == {"nothing", "stream", "tokenize", "shards"}
    for name, (small, large) in peaks.items():
        assert large < small + 150e6, (name, small, large)
