"""What a run leaves to measurement: chosen both ways by injected rates, written down, shared, kept, compared, and given up early."""

import json
import os
import platform
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

from e2e_sae_nb import compiling, machine, runs, sparse_step, threads
from e2e_sae_nb.core import UserError, read_json
from e2e_sae_nb.frontiers import frontier
from e2e_sae_nb.machine import Rates, choose_precision, measure_rates, products_of
from e2e_sae_nb.members import FrontierConfig
from e2e_sae_nb.models import tiny_subject
from e2e_sae_nb.passes import take_up
from e2e_sae_nb.runs import RunConfig, as_settled, run_config, settle
from e2e_sae_nb.state import begin, resume, save
from e2e_sae_nb.sweeps import _finished, _same, run_sweep
from e2e_sae_nb.training import train

PLACE = "blocks.1.hook_resid_pre"
CPU = torch.device("cpu")
LARGE = products_of(1024, 192, 4096)


@pytest.fixture(scope="module")
def subject():
    return tiny_subject("gpt2")


@pytest.fixture
def values(tmp_path):
    rng, path = random.Random(0), tmp_path / "tokens.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [rng.randrange(37) for _ in range(8)]}) for _ in range(400)))
    return {"tlens_model_name": "docstrings", "loss": {"sparsity": {"coeff": 0.5}, "logits_kl": {"coeff": 1.0}}, "lr": 1e-2, "batch_size": 4, "n_samples": 24,
            "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 4}, "eval_n_samples": 4, "save_every_n_samples": 8, "save_dir": str(tmp_path / "out"),
            "train_data": {"dataset_name": str(path), "is_tokenized": True, "n_ctx": 8, "seed": 0, "streaming": False}, "collect_act_frequency_every_n_samples": 0}


@pytest.fixture
def rates(monkeypatch):
    "Let every shape be measured, by a stand-in: `rates(gain)` says how much faster bfloat16 is; the list counts the measurements."
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    monkeypatch.setattr(machine, "SMALL", 0)
    asked = []

    def inject(gain):
        def measured(products, device, threads):
            asked.append((products, device, threads))
            return Rates(1e10, gain * 1e10)
        monkeypatch.setattr(machine, "measured_rates", measured)
        return asked
    return inject


# the choice

@pytest.mark.parametrize("gain, value", [(0.0125, "float32"), (1.0, "float32"), (1.24, "float32"), (1.26, "bfloat16"), (8.0, "bfloat16")])
def test_sixteen_bit_only_where_it_is_clearly_faster(gain, value, rates):
    rates(gain)
    choice = choose_precision("auto", LARGE, CPU)
    assert choice.value == value and choice.facts()["multiply_adds_per_second"] == {"float32": 1e10, "bfloat16": gain * 1e10}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_weights_are_computed_as_they_are(dtype, rates):
    asked, kind = rates(8.0), getattr(torch, dtype)
    assert choose_precision("auto", LARGE, CPU, kind).value == "float32" and not asked
    with machine.autocast("bfloat16", CPU, kind):
        assert not torch.is_autocast_enabled("cpu")


def test_slow_products_are_given_up_on_the_first_rung():
    "Eighty times slower in 16 bit: of a gigabyte-sized unembedding and all else, nothing larger than 128 x 128 x 128 is ever tried."
    asked = []

    def slow(product, low, device):
        asked.append((product, low))
        return 2 * product[0] * product[1] * product[2] / (5e8 if low else 4e10)
    found = measure_rates(products_of(8192, 4096, 256_000), CPU, slow)
    assert found.gain == pytest.approx(1 / 80) and {product for product, _ in asked} == {(128, 128, 128)} and len(asked) == 2 + 8
    assert sum(slow(product, low, CPU) for product, low in list(asked)) < 0.1  # seconds, all in all


def test_a_budget_ends_a_measurement_that_takes_long(monkeypatch):
    clock = iter(range(1, 10**6))
    monkeypatch.setattr(machine, "Stopwatch", lambda: type("Fake", (), {"__float__": lambda self: float(next(clock))})())
    asked = []
    found = measure_rates(LARGE, CPU, lambda *a: asked.append(a) or 1.0, budget=0.5)
    assert found.gain == 1.0 and len(asked) == 2 + 2 * 3  # of each precision one before the clock starts, one that warms up, two that count
    assert {product for product, _, _ in asked} == {(128, 128, 128)}


@pytest.fixture
def clock(monkeypatch):
    "A clock that only a stand-in for the work moves: `clock.now += seconds`."
    class Clock:
        now = 0.0

    class Watch:
        def __init__(self):
            self.began = Clock.now

        def __float__(self):
            return Clock.now - self.began
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    monkeypatch.setattr(machine, "Stopwatch", Watch)
    return Clock


@pytest.mark.parametrize("gain", [1 / 80, 0.7, 3.0])
@pytest.mark.parametrize("cold_calls", [1, 2])
@pytest.mark.parametrize("speed", [4e10, 4e8])
def test_what_a_process_does_once_is_not_measured(gain, cold_calls, speed, clock):
    "The first products take a second longer (an import, threads that start), on a fast machine and on one so slow that the budget ends everything."
    asked = []

    def seconds(product, low, device):
        asked.append(product)
        took = 2 * product[0] * product[1] * product[2] / (speed * (gain if low else 1.0)) + (len(asked) <= cold_calls)
        clock.now += took
        return took
    found = measure_rates(LARGE, CPU, seconds)
    assert found.gain == pytest.approx(gain) and found.float32 == pytest.approx(speed)
    assert choose_precision("auto", LARGE, CPU, measure=lambda *_: found).value == ("bfloat16" if gain > 1.25 else "float32")
    assert ((512, 192, 768) in asked) is (gain > 0.5)


def test_a_held_up_first_time_of_a_shape_does_not_count(clock):
    "Kernels are chosen per shape: the first time of either precision may be slow, and a late clock accepts no lone first time."
    seen = []

    def seconds(product, low, device):
        took = 1e-3 if (product, low) in seen else 1.0
        seen.append((product, low))
        clock.now += took
        return took
    assert measure_rates(LARGE, CPU, seconds).gain == pytest.approx(1.0)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the libraries cannot be told to know less")
def test_a_cold_process_on_a_processor_without_16_bit_units():
    "In a process of its own whose libraries are told to know no more than AVX2, where each 16-bit product is emulated."
    code = ("import torch; from e2e_sae_nb.machine import choose_precision, products_of\n"
            "torch.set_num_threads(1); print(choose_precision('auto', products_of(1024, 192, 4096), torch.device('cpu')).value)")
    plain = {k: v for k, v in os.environ.items() if k != machine.VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
                          env=plain | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"})
    assert done.stdout.strip() == "float32"


def test_on_a_gpu_no_product_is_timed_that_only_times_its_launch():
    "A launch takes 20 microseconds, and the casts of a 16-bit product two launches more."
    asked = []

    def seconds(product, low, device):
        asked.append(product)
        return 2e-5 * (3 if low else 1) + 2 * product[0] * product[1] * product[2] / (4e14 if low else 4e13)
    products = products_of(8192, 768, 50257)
    found = measure_rates(products, torch.device("cuda"), seconds)
    assert found.gain > 4 and (128, 128, 128) not in asked[2:]
    assert measure_rates(products, CPU, seconds).gain < 0.5  # what the small rung would have said


def test_a_real_measurement_on_this_machine_has_an_outcome():
    "Whatever it is; the time is not judged here."
    found = measure_rates(products_of(256, 64, 512), CPU)
    assert found.float32 > 0 and found.bfloat16 > 0 and choose_precision("auto", LARGE, CPU, measure=lambda *_: found).value in ("float32", "bfloat16")


def test_the_variable_takes_the_place_of_the_measurement(rates, monkeypatch):
    asked = rates(0.01)
    monkeypatch.setenv(machine.VARIABLE, "bfloat16")
    assert choose_precision("auto", LARGE, CPU).value == "bfloat16" and not asked
    assert choose_precision("float32", LARGE, CPU).value == "float32"
    monkeypatch.setenv(machine.VARIABLE, "half")
    with pytest.raises(UserError, match="must be float32 or bfloat16"):
        choose_precision("auto", LARGE, CPU)


def test_tiny_networks_are_not_measured(subject, values, monkeypatch):
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    monkeypatch.setattr(machine, "measured_rates", lambda *_: pytest.fail("measured"))
    (settled,), facts = settle([RunConfig.from_dict(values)], subject)
    assert (settled.compute_dtype, settled.compile) == ("float32", False) and facts["multiply_adds_per_second"] is None
    assert sparse_step.can_screen(torch.zeros(32, 16)) is False


@pytest.mark.parametrize("gain, screens", [(0.01, False), (1.5, False), (3.0, True)])
def test_screening_is_decided_by_the_same_rates(gain, screens, rates):
    rates(gain)
    assert sparse_step.can_screen(torch.zeros(32, 16)) is screens
    assert sparse_step.can_screen(torch.zeros(32, 16, dtype=torch.float64)) is False


def test_asked_for_where_it_is_slower_is_one_line(rates, subject, values, capsys):
    rates(0.0321)
    for _ in range(2):
        run = train(RunConfig.from_dict(values | {"compute_dtype": "bfloat16", "save_dir": None}), subject=subject)
    said = [line for line in capsys.readouterr().err.splitlines() if "slower" in line]
    assert run.config.compute_dtype == "bfloat16" and len(said) == 1 and "0.321 against 10 G" in said[0]


# a run, its record and its continuation

@pytest.mark.parametrize("gain, value, used", [(8.0, "bfloat16", True), (0.5, "float32", False)])
def test_the_outcome_is_written_down_and_used(gain, value, used, rates, subject, values, monkeypatch):
    rates(gain)
    low, plain = [], runs.autocast
    monkeypatch.setattr("e2e_sae_nb.state.autocast", lambda value, *args: low.append(value) or plain(value, *args))
    run = train(RunConfig.from_dict(values), subject=subject)
    written = yaml.safe_load((run.path / "config.yaml").read_text())
    summary = read_json(run.path / "summary.json")
    assert (written["compute_dtype"], written["compile"]) == (value, False) == (summary["compute_dtype"], summary["compile"])
    assert summary["computing"]["multiply_adds_per_second"] == {"float32": 1e10, "bfloat16": gain * 1e10}
    assert summary["provenance"]["config"]["compute_dtype"] == run.config.compute_dtype == value
    assert summary["computing"]["screen"] is used and set(low) == {value}


def test_a_continued_run_keeps_what_it_began_with(rates, subject, values, tmp_path):
    "As if taken to another processor: bfloat16 and screening stay, to the last bit."
    rates(8.0)
    whole = train(RunConfig.from_dict(values | {"save_dir": str(tmp_path / "whole")}), subject=subject)
    t = begin(RunConfig.from_dict(values), subject)
    from e2e_sae_nb.training import train_step
    while t.samples < 8:
        train_step(t)
    folder = t.folder
    save(t)
    rates(0.9)
    t = resume(folder, subject)
    assert t.config.compute_dtype == "bfloat16" and t.screen is True
    assert t.computing["multiply_adds_per_second"]["bfloat16"] == 8e10
    del t
    continued = train(resume_from=folder, subject=subject)
    assert continued.summary["compute_dtype"] == "bfloat16"
    new = begin(RunConfig.from_dict(values | {"save_dir": None}), subject)
    assert (new.config.compute_dtype, new.screen) == ("float32", False)  # as a run that begins here is computed
    for p, q in zip(whole.saes[PLACE].parameters(), continued.saes[PLACE].parameters(), strict=True):
        assert torch.equal(p, q)


def members_of(values):
    return FrontierConfig.from_dict({k: v for k, v in values.items() if k not in ("loss", "lr")} | {"frontier": {
        "local": {"lr": 1e-2, "sparsity": [0.5, 1.0]}, "e2e": {"lr": 1e-2, "sparsity": [0.5]}}})


def test_members_of_a_frontier_share_one_outcome_and_keep_it(rates, subject, values):
    rates(8.0)
    made = frontier(members_of(values), subject=subject)
    assert {run_config(run.path).compute_dtype for run in made} == {"bfloat16"} == {run.summary["compute_dtype"] for run in made}
    assert {run.summary["computing"]["multiply_adds_per_second"]["bfloat16"] for run in made} == {8e10}
    rates(0.5)
    again = frontier(members_of(values), subject=subject, resume=True)  # auto is equal to whatever it was settled to
    assert [run.path for run in again] == [run.path for run in made] and {run.config.compute_dtype for run in again} == {"bfloat16"}
    with pytest.raises(UserError, match="another configuration"):
        frontier(members_of(values | {"compute_dtype": "float32"}), subject=subject, resume=True)


def test_take_up_compares_all_members(rates, subject, values):
    rates(8.0)
    frontier(members_of(values), subject=subject)
    configs = [run_config(path.parent) for path in sorted(Path(values["save_dir"]).glob("*/config.yaml"))]
    with pytest.raises(UserError, match="another configuration"):
        take_up(configs[:2], subject)


def test_a_sweep_knows_its_finished_parts_whatever_was_chosen(rates, subject, values, tmp_path):
    asked = rates(8.0)
    path = tmp_path / "sweep.yaml"
    base = {k: v for k, v in values.items() if k not in ("loss", "lr", "save_dir")}
    sweep = {"base": base, "parts": {"one": {"frontier": {"local": {"lr": 1e-2, "sparsity": [0.5]}}}}}
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    table = read_json(run_sweep(path, tmp_path / "runs", subject=subject))
    stored = read_json(tmp_path / "runs" / "one" / "table.json")["provenance"]["config"]
    assert len(table["rows"]) == 1 and stored["base"]["compute_dtype"] == "bfloat16" and stored["base"]["compile"] is False
    asked.clear()
    rates(0.5)
    assert len(read_json(run_sweep(path, tmp_path / "runs", subject=subject))["rows"]) == 1 and not asked  # nothing is trained anew
    config = FrontierConfig.from_dict(base | sweep["parts"]["one"])
    assert _finished(tmp_path / "runs" / "one", config) and _same(stored, config)
    by_name = replace(config, base=replace(config.base, compute_dtype="float32"))
    assert not _same(stored, by_name)
    without = {**stored, "base": {k: v for k, v in stored["base"].items() if k not in ("compute_dtype", "compile")}}
    assert _same(without, config)  # a table from before these keys


def test_the_committed_sweeps_leave_it_open_and_their_tables_still_count():
    from e2e_sae_nb.sweeps import read_sweep

    for name in ("paper", "second", "architectures"):
        parts, stored = read_sweep(ROOT / "data" / "sweeps" / f"{name}.yaml"), read_json(ROOT / "data" / "results" / f"{name}.json")
        assert all(part.base.compute_dtype == part.base.compile == "auto" for part in parts.values())
        assert all(_same(stored["provenance"]["config"][part], parts[part]) for part in parts if part in stored["parts"]), name


def test_as_settled_fills_only_what_was_left_open(values):
    open_, other = RunConfig.from_dict(values), RunConfig.from_dict(values | {"compute_dtype": "bfloat16", "compile": True})
    assert as_settled(open_, other) == other
    named = RunConfig.from_dict(values | {"compute_dtype": "float32", "compile": False})
    assert as_settled(named, other) == named != other


# compiling

def stand_in(eager, compiled):
    return lambda subject, tokens: compiled if any("forward" in block.__dict__ for block in subject.blocks) else eager


@pytest.mark.parametrize("passes, compiled_seconds, kept", [(3 * 119, 0.5, False), (3 * 121, 0.5, True), (3 * 121, 0.95, False), (0, 0.5, False)])
def test_compiling_has_to_earn_its_time(passes, compiled_seconds, kept, monkeypatch):
    subject, tried = tiny_subject("gpt2"), []

    def pretend(subject, tokens, precision=None):
        tried.append(1)
        for block in subject.blocks:
            block.forward = compiling._CompiledForward.__new__(compiling._CompiledForward)
        return True
    monkeypatch.setattr(compiling, "compile_blocks", pretend)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name)
    outcome = compiling.compile_if_faster(subject, torch.zeros(1, 4, dtype=torch.long), passes, seconds=stand_in(1.0, compiled_seconds))
    assert outcome.compiled is kept and len(tried) == (passes > 3 * 120)
    assert any("forward" in block.__dict__ for block in subject.blocks) is kept


@pytest.mark.parametrize("asked, outcome, recorded", [("auto", True, True), ("auto", False, False), (False, None, False)])
def test_what_was_decided_about_compiling_is_recorded(asked, outcome, recorded, rates, subject, values, monkeypatch):
    rates(0.5)
    made = []
    monkeypatch.setattr(runs, "compile_if_faster", lambda *args, **kwargs: made.append(args) or compiling.Compiling(outcome, "measured", 1.0, 0.5))
    monkeypatch.setattr("e2e_sae_nb.state.compile_blocks", lambda *args: True)
    run = train(RunConfig.from_dict(values | {"compile": asked}), subject=subject)
    assert run_config(run.path).compile is recorded is run.summary["compile"] and len(made) == (asked == "auto")
    if made:
        assert made[0][2] == 6 * (1 + 2 * 2 / 3)  # batches times passes through the three blocks
    again = resume(run.path, subject)
    assert again.config.compile is recorded and len(made) == (asked == "auto")


# threads

def forget():
    "As in a fresh process."
    for known in (threads._set, threads._first, threads._written):
        known.clear()


@pytest.fixture
def cores(monkeypatch):
    "A machine of so many cores on which nobody has said a number, and torch as it starts there."
    before = torch.get_num_threads()

    def pretend(n):
        for name in threads.SAYS:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(threads, "cores_in_mask", lambda: n)
        monkeypatch.setattr(threads.os, "cpu_count", lambda: n)
        torch.set_num_threads(n)
        forget()
    yield pretend
    torch.set_num_threads(before)
    forget()


def quota(folder, n):
    "A file system whose control group may use so many cores."
    for name, text in (("proc/self/cgroup", "0::/\n"), ("sys/fs/cgroup/cpu.max", f"{n}00000 100000\n")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_what_the_command_line_says_to_torch_is_not_the_users_word(cores, tmp_path, monkeypatch):
    cores(8)
    root = quota(tmp_path, 4)
    threads.settle_environment(root)
    assert os.environ["OMP_NUM_THREADS"] == "4"
    torch.set_num_threads(4)  # what torch takes from the variable
    assert threads.may_choose() and threads.settle_threads(root) == 4
    asked = []
    machine.choose_threads(LARGE, CPU, lambda *a: asked.append(a) or 1.0)
    assert asked
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # now it is somebody else's
    assert not threads.may_choose()


@pytest.mark.parametrize("n", [2, 8])
def test_a_number_said_between_two_runs_wins(cores, tmp_path, n):
    cores(n)
    assert threads.settle_threads(tmp_path) == n
    threads.set_threads(n)  # an earlier run measured, and kept all
    torch.set_num_threads(said := n // 2)
    assert not threads.may_choose() and threads.settle_threads(tmp_path) == said


def test_the_number_never_rises_above_torchs_own(cores, tmp_path):
    cores(8)
    torch.set_num_threads(4)  # two threads share a core
    assert threads.settle_threads(tmp_path) == 4
    threads.set_threads(1)  # measured for one run
    assert threads.settle_threads(tmp_path) == 4  # the next one begins from torch's own number, not from the mask's


@pytest.mark.parametrize("held_up", [range(0), range(0, 14), range(5, 9), range(10, 26)])
def test_a_noisy_moment_does_not_decide_the_number_of_threads(cores, held_up):
    cores(2)
    asked = []

    def seconds(product, low, device):
        asked.append(torch.get_num_threads())
        return 10.0 if len(asked) - 1 in held_up and torch.get_num_threads() == 2 else 1.0
    assert machine.choose_threads(LARGE, CPU, seconds) == 2 == torch.get_num_threads()


def test_the_number_of_threads_is_chosen_once_per_pass(cores, subject, values, monkeypatch):
    "Every further measurement would say one thread; all members record what they ran with."
    cores(2)
    asked = []
    monkeypatch.setattr(runs, "choose_threads", lambda products, device: asked.append(1) or (torch.get_num_threads() if len(asked) == 1 else 1))
    settled, ran = members_of(values | {"compute_dtype": "float32", "compile": False}), []
    made = frontier(settled, subject=subject, on_step=lambda state: ran.append(torch.get_num_threads()))
    assert len(asked) == 1 and set(ran) == {2} == {run.summary["computing"]["threads"] for run in made}
    asked.clear()
    frontier(members_of(values | {"save_dir": values["save_dir"] + "2"}), subject=subject)
    assert len(asked) == 1
    configs = [run_config(run.path) for run in made]
    for run in made:  # interrupted before the first checkpoint
        for folder in (run.path / "checkpoints").iterdir():
            shutil.rmtree(folder)
    asked.clear()
    state = take_up(configs, subject)
    assert state is not None and len(asked) == 1 and len({id(t.computing) for t in state.trainings}) == 1


def test_threads_of_a_fake_container(tmp_path):
    "The page's trees in one process of its own: a quota of one core lowers torch's number, OMP_NUM_THREADS wins."
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/pod").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/elsewhere\n")
    (tmp_path / "sys/fs/cgroup/pod/cpu.max").write_text("120000 100000\n")
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("max 100000\n")
    assert threads.cgroup_quota(tmp_path) == 1.2 and threads.usable_cores(tmp_path) == 1
    code = ("import sys; from pathlib import Path; from e2e_sae_nb.threads import settle_environment, settle_threads\n"
            f"root = Path({str(tmp_path)!r})\n"
            "if 'early' in sys.argv: settle_environment(root)\n"
            "import torch; print(settle_threads(root) if 'late' in sys.argv else torch.get_num_threads())")
    plain = {k: v for k, v in os.environ.items() if k not in threads.SAYS}

    def ask(*when, **more):
        return int(subprocess.run([sys.executable, "-c", code, *when], capture_output=True, text=True, check=True, cwd=ROOT, env=plain | more).stdout)
    assert ask("late") == ask("early") == 1
    assert ask("early", "late", OMP_NUM_THREADS="2") == min(2, threads.cores_in_mask())


def test_the_affinity_mask_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    assert threads.usable_cores(tmp_path) == 3
    monkeypatch.delattr(threads.os, "sched_getaffinity")
    assert threads.usable_cores(tmp_path) == (os.cpu_count() or 1)


@pytest.mark.parametrize("entrance", ["train", "frontier", "evaluate", "train_lm", "bench"])
def test_threads_are_settled_at_the_entrances(entrance, monkeypatch, tmp_path):
    import importlib

    module = importlib.import_module({"train": "e2e_sae_nb.training", "evaluate": "e2e_sae_nb.training", "frontier": "e2e_sae_nb.frontiers",
                                      "train_lm": "e2e_sae_nb.lm", "bench": "e2e_sae_nb.bench"}[entrance])

    class Settled(Exception):
        pass

    def settled(*_):
        raise Settled
    monkeypatch.setattr(module, "settle_threads", settled)
    arguments = {"train": (object(),), "evaluate": (tmp_path,), "frontier": ([],), "train_lm": (None, None, {}, 1, tmp_path), "bench": ("embedded",)}[entrance]
    with pytest.raises(Settled):
        getattr(module, entrance)(*arguments)


@pytest.mark.parametrize("gain, taken", [(0.1, 1), (1.0, 2), (1.8, 2)])
def test_one_thread_where_it_is_faster(gain, taken, subject, values, monkeypatch):
    "Two threads that bring `gain`: chosen when a run begins, noted, and kept by its continuation."
    for name in threads.SAYS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "SMALL", 0)
    monkeypatch.setattr(threads, "cores_in_mask", lambda: 2)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 2)
    before, seconds = torch.get_num_threads(), lambda product, low, device: 1.0 / (gain if torch.get_num_threads() == 2 else 1.0)
    forget()
    monkeypatch.setattr(runs, "choose_threads", lambda products, device: machine.choose_threads(products, device, seconds))
    try:
        torch.set_num_threads(2)
        run = train(RunConfig.from_dict(values | {"compute_dtype": "float32"}), subject=subject)
        assert torch.get_num_threads() == taken == run.summary["computing"]["threads"]
        torch.set_num_threads(2)
        gain = 1.8
        assert resume(run.path, subject).computing["threads"] == taken == torch.get_num_threads()
        torch.set_num_threads(somebodys := 5)
        train(RunConfig.from_dict(values | {"compute_dtype": "float32"}), subject=subject)
        assert torch.get_num_threads() == somebodys
    finally:
        torch.set_num_threads(before)
        forget()


@pytest.mark.parametrize("chosen", [1, 5])
def test_docstrings_are_read_by_as_many_processes_as_there_are_cores(chosen, monkeypatch):
    "However many threads torch has been given."
    from e2e_sae_nb import corpus

    given, before = [], torch.get_num_threads()
    monkeypatch.setattr(corpus, "docstrings_of", lambda paths, processes: given.append(processes) or [[] for _ in paths])
    monkeypatch.setattr(threads, "cores_in_mask", lambda: 3)
    monkeypatch.setattr(threads, "cgroup_quota", lambda root: None)
    try:
        torch.set_num_threads(chosen)
        assert list(corpus.read_docstrings(["networkx"])) == [] and given == [3]
        monkeypatch.setattr(threads, "cgroup_quota", lambda root: 2.5)
        list(corpus.read_docstrings(["networkx"]))
        list(corpus.read_docstrings(["networkx"], processes=7))
        assert given == [3, 2, 7]
    finally:
        torch.set_num_threads(before)


def test_the_minutes_begin_once_the_text_is_there(subject, values, tmp_path, monkeypatch):
    from e2e_sae_nb import demonstration

    done, spent = [], []

    class Watch:
        def __init__(self):
            done.append("clock")

        def __float__(self):
            return 0.0
    monkeypatch.setattr(demonstration, "Stopwatch", Watch)
    monkeypatch.setattr("e2e_sae_nb.demonstration.data_for", lambda *_: done.append("text"), raising=False)
    monkeypatch.setattr(demonstration, "measure_speed", lambda *_: done.append("measured") or demonstration.Speed(1.0, 1.0, 0.1))
    plain = demonstration.plan_run
    monkeypatch.setattr(demonstration, "plan_run", lambda *args: spent.append(args[-1]) or plain(*args))
    demonstration.settle_plan(members_of(values | {"warmup_samples": 0}), subject, tmp_path, 6.0)
    assert done == ["text", "clock", "measured"] and spent == [0.0]


# fine-tunes

@pytest.mark.parametrize("compiled", [False, "auto"])
@pytest.mark.parametrize("asked", ["auto", "bfloat16"])
def test_a_fine_tune_measures_what_its_run_measured(asked, compiled, rates, subject, values):
    "On another machine, perhaps: what was asked for by name stays, and a folder without a record asks for nothing."
    from e2e_sae_nb.checkpoint import save_checkpoint
    from e2e_sae_nb.finetuning import finetune_config
    from e2e_sae_nb.runs import load_run

    rates(8.0)
    run = train(RunConfig.from_dict(values | {"compute_dtype": asked, "compile": compiled}), subject=subject)
    assert run.config.compute_dtype == "bfloat16"
    for loaded in (run, load_run(run.path), replace(load_run(run.path), summary={k: v for k, v in run.summary.items() if k != "computing"})):
        config = finetune_config(loaded, 8, subject=subject)
        assert (config.compute_dtype, config.compile) == (asked, compiled)
    assert finetune_config(run, 8, subject=subject, compute_dtype="float32").compute_dtype == "float32"
    save_checkpoint(run.path / "checkpoints" / "samples_99", run.saes, {})  # weights alone
    bare = replace(load_run(run.path), summary={k: v for k, v in run.summary.items() if k != "computing"})
    config = finetune_config(bare, 8, subject=subject)
    assert (config.compute_dtype, config.compile) == ("auto", "auto")


# train-lm

def test_train_lm_takes_a_precision(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from e2e_sae_nb import lm
    from e2e_sae_nb.cli import app

    given = []
    monkeypatch.setattr(lm, "prepare_text", lambda *_: ({"train": [], "held_out": []}, 10))
    monkeypatch.setattr(lm, "train_lm", lambda *_, **more: given.append(more))
    for words in ([], ["--compute-dtype", "bfloat16"], ["--eager"]):
        assert CliRunner().invoke(app, ["train-lm", "--out", str(tmp_path / "lm"), *words]).exit_code == 0
    assert given == [{"compute_dtype": "auto", "compile": "auto"}, {"compute_dtype": "bfloat16", "compile": "auto"}, {"compute_dtype": "auto", "compile": False}]
    refused = CliRunner().invoke(app, ["train-lm", "--out", str(tmp_path / "lm"), "--compute-dtype", "half"])
    assert isinstance(refused.exception, UserError) and "auto, float32, bfloat16" in str(refused.exception) and len(given) == 3
