"""The command line on a tiny model and local data: training from the reference's YAML keys, mistakes, kill -9 and resume."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from e2e_sae_nb import RunConfig, load_run
from e2e_sae_nb.architectures import ARCHITECTURES
from e2e_sae_nb.cli import app
from e2e_sae_nb.core import UserError, data_path, read_json, write_json
from e2e_sae_nb.losses import run_type
from e2e_sae_nb.models import tiny_model
from e2e_sae_nb.saelens import PROCESSED, RAW, to_saelens

CONFIGS = sorted((Path(__file__).parent / "configs").glob("gpt2_*.yaml"))
CLI = [sys.executable, "-c", "from e2e_sae_nb.cli import main; main()"]


def cli(*words, **kwargs):
    return subprocess.run([*CLI, *map(str, words)], capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a 12-block GPT-2 and pretokenized rows, both small."
    folder = tmp_path_factory.mktemp("place")
    tiny_model("gpt2", n_layer=12, n_embd=8, n_positions=16, vocab_size=50).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(data_path("docstrings-lm")).save_pretrained(folder / "model")
    rng = random.Random(0)
    rows = (json.dumps({"input_ids": [rng.randrange(50) for _ in range(16)]}) for _ in range(3000))
    (folder / "tokens.jsonl").write_text("\n".join(rows))
    return folder


def local(place, **changes) -> list[str]:
    "Overrides that point a published configuration at the small local model and data, and shorten it."
    data = {"dataset_name": place / "tokens.jsonl", "n_ctx": 16, "tokenizer_name": "null"}
    settings = {"tlens_model_name": "null", "tlens_model_path": place / "model", "n_samples": 128, "warmup_samples": 16, "eval_n_samples": 8,
                "eval_every_n_samples": 64, "saes.dict_size_to_input_ratio": 4, "device": "cpu", "act_frequency_n_tokens": 256,
                **{f"{side}.{k}": v for side in ("train_data", "eval_data") for k, v in data.items()}, **changes}
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_published_keys_load(path):
    with pytest.warns(UserWarning, match="obsolete"):
        config = RunConfig.from_yaml(path)
    assert run_type(config.loss) == {"gpt2_local": "local", "gpt2_e2e": "e2e", "gpt2_e2e_ds": "e2e+ds"}[path.stem]
    assert config.lr == 5e-4 and config.saes.sae_positions == ("blocks.6.hook_resid_pre",)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_published_keys_train(path, place, tmp_path):
    "With a wandb project named but no login: one line says that the run is logged offline, and nothing fails."
    done = cli("train", path, *local(place, save_dir=tmp_path), env={**os.environ, "E2E_SAE_PROGRESS": "1", "WANDB_API_KEY": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("logged offline") == 1
    run = load_run(done.stdout.strip().splitlines()[-1])
    assert run.summary["samples"] == 128 and run.summary["positions"]["blocks.6.hook_resid_pre"]["d_sae"] == 32
    assert {"config_hash", "git_commit", "versions", "device", "seed", "tokens", "seconds", "utc", "command"} <= set(run.summary["provenance"])
    assert (run.path / "wandb").is_dir()
    evaluated = cli("evaluate", run.path)
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert "without_first_position_and_special_tokens" in json.loads((run.path / "evaluation.json").read_text())


@pytest.mark.parametrize("change, says", [
    ("batchsize=4", "did you mean 'batch_size'"), ("saes.sae_positions=blocks.6.hook_residpre", "did you mean"),
    ("loss.logits_kl.coeff=-1", "must not be negative"), ("lr=fast", "expected float"), ("train_data.column_name=ids", "column"),
    ("train_data.n_ctx=17", "at most 16"), ("lr", "key=value"), ("tlens_model_path=./nowhere", "no folder"),
    ("saes.sae_positions=blocks.60.hook_resid_pre", "no hook point"), ("train_data.dataset_name=./nothing", "holds no data files")])
def test_mistakes_are_one_line(change, says, place, tmp_path):
    overrides = [w for w in local(place, save_dir=tmp_path, wandb_project="null")]
    done = cli("train", CONFIGS[1], *overrides, "--set", change)
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("e2e-sae:")]
    assert len(lines) == 1 and says in lines[0], done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir()), "a run that could not begin left a folder behind"


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in (1, 2))])
def test_kill_and_resume(seed, place, tmp_path):
    "SIGKILL at a random moment; the resumed run ends with the weights of an uninterrupted one, bit for bit."
    overrides = local(place, save_dir=tmp_path, wandb_project="null", n_samples=2048, save_every_n_samples=64, eval_every_n_samples="null",
                      log_every_n_grad_steps=4)
    whole = cli("train", CONFIGS[1], *overrides, "--set", "wandb_run_name=whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    cut = tmp_path / "cut"
    process = subprocess.Popen([*CLI, "train", str(CONFIGS[1]), *overrides, "--set", "wandb_run_name=cut"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 120
    while not list((cut / "checkpoints").glob("samples_*")) and time.time() < until and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 0.6))
    assert process.poll() is None, "the run ended before it could be killed; make it longer"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut / "summary.json").exists()
    resumed = cli("train", "--resume", cut)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    a, b = load_run(tmp_path / "whole"), load_run(cut)
    for p, q in zip(a.saes["blocks.6.hook_resid_pre"].parameters(), b.saes["blocks.6.hook_resid_pre"].parameters(), strict=True):
        assert torch.equal(p, q)
    assert a.summary["kl"] == b.summary["kl"]
    keys = [json.loads(line)["samples"] for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert keys == [json.loads(line)["samples"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]


def test_resume_wants_a_run(tmp_path):
    done = cli("train", "--resume", tmp_path)
    assert done.returncode == 2 and "not a run folder" in done.stderr


def test_tensorboard_gets_the_numbers(place, tmp_path):
    done = cli("train", CONFIGS[0], *local(place, save_dir=tmp_path, wandb_project="null", tensorboard="true"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.glob("*/tensorboard/events*"))


def test_frontier_command(place, tmp_path):
    values = yaml.safe_load(CONFIGS[1].read_text())
    values.pop("loss")
    values["frontier"] = {"local": {"lr": 1e-2, "sparsity": [0.1, 1]}, "e2e": {"lr": 1e-2, "sparsity": [0.1]}, "e2e+ds": {"lr": 1e-2, "sparsity": [0.1]}}
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(values))
    done = cli("frontier", tmp_path / "f.yaml", "--types", "local,e2e", "--out", tmp_path / "out", *local(place, wandb_project="null"))
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [r["type"] for r in summary["runs"]] == ["local", "local", "e2e"]
    assert all((tmp_path / "out" / name).is_file() for name in ("frontier.csv", "frontier.png", "report.html"))
    wrong = cli("frontier", tmp_path / "f.yaml", "--sparsity", "1,2", *local(place))
    assert wrong.returncode == 2 and "single type" in wrong.stderr


def test_train_lm_command(tmp_path):
    (tmp_path / "mine.txt").write_text("\n".join(f"line {i} says {i * 7 % 10} and then {i * 3 % 11}" for i in range(3000)))
    done = cli("train-lm", "--data", tmp_path / "mine.txt", "--lines", "--out", tmp_path / "lm", "--vocab-size", "300", "--eager", "--set", "n_layer=2",
               "--set", "d_model=16", "--set", "n_head=2", "--set", "n_ctx=16", "--set", "batch_size=8", "--set", "epochs=0.3")
    assert done.returncode == 0, done.stderr[-2000:]
    from e2e_sae_nb import load_subject

    assert load_subject(tmp_path / "lm", device="cpu").tokenizer is not None


def test_frontier_goes_on_after_a_kill(place, tmp_path):
    "The same command with --resume ends with the SAEs of an uninterrupted pass, bit for bit; `features` reads its runs."
    values = yaml.safe_load(CONFIGS[1].read_text())
    values.pop("loss")
    values["frontier"] = {"local": {"lr": 1e-2, "sparsity": [0.1]}, "e2e": {"lr": 1e-2, "sparsity": [0.1]}}
    (tmp_path / "f.yaml").write_text(yaml.safe_dump(values))
    words = ["frontier", tmp_path / "f.yaml", *local(place, wandb_project="null", n_samples=1024, save_every_n_samples=64, eval_every_n_samples="null")]
    whole = cli(*words, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    process = subprocess.Popen([*CLI, *map(str, words), "--out", str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 120
    while len(list((tmp_path / "cut" / "runs").glob("*/checkpoints/samples_*"))) < 3 and time.time() < until and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, "the pass ended before it could be killed; make it longer"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "summary.json").exists()
    resumed = cli(*words, "--out", tmp_path / "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    for name in sorted(path.name for path in (tmp_path / "whole" / "runs").iterdir() if path.is_dir()):
        a, b = (load_run(tmp_path / which / "runs" / name).saes["blocks.6.hook_resid_pre"] for which in ("whole", "cut"))
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)), name
    run = next(path for path in (tmp_path / "cut" / "runs").iterdir() if path.name.startswith("e2e"))
    page = cli("features", run, "--out", tmp_path / "features.html", "--compare", run, "--n-tokens", "500")
    assert page.returncode == 0, page.stderr[-2000:]
    assert (tmp_path / "features.html").read_text().count('"contexts"') > 2


def test_generate_command(place, tmp_path):
    "Both continuations, the page, the same text again for the same seed; a prompt too long for the network is one line."
    run = cli("train", CONFIGS[0], *local(place, wandb_project="null"), "--set", f"save_dir={tmp_path / 'runs'}")
    assert run.returncode == 0, run.stderr[-2000:]
    folder, page = next((tmp_path / "runs").iterdir()), tmp_path / "text.html"
    words = ["generate", folder, "!#$%", "--n-tokens", "8", "--temperature", "1", "--top-k", "20", "--seed", "3"]  # characters among the first 50 tokens
    first, again = cli(*words, "--html", page), cli(*words)
    assert first.returncode == 0, first.stderr[-2000:]
    assert first.stdout == again.stdout + f"{page}\n" and "first choices differ on" in again.stdout
    assert page.read_text(encoding="utf-8").count("<li") in range(1, 9)
    long = cli("generate", folder, "!#$%" * 3, "--n-tokens", "6")
    assert long.returncode == 2 and "reads at most 16 tokens" in long.stderr and "Traceback" not in long.stderr


class Model(BaseHTTPRequestHandler):
    "An OpenAI-compatible server: explanations and a list of passages."

    asked = 0
    pause = 0.0

    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        time.sleep(self.pause)
        Model.asked += 1
        answer = {"role": "assistant", "content": "some token" if "<<" in text else "[1, 2]"}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0, "finish_reason": "stop", "message": answer}]}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def test_autointerp_goes_on_after_a_kill(place, tmp_path):
    "An estimate first; killed in the middle, the same command asks only what is left; then nothing."
    # a strong penalty, so that latents are silent in some of the short sequences
    run = cli("train", CONFIGS[0], *local(place, wandb_project="null", lr=1e-2, **{"loss.sparsity.coeff": 3}), "--set", f"save_dir={tmp_path}")
    assert run.returncode == 0, run.stderr[-2000:]
    folder = next(path for path in tmp_path.iterdir() if (path / "summary.json").exists())
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = ["autointerp", folder, "--model", "m", "--base-url", f"http://127.0.0.1:{server.server_port}/v1", "--latents", "8", "--n-tokens", "20000",
             "--out", tmp_path / "scores.json", "--concurrency", "1"]
    told = cli(*words, "--estimate", "--price-in", "1", "--price-out", "1")
    assert told.returncode == 0 and "questions (0 answered before)" in told.stdout and "about $0.0" in told.stdout, told.stderr[-2000:]
    assert Model.asked == 0
    Model.pause = 0.2
    process = subprocess.Popen([*CLI, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 60
    while Model.asked < 5 and time.time() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before, Model.pause = Model.asked, 0.0
    done = cli(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "scores.json").read_text())
    n = len(result["scores"])
    assert n >= 3 and 2 * n <= Model.asked <= 2 * n + 1  # the one in flight may have been asked twice
    assert before >= 5 and result["provenance"]["config"]["method"] == "detection" and all(s["explanation"] == "some token" for s in result["scores"])
    total = Model.asked
    assert cli(*words).returncode == 0 and Model.asked == total
    server.shutdown()


def test_out_and_back_and_onwards(place, tmp_path):
    "A trained run is written for SAELens, read back as a run, evaluated to the same figures, and fine-tuned."
    run = cli("train", CONFIGS[0], *local(place, wandb_project="null", lr=1e-2), "--set", f"save_dir={tmp_path / 'runs'}")
    assert run.returncode == 0, run.stderr[-2000:]
    folder = next((tmp_path / "runs").iterdir())
    out = cli("export", folder, "--out", tmp_path / "theirs")
    assert out.returncode == 0, out.stderr[-2000:]
    cfg = json.loads((tmp_path / "theirs" / "blocks.6.hook_resid_pre" / "cfg.json").read_text())
    assert cfg["architecture"] == "standard" and cfg["metadata"]["hook_name"] == "blocks.6.hook_resid_pre"
    settings = local(place)
    wanted = [w for pair in zip(settings[::2], settings[1::2], strict=True) for w in pair
              if not pair[1].startswith(("saes.", "n_samples", "warmup", "eval_every", "act_freq", "train_data.dataset_name"))]
    back = cli("import", tmp_path / "theirs", "--out", tmp_path / "back", "--dataset", place / "tokens.jsonl", *wanted,
               "--set", "train_data.is_tokenized=true", "--set", "eval_data.is_tokenized=true")
    assert back.returncode == 0, back.stderr[-2000:]
    for path in (folder, tmp_path / "back"):
        assert cli("evaluate", path).returncode == 0
    there, here = (json.loads((path / "evaluation.json").read_text())["evaluation"] for path in (folder, tmp_path / "back"))
    assert here["kl"] == pytest.approx(there["kl"], rel=1e-4) and here["positions"] != {}
    assert read_json(tmp_path / "theirs" / "blocks.6.hook_resid_pre" / "cfg.json")["metadata"]["context_size"] == load_run(tmp_path / "back").config.train_data.n_ctx == 16
    tuned = cli("finetune", folder, "--n-samples", "64", "--lr", "1e-3")
    assert tuned.returncode == 0, tuned.stderr[-2000:]
    made = load_run(next(path for path in (tmp_path / "runs").iterdir() if path.name.endswith("_finetuned")))
    assert run_type(made.config.loss) == "mixed" and made.config.loss.sparsity.target_l0 == load_run(folder).summary["positions"]["blocks.6.hook_resid_pre"]["l0"]
    again = cli("import", tmp_path / "theirs", "--out", tmp_path / "back", "--dataset", "docstrings")
    assert again.returncode == 2 and "exists; give a new folder" in again.stderr and "Traceback" not in again.stderr
    assert cli("export", folder, "--format", "gguf").returncode == 2


def test_a_run_of_the_reference_library(place, tmp_path):
    "final_config.yaml and a .pt file become a run that evaluates on the processed network."
    values = yaml.safe_load(CONFIGS[1].read_text())
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "final_config.yaml").write_text(yaml.safe_dump(values))
    weights = {"encoder.0.weight": (32, 8), "encoder.0.bias": (32,), "decoder.weight": (8, 32), "decoder.bias": (8,)}
    g = torch.Generator().manual_seed(0)
    torch.save({f"blocks-6-hook_resid_pre.{name}": torch.randn(shape, generator=g) for name, shape in weights.items()}, theirs / "samples_400.pt")
    done = cli("import", theirs, "--out", tmp_path / "run", *local(place, wandb_project="null"))
    assert done.returncode == 0, done.stderr[-2000:]
    run = load_run(tmp_path / "run")
    assert run.config.processed_weights and run_type(run.config.loss) == "e2e+ds" and run.saes["blocks.6.hook_resid_pre"].d_sae == 32
    assert (tmp_path / "run" / "checkpoints" / "samples_400").is_dir()
    evaluated = cli("evaluate", tmp_path / "run")
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    tuned = cli("finetune", tmp_path / "run", "--n-samples", "64")
    assert tuned.returncode == 0, tuned.stderr[-2000:]
    made = load_run(tmp_path / "run_finetuned").config
    assert made.loss.sparsity.target_l0 == read_json(tmp_path / "run" / "evaluation.json")["evaluation"]["positions"]["blocks.6.hook_resid_pre"]["l0"]
    assert made.loss.sparsity.coeff == values["loss"]["sparsity"]["coeff"] and made.processed_weights
    refused = cli("import", tmp_path / "run" / "checkpoints", "--out", tmp_path / "no")
    assert refused.returncode == 2 and "this project's already" in refused.stderr


def test_several_positions_of_the_reference_library(place, tmp_path):
    "One .pt file with two positions becomes a run of two SAEs."
    values, theirs, places = yaml.safe_load(CONFIGS[1].read_text()), tmp_path / "theirs", ["blocks.2.hook_resid_pre", "blocks.6.hook_resid_pre"]
    values["saes"]["sae_positions"] = places
    theirs.mkdir()
    (theirs / "final_config.yaml").write_text(yaml.safe_dump(values))
    g, shapes = torch.Generator().manual_seed(0), {"encoder.0.weight": (32, 8), "encoder.0.bias": (32,), "decoder.weight": (8, 32), "decoder.bias": (8,)}
    state = {f"{name.replace('.', '-')}.{key}": torch.randn(shape, generator=g) for name in places for key, shape in shapes.items()}
    torch.save(state, theirs / "samples_400.pt")
    words = ["import", theirs, "--out", tmp_path / "run", *local(place, wandb_project="null")]
    assert inside(*words).exit_code == 0
    run = load_run(tmp_path / "run")
    assert list(run.saes) == places and all(torch.equal(run.saes[p].W_enc, state[f"{p.replace('.', '-')}.encoder.0.weight"].T) for p in places)
    assert inside("evaluate", tmp_path / "run").exit_code == 0
    assert list(read_json(tmp_path / "run" / "evaluation.json")["evaluation"]["positions"]) == places


def inside(*words):
    "A command in this process."
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def lens_folder(folder, kind, hook="blocks.6.hook_resid_pre", **metadata):
    "A folder of SAELens with an SAE of the tiny model's width, some of whose latents fire."
    sae = ARCHITECTURES[kind](8, 32, seed=1, **({"k": 4} if kind == "topk" else {})).eval()
    with torch.no_grad():
        sae.b_enc.fill_(0.01)
        if kind == "jumprelu":
            sae.log_threshold[:5] = -torch.inf  # thresholds of 0, as batchtopk SAEs can have
    cfg, weights = to_saelens(sae, hook, **metadata)
    folder.mkdir(parents=True)
    save_file(weights, folder / "sae_weights.safetensors")
    write_json(folder / "cfg.json", cfg)
    return folder


@pytest.mark.parametrize("kind, processed", [("relu", False), ("topk", False), ("jumprelu", False), ("gated", False), ("relu", True)])
def test_imported_saes_go_on(kind, processed, place, tmp_path, monkeypatch):
    "Every kind SAELens has, on the network its file names: imported, evaluated, fine-tuned with its L0 held, shown on a page, and out again."
    monkeypatch.setenv("COLUMNS", "300")
    network = {"model_name": "tiny", "prepend_bos": processed, "context_size": 12, "model_from_pretrained_kwargs": PROCESSED if processed else RAW}
    theirs, run = lens_folder(tmp_path / "theirs", kind, **network), tmp_path / "run"
    settings = {"tlens_model_path": place / "model", "train_data.is_tokenized": "true", "eval_n_samples": 8, "device": "cpu"}
    made = inside("import", theirs, "--out", run, "--dataset", place / "tokens.jsonl", *(w for k, v in settings.items() for w in ("--set", f"{k}={v}")))
    assert made.exit_code == 0, made.output
    config, penalised = load_run(run).config, kind != "topk"
    assert (config.processed_weights, config.train_data.add_bos, config.train_data.n_ctx) == (processed, processed, 12)
    if penalised:
        with pytest.raises(UserError, match=f"run e2e-sae evaluate {run} first"):
            inside("finetune", run, "--n-samples", "64")
    assert inside("evaluate", run).exit_code == 0
    l0 = read_json(run / "evaluation.json")["evaluation"]["positions"]["blocks.6.hook_resid_pre"]["l0"]
    assert inside("finetune", run, "--n-samples", "64", "--lr", "1e-3").exit_code == 0
    tuned = load_run(tmp_path / "run_finetuned")
    before, after = (r.saes["blocks.6.hook_resid_pre"] for r in (load_run(run), tuned))
    assert not torch.equal(before.W_enc, after.W_enc) and all(torch.isfinite(p).all() for p in after.parameters())
    sparsity = tuned.config.loss.sparsity
    assert (sparsity.target_l0, sparsity.coeff > 0) == ((l0, True) if penalised else (None, False)) and l0 > 0
    assert tuned.config.processed_weights == processed and tuned.config.train_data.add_bos == processed
    assert inside("features", run, "--out", tmp_path / "page.html", "--n-tokens", "500", "--no-ablate").exit_code == 0
    assert '"contexts"' in (tmp_path / "page.html").read_text()
    assert inside("export", tmp_path / "run_finetuned", "--out", tmp_path / "again").exit_code == 0
    said = read_json(tmp_path / "again" / "blocks.6.hook_resid_pre" / "cfg.json")["metadata"]
    assert {key: said[key] for key in network if key != "model_name"} == {key: value for key, value in network.items() if key != "model_name"}


def test_what_cannot_be_imported(place, tmp_path):
    "A mixture of treatments, SAEs of different networks, a path that is none, a lone file: one line each that says what is needed."
    mixed = lens_folder(tmp_path / "mixed", "relu", model_name="tiny", model_from_pretrained_kwargs={"center_writing_weights": True})
    for k, name in enumerate(("tiny", "other")):
        lens_folder(tmp_path / "two" / name, "relu", hook=f"blocks.{k}.hook_resid_pre", model_name=name)
    (tmp_path / "lone.pt").touch()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "samples_4.pt").touch()
    for path, says in ((mixed, "say with processed_weights"), (tmp_path / "two", "one at a time"), (tmp_path / "no", "no such folder"),
                       (tmp_path / "lone.pt", "final_config.yaml"), (tmp_path / "bare", "no final_config.yaml")):
        with pytest.raises(UserError, match=says) as caught:
            inside("import", path, "--out", tmp_path / "out", "--dataset", place / "tokens.jsonl")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    done = cli("import", tmp_path / "lone.pt", "--out", tmp_path / "out")
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.startswith("e2e-sae:"), done.stderr[-2000:]
    settings = ["--set", "processed_weights=true", "--set", f"tlens_model_path={place / 'model'}"]
    assert inside("import", mixed, "--out", tmp_path / "out", "--dataset", place / "tokens.jsonl", *settings).exit_code == 0
    assert load_run(tmp_path / "out").config.processed_weights
