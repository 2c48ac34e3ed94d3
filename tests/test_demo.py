"""The demo's length is planned from a measured speed, its table is shown on the way, and an interruption says what there is."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

from e2e_sae_nb import demonstration
from e2e_sae_nb.architectures import make_saes
from e2e_sae_nb.core import UserError, read_json
from e2e_sae_nb.demonstration import (
    DEMO,
    LOOKS,
    MIN_STEPS,
    QUICK,
    DemoPlan,
    Looks,
    Speed,
    demo,
    estimate_line,
    measure_speed,
    plan_run,
    settle_plan,
)
from e2e_sae_nb.evaluation import evaluate_many
from e2e_sae_nb.members import FrontierConfig
from e2e_sae_nb.models import tiny_subject
from e2e_sae_nb.sae import SAEConfig
from e2e_sae_nb.splicing import splice

TEMPLATE = FrontierConfig.from_dict(DEMO)


def tiny(folder: Path) -> dict:
    "The demo's configuration on a tiny network's tokens."
    rng, file = random.Random(0), folder / "tokens.jsonl"
    file.write_text("\n".join(json.dumps({"input_ids": rng.choices(range(37), k=8)}) for _ in range(600)))
    return DEMO | {"train_data": {"dataset_name": str(file), "is_tokenized": True, "n_ctx": 8, "held_out_share": 0.1, "seed": 0},
                   "saes": {"sae_positions": "blocks.1.hook_resid_pre", "dict_size_to_input_ratio": 2}, "compute_dtype": "float32",
                   "frontier": {"local": {"lr": 1e-2, "sparsity": [2.0]}, "e2e": {"lr": 1e-2, "sparsity": [0.5]}}, "eval_n_samples": 12}


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A demo of forty samples on a tiny network, as a machine of known speed would plan it."
    monkeypatch.setattr(demonstration, "DEMO", tiny(tmp_path))
    monkeypatch.setattr(demonstration, "measure_speed", lambda *_: Speed(1.0, 1.0, 0.0))
    monkeypatch.setattr(demonstration, "plan_run", lambda _, config, minutes, spent: DemoPlan(minutes, 40, 20, 12, 60.0, True))
    return tmp_path / "out", tiny_subject("gpt2")


# planning


@pytest.mark.parametrize("speed", [Speed(0.2, 0.1, 0.01), Speed(4.0, 1.9, 0.3), Speed(1.0, 1.0, 0.0)])
@pytest.mark.parametrize("minutes", [3, 6, 60])
def test_the_longest_run_that_fits(speed, minutes):
    plan = plan_run(speed, TEMPLATE, minutes, spent=10)
    left, steps = 60 * minutes - 10, plan.n_samples // 4

    def seconds(steps):  # the definition: dense steps, then sparse ones, three looks, the evaluation
        dense = min(steps, 2 * math.sqrt(steps / 2))
        return dense * speed.dense + (steps - dense) * speed.sparse + (3 * QUICK + plan.eval_n_samples) * speed.evaluation

    assert plan.seconds == pytest.approx(seconds(steps))
    assert plan.eval_n_samples == min(400, int(0.4 * left / speed.evaluation)) if speed.evaluation else plan.eval_n_samples == 400
    if plan.fits:
        assert seconds(steps) <= left < seconds(steps + 1)
    else:
        assert steps == MIN_STEPS and seconds(steps) > left
    assert plan.warmup_samples == plan.n_samples // 8 * 4  # half of it, in whole steps


def test_too_short_a_time_is_said_and_the_shortest_run_done():
    plan = plan_run(Speed(40.0, 20.0, 2.0), TEMPLATE, 1)
    assert (plan.n_samples, plan.fits) == (4 * MIN_STEPS, False) and plan.eval_n_samples >= QUICK
    line = estimate_line(plan, 256, datetime(2026, 1, 1, 14, 0))
    assert "too short" in line and "\n" not in line and f"{4 * MIN_STEPS * 256:,} tokens per SAE" in line and "rougher" in line


def test_time_that_is_used_up_already():
    assert not plan_run(Speed(1.0, 1.0, 0.1), TEMPLATE, 1, spent=100).fits


def test_the_estimate_says_when():
    plan = DemoPlan(6, 1000, 500, 400, 330.0, True)
    line = estimate_line(plan, 256, datetime(2026, 1, 1, 23, 58))
    assert line == "about 776 tokens/s here, evaluation included: 256,000 tokens per SAE, 102,400 held-out tokens; ready at 00:03"


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf])
def test_minutes_must_be_positive(minutes, tmp_path):
    with pytest.raises(UserError, match="positive number"):
        demo(tmp_path / "out", minutes=minutes)
    assert not (tmp_path / "out").exists()


def test_minutes_beside_a_configuration(tmp_path):
    with pytest.raises(UserError, match="either minutes or a config"):
        demo(tmp_path / "out", minutes=1, config=TEMPLATE)


def test_what_is_measured(tmp_path):
    "By a clock of our own: the dense step is the second one, the sparse step the faster of two, evaluation by the sequence."
    times = iter([0, 50, 50, 53, 60, 62, 70, 71, 80, 88, 90, 96])
    config = FrontierConfig.from_dict(tiny(tmp_path))
    speed = measure_speed(config, tiny_subject("gpt2"), clock=lambda: float(next(times)))
    assert speed == Speed(dense=3.0, sparse=1.0, evaluation=6.0 / 4)
    assert not list(tmp_path.glob("out*"))  # thrown away


def test_a_given_length_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(demonstration, "measure_speed", lambda *_: pytest.fail("measured"))
    runs = demo(tmp_path / "out", config=FrontierConfig.from_dict(tiny(tmp_path) | {"n_samples": 8, "warmup_samples": 0}), subject=tiny_subject("gpt2"))
    assert {run.summary["samples"] for run in runs} == {8} and not (tmp_path / "out" / "plan.json").exists()


def test_the_first_plan_is_kept(tmp_path, capsys, monkeypatch):
    config, subject = FrontierConfig.from_dict(tiny(tmp_path)), tiny_subject("gpt2")
    monkeypatch.setattr(demonstration, "measure_speed", lambda *_: Speed(0.3, 0.2, 0.01))
    first = settle_plan(config, subject, tmp_path, minutes=6)
    monkeypatch.setattr(demonstration, "measure_speed", lambda *_: pytest.fail("measured again"))
    assert settle_plan(config, subject, tmp_path, minutes=1, resume=True) == first
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "ready at" in said[0] and "as planned at first" in said[1]
    assert read_json(tmp_path / "plan.json")["measured"] == {"dense": 0.3, "sparse": 0.2, "evaluation": 0.01}


# on the way


def test_tables_on_the_way(small, capsys, monkeypatch):
    out, subject = small
    monkeypatch.setenv("E2E_SAE_PROGRESS", "1")
    runs = demo(out, minutes=1, subject=subject)
    said = capsys.readouterr().err
    shown = re.findall(r"provisional, after (\d+) tokens per SAE \((\d+)% of the run\), on (\d+) held-out tokens:\n(.*\n.*\n.*)", said)
    assert [(int(tokens), int(share)) for tokens, share, _, _ in shown] == [(96, 30), (160, 50), (256, 80)]  # the first steps at or after
    for *_, held_out, table in shown:
        assert int(held_out) == 12 * 8 and [line.split()[0] for line in table.splitlines()] == ["type", "local", "e2e"]
    assert said.index("ready at") < said.index("provisional") < said.index("training is done and saved; evaluating")
    assert {run.summary["tokens"] for run in runs} == {320}
    assert {p.name for p in out.iterdir()} == {"frontier.csv", "frontier.png", "plan.json", "report.html", "runs", "summary.json"}
    summary = read_json(out / "summary.json")
    assert any("96 held-out tokens" in s for s in demonstration.ratio_sentences(summary | {"ce_increase_ratio_to_local": {"e2e": None}}))


def test_looks_change_nothing(small, monkeypatch):
    out, subject = small
    looked = demo(out, minutes=1, subject=subject)
    monkeypatch.setattr(demonstration, "LOOKS", ())
    blind = demo(out.with_name("blind"), minutes=1, subject=subject)
    assert [run.summary["kl"] for run in looked] == [run.summary["kl"] for run in blind]


# interruptions


def test_interrupted_and_resumed(small, capsys, monkeypatch):
    out, subject = small
    whole = demo(out.with_name("whole"), minutes=1, subject=subject)
    look = demonstration.quick_rows

    def interrupt(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return look(*args)

    monkeypatch.setattr(demonstration, "quick_rows", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo(out, minutes=1, subject=subject)
    said = capsys.readouterr().err
    assert "What is known so far, provisional, after 96 tokens per SAE" in said and f"e2e-sae demo --out {out} --resume" in said
    assert {p.name for p in out.iterdir()} == {"plan.json", "runs"}  # no half report
    monkeypatch.setattr(demonstration, "quick_rows", look)
    monkeypatch.setattr(demonstration, "measure_speed", lambda *_: pytest.fail("measured again"))
    resumed = demo(out, subject=subject, resume=True)
    assert [run.summary["kl"] for run in resumed] == [run.summary["kl"] for run in whole]
    assert (out / "summary.json").is_file()


def test_interrupting_the_last_evaluation_loses_no_training(small, capsys, monkeypatch):
    from e2e_sae_nb import frontiers

    out, subject = small

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(frontiers, "evaluate_trainings", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo(out, minutes=1, subject=subject)
    assert "after 256 tokens per SAE" in capsys.readouterr().err
    monkeypatch.setattr(frontiers, "frontier_step", lambda *_: pytest.fail("trained again"))
    assert {run.summary["samples"] for run in demo(out, subject=subject, resume=True)} == {40}


def test_before_there_is_a_table(tmp_path):
    assert "no table yet" in Looks(tmp_path, 100).interrupted("again") and LOOKS[0] == 0.25


LONG = """
import sys
from e2e_sae_nb import cli, demonstration as d
from e2e_sae_nb.models import tiny_subject
import json
d.DEMO = json.load(open(sys.argv[1]))
d.subject_for = lambda _: tiny_subject("gpt2")
d.measure_speed = lambda *_: d.Speed(1.0, 1.0, 0.0)
d.plan_run = lambda _, config, minutes, spent: d.DemoPlan(minutes, 400000, 200000, 12, 60.0, True)
d.LOOKS = (0.0001, 0.9)
sys.argv = ["e2e-sae", "demo", "--minutes", "3", "--out", sys.argv[2]]
cli.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals between processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_prints_what_there_is(number, tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps(tiny(tmp_path)))
    process = subprocess.Popen([sys.executable, "-c", LONG, str(tmp_path / "demo.json"), str(tmp_path / "out")], stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"E2E_SAE_PROGRESS": "1"})
    said, shown = [], process.stderr
    assert shown is not None
    for line in shown:
        said.append(line)
        if "provisional" in line:
            process.send_signal(number)
            break
    rest = shown.read()
    process.wait()
    said = "".join(said) + rest
    assert "Traceback" not in said, said
    assert "What is known so far, provisional" in rest and "--resume" in rest, said
    assert process.returncode == 128 + number
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"plan.json", "runs"}
    assert all(list(run.glob("checkpoints/samples_*")) for run in (tmp_path / "out" / "runs").iterdir() if run.is_dir())


# the evaluation that all of this waits for, against its slow definition


def test_evaluation_equals_the_slow_definition():
    "Full logits under hooks, in float64, one SAE at a time: every number, for residual-stream and other places, with and without a mask."
    subject = tiny_subject("gpt2", dtype="float64")
    tokens = [torch.randint(37, (n, 12), generator=torch.Generator().manual_seed(n)) for n in (3, 2, 1)]
    for place, masked in (("blocks.1.hook_resid_pre", False), ("blocks.1.hook_resid_pre", True), ("blocks.0.hook_mlp_out", False)):
        keep = (lambda t: (torch.arange(t.shape[1]) > 0).expand(t.shape)) if masked else None
        members = [make_saes({place: 16}, SAEConfig((place,), 4.0), seed=seed, dtype=torch.float64) for seed in range(3)]
        for saes, found in zip(members, evaluate_many(subject, members, tokens, keep=keep), strict=True):
            slow = slowly(subject, saes, place, tokens, keep)
            for key, value in slow.items():
                got = found.positions[place] if key in ("l0", "explained_variance", "mse") else found
                assert getattr(got, key) == pytest.approx(value, rel=1e-9), (place, masked, key)


@torch.no_grad()
def slowly(subject, saes, place, batches, keep):
    "The metrics of one SAE from full logits of three separate passes over each batch."
    from e2e_sae_nb.splicing import edit

    gathered: dict[str, list] = {key: [] for key in ("ce_orig", "ce_new", "ce_zero", "kl", "statistical_distance", "top1_consistency", "l0", "x", "x_hat")}
    for t in batches:
        mask = torch.ones_like(t, dtype=torch.bool) if keep is None else keep(t)
        p = subject(t).log_softmax(-1)
        with splice(subject, saes, keep=mask) as seen:
            q = subject(t).log_softmax(-1)
        with edit(subject, [(place, lambda x, mask=mask: torch.where(mask.unsqueeze(-1), 0.0, x))]):
            zero = subject(t).log_softmax(-1)
        ce = lambda log: -log[:, :-1].gather(-1, t[:, 1:, None])[..., 0]
        values = {"ce_orig": ce(p), "ce_new": ce(q), "ce_zero": ce(zero), "kl": (p.exp() * (p - q)).sum(-1)[:, :-1],
                  "statistical_distance": 0.5 * (p.exp() - q.exp()).abs().sum(-1)[:, :-1],
                  "top1_consistency": (p.argmax(-1) == q.argmax(-1)).double()[:, :-1]}
        for key, value in values.items():
            gathered[key].append(value[mask[:, :-1]])
        acts = seen[place]
        gathered["l0"].append((acts.c > 0).sum(-1).double()[mask])
        gathered["x"].append(acts.replaced[mask])
        gathered["x_hat"].append(acts.output[mask])
    found = {key: torch.cat(values) for key, values in gathered.items()}
    x, error = found.pop("x"), (found["x_hat"] - torch.cat(gathered["x"])).square()
    del found["x_hat"]
    return {key: value.mean().item() for key, value in found.items()} | {
        "mse": error.mean().item(), "explained_variance": (1 - error.sum() / (x - x.mean(0)).square().sum()).item()}
