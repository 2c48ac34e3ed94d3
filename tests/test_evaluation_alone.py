"""A run folder stands alone: every command after the training text, the source files or the source run are gone."""

import inspect
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from e2e_sae_nb import RunConfig, evaluate, load_run, load_subject, train
from e2e_sae_nb.architectures import ARCHITECTURES
from e2e_sae_nb.checkpoint import checkpoints, latest_checkpoint, load_saes, read_cfg, save_checkpoint
from e2e_sae_nb.cli import app
from e2e_sae_nb.core import UserError, data_path, read_json
from e2e_sae_nb.finetuning import finetune, penalty_like_error
from e2e_sae_nb.hub import pull
from e2e_sae_nb.losses import SparsityConfig
from e2e_sae_nb.model_card import write_folder
from e2e_sae_nb.models import subject_from_model, tiny_model
from e2e_sae_nb.state import begin, data_for, resume, save
from e2e_sae_nb.training import train_step

PLACES = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    "A folder with a tiny model that has the embedded tokenizer, and texts to train on and to evaluate on."
    folder, tokenizer = tmp_path_factory.mktemp("home"), AutoTokenizer.from_pretrained(data_path("docstrings-lm"))
    tiny_model("gpt2", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, modules in (("train", (os, json, inspect)), ("other", (np, torch))):
        docs = {inspect.getdoc(value) or "" for module in modules for value in vars(module).values()}
        rows = sorted(doc[:400] for doc in docs if len(doc) > 80)[:150]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": doc}) + "\n" for doc in rows))
    return folder


@pytest.fixture(scope="module")
def subject(home):
    return load_subject(home / "model", device="cpu")


@pytest.fixture
def place(home, tmp_path) -> Path:
    "A copy of the texts, which a test may delete."
    for file in home.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    return tmp_path


def config(home, place, own_eval=True, **changes) -> RunConfig:
    text = {"n_ctx": 16, "held_out_share": 0.3, "seed": 0}
    values = {
        "tlens_model_path": str(home / "model"),
        "lr": 3e-3,
        "batch_size": 4,
        "n_samples": 24,
        "eval_n_samples": 12,
        "device": "cpu",
        "save_every_n_samples": 8,
        "save_dir": str(place / "out"),
        "wandb_run_name": "run",
        "max_grad_norm": 1.0,
        "loss": {"sparsity": {"coeff": 0.3}, "out_to_in": {"coeff": 1.0}, "logits_kl": {"coeff": 1.0}},
        "saes": {"sae_positions": PLACES[:1], "dict_size_to_input_ratio": 2},
        "train_data": {"dataset_name": str(place / "train.jsonl"), **text},
    }
    if own_eval:
        values["eval_data"] = {"dataset_name": str(place / "other.jsonl"), **text}
    return RunConfig.from_dict(values | changes)


def command(*words) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, (words, done.exception)
    return done.stdout


def every_command(folder: Path, out: Path, text: bool = True) -> None:
    "All that a person may do with a run folder, on its own; `text`: its training text is there."
    before = (
        read_json(folder / "evaluation.json")["evaluation"]["kl"] if (folder / "evaluation.json").is_file() else None
    )
    assert "ce_increase" in command("evaluate", folder)
    now = read_json(folder / "evaluation.json")
    assert before is None or now["evaluation"]["kl"] == before
    assert now["evaluation"] == now["all_positions"] != now["without_first_position_and_special_tokens"]
    command("features", folder, "--out", out / "page.html", "--n-tokens", 200, "--latents", 4)
    assert PLACES[0] in (out / "page.html").read_text()
    assert "with SAEs:" in command("generate", folder, "Return the", "--n-tokens", 3)
    assert "questions" in command(
        "autointerp",
        folder,
        "--model",
        "none",
        "--estimate",
        "--n-tokens",
        1500,
        "--latents",
        3,
        "--out",
        out / "auto.json",
    )
    (exported,) = command("export", folder, "--out", out / "saelens").split()
    assert (Path(exported) / "sae_weights.safetensors").is_file()
    card = command("push", folder, "me/run", "--dry-run", out / "pushed").strip()
    assert command("pull", card, "--out", out / "pulled").strip() == str(out / "pulled")
    assert load_run(out / "pulled").saes[PLACES[0]].W_enc.equal(load_run(folder).saes[PLACES[0]].W_enc)
    if text:
        tuned = Path(command("finetune", folder, "--n-samples", 8).strip().splitlines()[-1])
        assert "kl" in load_run(tuned).summary


# Evaluation


def test_the_training_text_is_gone(home, place, subject):
    "With held-out text of its own, a run needs nothing else; without, the message says which file is read and why."
    own, shared = (
        train(config(home, place, own_eval=own, wandb_run_name=f"own_{own}"), subject=subject) for own in (True, False)
    )
    (place / "train.jsonl").unlink()
    every_command(own.path, place / "a", text=False)
    with pytest.raises(
        UserError,
        match="held-out tokens of this configuration are a share of train_data, so evaluation needs .*train.jsonl",
    ) as caught:
        evaluate(shared.path, subject=subject)
    assert (
        "\n" not in str(caught.value)
        and read_json(shared.path / "evaluation.json")["evaluation"]["kl"] == shared.summary["kl"]
    )


def test_evaluation_opens_no_training(home, place, subject, monkeypatch):
    "Neither training data nor pretrained files, optimizer or compiler; each way of counting is computed once."
    run = train(config(home, place), subject=subject)
    for name in (
        "state.begin",
        "state.initial_saes",
        "state.SAEAdam",
        "state.compile_blocks",
        "training.begin",
        "training.resume",
    ):
        monkeypatch.setattr(f"e2e_sae_nb.{name}", lambda *a, **k: pytest.fail("evaluation began a training"))
    opened, passes = [], []
    from e2e_sae_nb import state, training

    monkeypatch.setattr(
        state, "open_stream", lambda *a, real=state.open_stream, **k: opened.append(k["role"]) or real(*a, **k)
    )
    monkeypatch.setattr(
        training,
        "evaluate_many",
        lambda *a, real=training.evaluate_many, **k: passes.append(k["keep"]) or real(*a, **k),
    )
    assert evaluate(run.path, subject=subject).kl == run.summary["kl"]
    assert opened == ["eval"] and [keep is None for keep in passes] == [True, False]


def test_special_tokens_that_nobody_knows(home, place, subject):
    "Without a tokenizer only the first position is left out, and the name says so; tokens are counted by hand."
    run = train(config(home, place), subject=subject)
    evaluate(run, subject=subject)
    known, ends = read_json(run.path / "evaluation.json"), subject.tokenizer.all_special_ids
    rows = torch.cat(list(data_for(run.config, subject, "eval")))[:12]
    counted = known["without_first_position_and_special_tokens"]["tokens"]
    assert counted == int((~torch.isin(rows[:, 1:], torch.tensor(ends))).sum()) < 12 * 15
    (place / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()))
    ids = replace(run.config.train_data, dataset_name=str(place / "ids.jsonl"), is_tokenized=True)
    bare = replace(run, config=replace(run.config, train_data=ids, eval_data=None))
    silent = subject_from_model(subject.model, name="silent")
    tokens = evaluate(bare, subject=silent).tokens
    found = read_json(run.path / "evaluation.json")
    assert set(found) == {"evaluation", "all_positions", "without_first_position", "provenance"}
    assert tokens > 0 and found["without_first_position"]["tokens"] == tokens * 15 // 16


def test_another_network_is_named(home, place, subject):
    run = train(config(home, place), subject=subject)
    tiny_model("gpt2", n_embd=8, vocab_size=subject.vocab_size).save_pretrained(place / "narrow")
    AutoTokenizer.from_pretrained(home / "model").save_pretrained(place / "narrow")
    with pytest.raises(UserError, match="made for a width of 16, but .* has 8 at blocks.1.hook_resid_pre"):
        evaluate(run, subject=load_subject(place / "narrow", device="cpu"))
    with pytest.raises(UserError, match="no hook point 'blocks.9.hook_resid_pre'"):
        evaluate(replace(run, saes={"blocks.9.hook_resid_pre": run.saes[PLACES[0]]}), subject=subject)


# Runs that began from others


def test_a_fine_tuned_run_stands_alone(home, place, subject):
    "Its source run is deleted; it is moved, evaluated, looked at, shared, resumed and tuned again."
    source = train(config(home, place), subject=subject)
    tuned = finetune(source, 16, lr=1e-3, subject=subject)
    shutil.rmtree(source.path)
    moved = tuned.path.rename(place / "moved")
    every_command(moved, place / "a")
    last = checkpoints(moved)[16]
    expected = load_saes(last)[PLACES[0]]
    shutil.rmtree(last)
    again = train(resume_from=moved, subject=subject)
    assert again.path == moved and all(
        a.equal(b)
        for a, b in zip(expected.state_dict().values(), again.saes[PLACES[0]].state_dict().values(), strict=True)
    )


def test_a_pulled_run(home, place, subject):
    "Pushed and pulled, then the original is deleted; without its training state it cannot be resumed, and says so."
    source = train(config(home, place), subject=subject)
    tuned = finetune(source, 8, subject=subject)
    write_folder(tuned, "me/run", place / "shared")
    got = pull(place / "shared", place / "got")
    shutil.rmtree(source.path)
    shutil.rmtree(tuned.path)
    here = (
        ("tlens_model_path: model", f"tlens_model_path: {home / 'model'}"),
        *((f"dataset_name: {n}.jsonl", f"dataset_name: {place / n}.jsonl") for n in ("train", "other")),
    )
    text = (got.path / "config.yaml").read_text()
    for old, new in here:  # a shared configuration names files without their folders
        assert old in text
        text = text.replace(old, new)
    (got.path / "config.yaml").write_text(text)
    every_command(got.path, place / "a")
    with pytest.raises(UserError, match="training.safetensors"):
        resume(got.path, subject)


@pytest.mark.parametrize("kind", ["saelens", "e2e_sae"])
def test_an_imported_run(home, place, subject, kind):
    "The files it was imported from are deleted."
    source, data = (
        train(config(home, place), subject=subject),
        ["--set", f"tlens_model_path={home / 'model'}", "--set", "device=cpu"],
    )
    for key, value in {"n_ctx": 16, "held_out_share": 0.3}.items():
        data += ["--set", f"train_data.{key}={value}"]
    folder = place / "theirs"
    if kind == "saelens":
        command("export", source.path, "--out", folder)
        data += ["--set", "batch_size=4"]
    else:
        folder.mkdir()
        sae, at = source.saes[PLACES[0]], PLACES[0].replace(".", "-")
        torch.save(
            {
                f"{at}.{name}": value.detach().contiguous()
                for name, value in (
                    ("encoder.0.weight", sae.W_enc.T),
                    ("encoder.0.bias", sae.b_enc),
                    ("decoder.weight", sae.W_dec.T),
                    ("decoder.bias", sae.b_dec),
                )
            },
            folder / "samples_24.pt",
        )
        text = (source.path / "config.yaml").read_text()
        (folder / "final_config.yaml").write_text(text)
        data += ["--set", "eval_data.n_ctx=16"]
    command("import", folder, "--out", place / "imported", "--dataset", place / "train.jsonl", *data)
    shutil.rmtree(folder)
    shutil.rmtree(source.path)
    every_command((place / "imported").rename(place / "moved"), place / "a")


# Resuming


def test_resume_needs_no_pretrained_files(home, place, subject):
    "One position pretrained and frozen, one new: the continued run ends with the same bits after the files are gone."
    source = train(config(home, place), subject=subject)
    pair = {
        "sae_positions": PLACES,
        "dict_size_to_input_ratio": 2,
        "pretrained_sae_paths": str(latest_checkpoint(source.path)),
        "activation_norm": "unit",
    }
    whole = train(config(home, place, saes=pair, wandb_run_name="pair"), subject=subject)
    shutil.rmtree(source.path)
    shutil.rmtree(checkpoints(whole.path)[24])
    assert read_cfg(checkpoints(whole.path)[16])["frozen"] == PLACES[:1]
    again = train(resume_from=whole.path, subject=subject)
    for name in PLACES:
        assert all(
            a.equal(b)
            for a, b in zip(whole.saes[name].state_dict().values(), again.saes[name].state_dict().values(), strict=True)
        )
    assert again.summary["kl"] == whole.summary["kl"]


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_resume_draws_no_sample(architecture, home, place, subject, monkeypatch):
    "Nor does it initialise anything: weights, scale, thresholds, window and counts are the checkpoint's."
    saes = {
        "sae_positions": PLACES[:1],
        "dict_size_to_input_ratio": 2,
        "architecture": architecture,
        "activation_norm": "unit",
    }
    saes |= {"k": 4} if architecture in ("topk", "batchtopk", "matryoshka") else {}
    t = begin(config(home, place, saes=saes), subject)
    train_step(t)
    save(t)
    monkeypatch.setattr("e2e_sae_nb.state.initial_saes", lambda *a: pytest.fail("SAEs were made anew"))
    again = resume(t.folder, subject)
    (a,), (b,) = t.saes.values(), again.saes.values()
    assert a.options() == b.options() and b.training and b.input_scale != 1
    train_step(t)
    train_step(again)
    assert all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"dict_size_to_input_ratio": 3},
        {"architecture": "gated"},
        {"sae_positions": PLACES[1:]},
        {"architecture": "topk", "k": 4},
        {"input_positions": ["blocks.0.hook_resid_pre"]},
    ],
)
def test_a_configuration_that_was_changed(change, home, place, subject):
    run = train(config(home, place), subject=subject)
    other = config(
        home,
        place,
        saes={"sae_positions": PLACES[:1], "dict_size_to_input_ratio": 2} | change,
        save_dir=str(place / "other"),
    )
    changed = begin(other, subject).folder
    shutil.copytree(run.path / "checkpoints", changed / "checkpoints")
    with pytest.raises(UserError, match="holds other SAEs than .* put back the configuration the run was begun with"):
        resume(changed, subject)


def test_a_setting_that_was_changed(home, place, subject):
    "Not only sizes: the number of active latents, too."
    saes = {"sae_positions": PLACES[:1], "dict_size_to_input_ratio": 2, "architecture": "topk", "k": 4}
    run = train(config(home, place, saes=saes), subject=subject)
    path = run.path / "config.yaml"
    path.write_text(path.read_text().replace("k: 4", "k: 5"))
    with pytest.raises(UserError, match="holds other SAEs"):
        resume(run.path, subject)


def test_checkpoints_that_do_not_say_what_is_frozen(home, place, subject):
    "From earlier versions: the pretrained files say it while they are there; when they are gone, the message does."
    source = train(config(home, place), subject=subject)
    pair = {
        "sae_positions": PLACES,
        "dict_size_to_input_ratio": 2,
        "pretrained_sae_paths": str(latest_checkpoint(source.path)),
    }
    t = begin(config(home, place, saes=pair, wandb_run_name="pair"), subject)
    last = save(t)
    info = {
        key: value
        for key, value in read_cfg(last).items()
        if key not in ("frozen", "sha256", "positions", "format_version")
    }
    save_checkpoint(last, t.saes, info, tensors={}, state=read_json(last / "training.json"))
    again = resume(t.folder, subject)
    assert [sae.W_enc.requires_grad for sae in again.saes.values()] == [False, True]
    shutil.rmtree(source.path)
    with pytest.raises(UserError, match="did not note which SAEs are frozen, so pretrained_sae_paths is needed"):
        resume(t.folder, subject)


def test_the_penalty_of_a_fine_tune_counts_what_the_run_counts(home, place, subject):
    "Without its source, and with positions excluded: the coefficient is that of the positions which count."
    run = train(config(home, place, exclude_first_position=True), subject=subject)
    run.config = replace(
        run.config,
        saes=replace(run.config.saes, pretrained_sae_paths=("/nowhere/samples_1",)),
        loss=replace(run.config.loss, sparsity=SparsityConfig(0.0)),
    )
    from e2e_sae_nb.splicing import original_pass

    tokens = next(data_for(run.config, subject, "train"))
    x = original_pass(subject, tokens, PLACES[:1], stop=True).activations[PLACES[0]][:, 1:]
    with torch.no_grad():
        acts = run.saes[PLACES[0]](x)
    by_hand = (acts.output - x).square().mean() / (acts.c.sum(-1).mean() / x.shape[-1])
    assert penalty_like_error(run, subject) == pytest.approx(float(by_hand), rel=1e-4)
