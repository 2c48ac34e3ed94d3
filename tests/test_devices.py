"""Two processes under torchrun against one, in float64: training, evaluation, frontiers, dictionaries in parts, and a process that is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

PLACE, LATER = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
LOCAL = {"sparsity": {"coeff": 0.5}, "out_to_in": {"coeff": 1.0}}
E2E = {"sparsity": {"coeff": 0.5}, "logits_kl": {"coeff": 1.0}}
DS = E2E | {"in_to_orig": {"hook_positions": [LATER], "total_coeff": 2.5}}
JOINT = {"sae_positions": [PLACE, "blocks.2.hook_mlp_out"], "dict_size_to_input_ratio": 4}
MASKED = {"exclude_first_position": True, "exclude_special_tokens": True}
# what is compared, each a change of BASE; all in one pair of processes, since starting them is what takes time
CASES = {
    "local": {"loss": LOCAL},
    "joint e2e+ds, masked, uneven shares": {"loss": DS, "saes": JOINT, "batch_size": 3, "effective_batch_size": 6, **MASKED},
    "few active latents": {"loss": DS | {"sparsity": {"coeff": 40.0}}, "lr": 5e-2},
    "the definition": {"loss": E2E, "sparse_step": False},
    "balanced, a target, annealed": {"loss": {"sparsity": {"coeff": 0.5, "p_end": 0.6, "target_l0": 4.0}, "out_to_in": {"coeff": 0.5},
                                              "logits_kl": {"coeff": 0.5, "balance": True}}, **MASKED},
    "topk": {"loss": E2E, "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 8, "architecture": "topk", "k": 4, "dead_after": 64}},
    "batchtopk": {"loss": E2E, "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 8, "architecture": "batchtopk", "k": 4, "dead_after": 64}},
    "batchtopk, sparse": {"loss": LOCAL, "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 16, "architecture": "batchtopk", "k": 4}},
    "matryoshka": {"loss": LOCAL, "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 8, "architecture": "matryoshka", "k": 4}},
    "jumprelu": {"loss": E2E | {"sparsity": {"coeff": 0.5, "target_l0": 6.0}}, "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 8, "architecture": "jumprelu"}, **MASKED},
    "gated": {"loss": DS, "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 8, "architecture": "gated"}},
    "batchtopk, masked": {"loss": LOCAL, "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 16, "architecture": "batchtopk", "k": 4, "dead_after": 64}, "batch_size": 3,
                          "effective_batch_size": 6, **MASKED},
    "one pass over the data": {"loss": LOCAL, "n_samples": None, "lr_schedule": "linear", "train_data": {"dataset_name": "tokens.jsonl", "is_tokenized": True, "n_ctx": 16}},
    "resampled": {"loss": E2E, "lr": 3e-2, "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 4, "dead_after": 100, "resample_every_n_samples": 16}, **MASKED},
    "transcoder": {"loss": DS, "saes": {"sae_positions": "blocks.1.hook_mlp_out", "input_positions": "blocks.1.hook_resid_pre", "dict_size_to_input_ratio": 4}},
    "parts, transcoder": {"loss": DS, "saes": {"sae_positions": "blocks.1.hook_mlp_out", "input_positions": "blocks.1.hook_resid_pre", "dict_size_to_input_ratio": 4,
                                               "sharded": True, "dead_after": 100}},
    "parts": {"loss": DS, "saes": JOINT | {"sharded": True}, **MASKED},
    "parts, few active latents": {"loss": E2E | {"sparsity": {"coeff": 40.0, "p_norm": 0.9}}, "lr": 5e-2,
                                  "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 4.1, "sharded": True}},
    "parts, the definition": {"loss": E2E | {"sparsity": {"coeff": 0.5, "p_norm": 0.9}}, "saes": JOINT | {"sharded": True}, "sparse_step": False},
    "parts, jumprelu": {"loss": E2E, "saes": JOINT | {"sharded": True, "architecture": "jumprelu"}},
    "parts, gated": {"loss": LOCAL, "saes": JOINT | {"sharded": True, "architecture": "gated"}},
}
QUICK = ("joint e2e+ds, masked, uneven shares", "few active latents", "balanced, a target, annealed", "batchtopk", "resampled", "parts, transcoder", "parts, few active latents")


def base(folder: Path, **changes) -> dict:
    data = {"dataset_name": "docstrings", "n_ctx": 12, "seed": 0} | changes.pop("train_data", {})
    if data["dataset_name"] != "docstrings":
        data["dataset_name"] = str(folder / data["dataset_name"])
    return {"tlens_model_path": str(folder / "model"), "train_data": data, "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 4}, "lr": 1e-2,
            "dtype": "float64", "batch_size": 4, "effective_batch_size": 8, "n_samples": 48, "eval_n_samples": 13, "warmup_samples": 8,
            "max_grad_norm": 0.5, "log_every_n_grad_steps": 2, "collect_act_frequency_every_n_samples": 16, "act_frequency_n_tokens": 64,
            "save_every_n_samples": 16} | changes


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    "A folder with a tiny model that has the embedded one's tokens, and with token rows."
    import random

    from e2e_sae_nb.models import tiny_model

    folder, rng, embedded = tmp_path_factory.mktemp("devices"), random.Random(0), ROOT / "data" / "docstrings-lm"
    vocabulary = json.loads((embedded / "config.json").read_text())["vocab_size"]
    tiny_model("gpt2", dtype="float64", vocab_size=vocabulary).save_pretrained(folder / "model")
    for file in embedded.glob("*token*.json"):
        shutil.copy(file, folder / "model")
    rows = (json.dumps({"input_ids": rng.choices(range(37), k=8)}) for _ in range(150))
    (folder / "tokens.jsonl").write_text("\n".join(rows))
    return folder


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "E2E_SAE_PROGRESS": "0", "CUDA_VISIBLE_DEVICES": ""} | more


def torchrun(*arguments: str, processes: int = 2) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *arguments]


def together(*arguments: str, processes: int = 2, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(torchrun(*arguments, processes=processes), env=environment(**more), capture_output=True, text=True, timeout=400)


def train_cases(path: str, out: str) -> None:
    "What both sides run: every case, then an evaluation of its folder; kept as runs in OUT."
    from e2e_sae_nb import RunConfig, evaluate, load_subject, train

    cases = json.loads(Path(path).read_text())
    subject = load_subject(next(iter(cases.values()))["tlens_model_path"], dtype="float64", device="cpu")
    for name, values in cases.items():
        run = train(RunConfig.from_dict(values | {"save_dir": out}), subject=subject, name=name)
        evaluate(run, subject=subject)


def values_of(folder: Path) -> tuple[dict, dict, list]:  # tensors of the last checkpoint; evaluation, dead and resampled latents; log
    from safetensors.torch import load_file

    from e2e_sae_nb.checkpoint import checkpoints

    last = list(checkpoints(folder).values())[-1]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    results = json.loads((folder / "evaluation.json").read_text()) | {key: summary[key] for key in ("dead", "resampled")}
    return load_file(last / "saes.safetensors") | load_file(last / "training.safetensors"), results, lines


def flat(value, name: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() if key != "provenance" for k, v in flat(inner, f"{name}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{name}/{i}").items()}
    return {} if value is None else {name: float(value)}


def compare(one: Path, two: Path) -> None:
    "Weights, moments and counts; evaluations, counted every way; the log."
    (tensors, results, lines), (tensors_2, results_2, lines_2) = values_of(one), values_of(two)
    assert set(tensors) == set(tensors_2)
    for name, value in tensors.items():
        assert value.shape == tensors_2[name].shape and (value.double() - tensors_2[name].double()).abs().max() < 1e-9, name
    for a, b in ((results, results_2), (lines, lines_2)):
        a, b = flat(a), flat(b)
        assert set(a) == set(b)
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


def run_cases(place: Path, cases: dict, processes: int = 2) -> None:
    label = f"{len(cases)}_{processes}"
    file = place / f"cases_{label}.json"
    file.write_text(json.dumps({name: base(place, **values) for name, values in cases.items()}))
    train_cases(str(file), str(place / f"one_{label}"))
    done = together(__file__, str(file), str(place / f"several_{label}"), processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in cases:
        compare(place / f"one_{label}" / name, place / f"several_{label}" / name)
        assert len(list((place / f"several_{label}").glob(f"{name}-*"))) == 0  # one folder, not one per process
    if "few active latents" in cases:  # the sparse path was taken
        l0 = values_of(place / f"one_{label}" / "few active latents")[2][-1][f"eval/l0/{PLACE}"]
        assert 0 < l0 < 0.05 * 64 * 2
    if "resampled" in cases:
        assert values_of(place / f"one_{label}" / "resampled")[1]["resampled"][PLACE] > 0


def test_two_processes_equal_one(place):
    run_cases(place, {name: CASES[name] for name in QUICK})


@pytest.mark.full
@pytest.mark.parametrize("processes", [2, 3])
def test_every_case(place, processes):
    cases = dict(CASES)
    if processes == 3:
        cases.pop("one pass over the data")  # its last batch has fewer sequences than three and is left out, with a line
    run_cases(place, cases, processes)


def config_file(place: Path, name: str, **changes) -> Path:
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(base(place, **changes)))
    return path


def test_frontier_and_one_line_for_a_mistake(place):
    "Members are dealt out; reports and records name all. Resumed by one process, nothing is left to do."
    from e2e_sae_nb import FrontierConfig, frontier, load_run
    from e2e_sae_nb.passes import RECORD

    spec = {"local": {"lr": 1e-2, "sparsity": [0.1, 1.0]}, "e2e": {"lr": 5e-3, "sparsity": [0.5]}}
    two = config_file(place, "frontier", frontier=spec, save_dir=str(place / "spread"))
    done = together("-m", "e2e_sae_nb", "frontier", str(two))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sparsity_coeff") == 1
    alone = frontier(FrontierConfig.from_dict(base(place, frontier=spec, save_dir=str(place / "alone"))))
    record = json.loads((place / "spread" / "runs" / RECORD).read_text())
    assert record["members"] == [run.path.name for run in alone]
    for run in alone:
        compare_runs(run.path, place / "spread" / "runs" / run.path.name)
    rows = json.loads((place / "spread" / "summary.json").read_text())["runs"]
    assert [row["kl"] for row in rows] == pytest.approx([run.summary["kl"] for run in alone], rel=1e-9)
    resumed = frontier(FrontierConfig.from_dict(base(place, frontier=spec, save_dir=str(place / "spread" / "runs"))), resume=True)
    assert torch.equal(resumed[2].saes[PLACE].W_dec, load_run(resumed[2].path).saes[PLACE].W_dec)


def compare_runs(one: Path, two: Path) -> None:
    (tensors, _, _), (tensors_2, _, _) = values_of(one), values_of(two)
    assert set(tensors) == set(tensors_2)
    for name, value in tensors.items():
        assert (value.double() - tensors_2[name].double()).abs().max() < 1e-9, name


@pytest.mark.full
def test_mistakes(place):
    small = config_file(place, "small", loss=LOCAL, batch_size=1, save_dir=str(place / "small"))
    done = together("-m", "e2e_sae_nb", "train", str(small))
    assert done.returncode and "smaller than the number of processes (2)" in done.stderr and not (place / "small").exists()
    few = config_file(place, "few", frontier={"local": {"lr": 1e-2, "sparsity": [1.0]}}, save_dir=str(place / "few"))
    done = together("-m", "e2e_sae_nb", "frontier", str(few))
    assert done.returncode and "cannot be divided among 2 processes" in done.stderr


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    "Rank -> process, of a launcher's children."
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            variables = dict(v.split("=", 1) for v in (path.parent / "environ").read_text().split("\0") if "=" in v) if parent == launcher.pid else {}
        except OSError:
            continue
        if "RANK" in variables:
            found[int(variables["RANK"])] = int(path.parent.name)
    return found


def interrupt(place: Path, name: str, rank: int | None, how: signal.Signals, patience: str = "600") -> tuple[str, float, Path]:
    "Start two processes, disturb one (None: torchrun itself) after the first checkpoint; what was said, how long the end took, the run's folder."
    out = place / name
    config = config_file(place, name, loss=E2E, n_samples=200_000, save_every_n_samples=64, save_dir=str(out), log_every_n_grad_steps=50,
                         lr_schedule="linear")
    with open(place / f"{name}.err", "w") as errors:
        launcher = subprocess.Popen(torchrun("-m", "e2e_sae_nb", "train", str(config)), env=environment(E2E_SAE_PATIENCE=patience),
                                    stdout=subprocess.DEVNULL, stderr=errors)
    try:
        until = time.monotonic() + 120
        while not list(out.glob("*/checkpoints/samples_*")) and launcher.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        hit = workers(launcher)[rank] if rank is not None else launcher.pid
        os.kill(hit, how)
        start = time.monotonic()
        launcher.wait(timeout=120)
        seconds = time.monotonic() - start
    finally:
        if launcher.poll() is None:
            launcher.kill()
    assert launcher.returncode != 0
    return (place / f"{name}.err").read_text(), seconds, next(out.iterdir())


def goes_on(place: Path, name: str, run: Path, processes: int) -> None:
    "From the last checkpoint, with another number of processes, to the state of a run by one process that was never disturbed."
    from e2e_sae_nb import RunConfig, train
    from e2e_sae_nb.checkpoint import checkpoints

    last, file = max(checkpoints(run)), run / "config.yaml"
    values = yaml.safe_load(file.read_text()) | {"n_samples": last + 32}
    file.write_text(yaml.safe_dump(values))  # not all 200,000; the learning rate does not depend on the end
    whole = train(RunConfig.from_dict(values | {"save_dir": str(place / "undisturbed")}), name=name)
    if processes == 1:
        train(resume_from=run)
    else:
        done = together("-m", "e2e_sae_nb", "train", "--resume", str(run), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    assert max(checkpoints(run)) == last + 32
    compare_runs(whole.path, run)


def test_a_killed_process_ends_the_others_with_a_message(place):
    said, seconds, run = interrupt(place, "killed", 1, signal.SIGKILL)
    assert seconds < 40
    assert "e2e-sae: another process of this run" in said or "e2e-sae: this process was told to stop" in said, said[-2000:]
    assert f"--resume {run}" in said and "Traceback (most recent call last)" not in said.partition("torch/distributed")[0]
    assert not list((run / "checkpoints").glob("samples_*/.*.tmp"))
    goes_on(place, "killed", run, 1)


@pytest.mark.full
def test_two_processes_stop_at_the_same_step(place):
    "torchrun is told to stop, as by a cluster: both processes finish the step, one saves, and one goes on."
    said, seconds, run = interrupt(place, "stopped", None, signal.SIGTERM)
    assert seconds < 40 and said.count(f"continue with: e2e-sae train --resume {run}") == 1 and "another process of this run" not in said, said[-2000:]
    goes_on(place, "stopped", run, 1)


@pytest.mark.full
def test_the_main_process_is_killed(place):
    said, seconds, run = interrupt(place, "main", 0, signal.SIGKILL)
    assert seconds < 40 and "e2e-sae (process 1): " in said and f"--resume {run}" in said
    goes_on(place, "main", run, 3)


@pytest.mark.full
def test_a_process_that_falls_silent_is_given_up(place):
    said, seconds, run = interrupt(place, "silent", 1, signal.SIGSTOP, patience="5")
    assert seconds < 60 and "no longer answers" in said and f"--resume {run}" in said


if __name__ == "__main__":
    train_cases(*sys.argv[1:])
