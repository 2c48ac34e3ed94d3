"""The real wandb, offline: a run is logged without a login or a connection, and wandb's own file holds the numbers."""

import json
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from e2e_sae_nb import trackers
from e2e_sae_nb.runs import MetricsLog, RunConfig

wandb = pytest.importorskip("wandb")
VALUES = {"loss": {"logits_kl": {"coeff": 1.0}, "sparsity": {"coeff": 2.0}}, "saes": {"sae_positions": ["blocks.1.hook_resid_pre"]},
          "train_data": {"dataset_name": "docstrings"}, "tlens_model_name": "docstrings", "lr": 1e-3, "batch_size": 4, "n_samples": 64}


def records(path: Path) -> list:
    "The records of a .wandb file: wandb's protocol buffers in LevelDB's log format, after a header of 7 bytes."
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, found, parts = path.read_bytes(), 7, [], b""
    assert raw[:4] == b":W&B"
    while at + 7 <= len(raw):
        if (left := 32768 - at % 32768) < 7:  # a block's end is padded
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", raw[at : at + 7])
        if at + 7 + size > len(raw):  # still being written
            break
        parts += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "IN_TEST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("E2E_SAE_PROGRESS", "1")


def test_offline(no_login, tmp_path, capfd):
    config = RunConfig.from_dict(VALUES | {"wandb_project": "sparse", "wandb_run_name": "mine"})
    log = MetricsLog(config, tmp_path, show=False)
    log.write(16, {"loss": 0.5, "kl": 0.25})
    log.write(32, {"loss": 0.125, "kl": float("nan")})
    log.close()
    assert capfd.readouterr().err.count("logged offline") == 1
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    until = time.time() + 60  # wandb writes in a process of its own
    while (found := records(file))[-1:] == [] or found[-1].WhichOneof("record_type") != "exit":
        assert time.time() < until, "wandb did not finish its file"
        time.sleep(0.05)
    (run,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("sparse", "mine")
    assert {i.key: json.loads(i.value_json) for i in run.config.update}["loss"]["sparsity"]["coeff"] == 2.0
    steps = [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in r.history.item} for r in found if r.WhichOneof("record_type") == "history"]
    assert [(s["samples"], s["loss"]) for s in steps] == [(16, 0.5), (32, 0.125)] and steps[0]["kl"] == 0.25
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0.5, 0.125]


def test_no_connection(no_login, tmp_path, capfd, monkeypatch):
    "A login, but nothing answers: one line, and the run is logged offline by the real package."
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(trackers, "WANDB_SECONDS", 2.0)
        log = MetricsLog(RunConfig.from_dict(VALUES | {"wandb_project": "sparse"}), tmp_path, show=False)
        log.write(16, {"loss": 0.5})
        log.close()
    assert [line.startswith("wandb: ") for line in capfd.readouterr().err.splitlines() if "logged offline" in line] == [True]
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 0.5


def test_sync_knows_the_run(no_login, tmp_path):
    "`wandb sync` lists the offline run as one that is still to be uploaded."
    log = MetricsLog(RunConfig.from_dict(VALUES | {"wandb_project": "sparse"}), tmp_path, show=False)
    log.write(16, {"loss": 0.5})
    log.close()
    done = subprocess.run([sys.executable, "-m", "wandb", "sync", "--dry-run"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert file.name in done.stdout + done.stderr, done.stdout + done.stderr
