"""Everything a CUDA device can tell, in one command of nine minutes, the most valuable first.

    python benchmarks/gpu.py --out DIR [--seconds 540] [--data SHARDS] [--commit ID] [--only smoke,tests]
    python benchmarks/gpu.py --keep DIR            # afterwards, anywhere: writes data/results/gpu.json
    python benchmarks/gpu.py --out DIR --device cpu --small    # tries the script where there is no device

Six stages, each a process of its own with its own limit, since after an illegal address nothing in a process works any more:

    stage    limit  expected  yields
    smoke       75 s    25 s  versions, driver, rates of matrix products and memory, one e2e step in three precisions against float64
    tests      170 s    90 s  tests/test_gpu.py
    micro       45 s    20 s  the pieces of a step, each beside what it might be
    bench      150 s    90 s  whole steps at GPT-2 small's shape, ours and the reference's way in turns, float32, TF32, bfloat16, compiled
    profile     45 s    25 s  longest kernels, launches, the device's busy share, waits with their lines
    train      240 s  the rest  nine SAEs on the embedded network for as long as there is time

A stage that fails or is stopped at its limit does not stop the others. Figures are in DIR/gpu.json as soon as they exist (the file is
replaced whole), what a stage prints is in DIR/STAGE.log. At the end a table shows what was measured beside what was predicted without a
device (`PREDICTED`).

A machine without network needs torch, transformers, triton, numpy, pytest and jaxtyping, which it has if it is meant for this, and from here:

1. the wheel of fastcore (100 kB): `pip download --no-deps -d .whl fastcore`
2. for the last stage the embedded network's corpus as token shards (14 MiB of 16-bit numbers):
   `e2e-sae tokenize docstrings --tokenizer docstrings --out .shards`; without them the stage trains on made-up tokens, which shows speed
   but no margin
3. one command in the checkout's root there:

    python3 -m pip install -q --no-index --no-deps --target $HOME/site .whl/*.whl && export PYTHONPATH=$HOME/site && \
      python3 benchmarks/gpu.py --out $OUT --seconds 540 --data .shards --commit $(cat .commit)

   (`git rev-parse HEAD > .commit` beforehand, where the checkout travels without its history). About nine minutes; `--seconds 300` leaves
   out most of the training, `--only smoke,tests` takes two minutes.
4. back come gpu.json and a log per stage; `python benchmarks/gpu.py --keep DIR` checks and keeps the figures. Figures of a CPU are refused.
"""

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

STAGES = {"smoke": 75, "tests": 170, "micro": 45, "bench": 150, "profile": 45, "train": 240}  # seconds that each may take
ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "data" / "results" / "gpu.json"
PATHS = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "E2E_SAE_PROGRESS": "0", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "PYTHONPATH": PATHS}

# What arithmetic says about an H100 (790 TFLOP/s in bfloat16, 400 in TF32, 50 in float32, 3.0 TB/s), GPT-2 small, 8 x 1024 tokens, 46,080
# latents, L0 50: "before" with the code that waited 27 times a step, screened on CPUs only and left vocabularies odd; "now" without that.
PREDICTED: dict[str, dict[str, Any]] = {
    "smoke": {"matrix product float32 TFLOP/s": 50, "matrix product TF32 TFLOP/s": 400, "matrix product bfloat16 TFLOP/s": 790, "copy TB/s": 3.0},
    "micro": {"encoder product float32 ms": 11.6, "encoder product TF32 ms": 1.45, "encoder product bfloat16 ms": 0.75,
              "gelu_new as it is ms": 0.5, "a block's products bfloat16 ms": 0.15, "20 bags of all tokens ms": 0.1,
              "largest of a batch ms": 5.0, "find_positive screened ms": 2.3, "find_positive float32 ms": 13.1},
    "bench": {"e2e ours float32": 63e3, "e2e reference float32": 41e3, "local ours float32": 264e3, "local reference float32": 86e3,
              "local reference bfloat16": 450e3, "e2e ours bfloat16 compiled": 370e3,
              "before: e2e ours bfloat16": 145e3, "before: e2e ours bfloat16 compiled": 195e3, "before: local ours bfloat16": 370e3},
    "floor": {"local": 1.9e6, "e2e": 630e3, "e2e+ds": 620e3},  # tokens per second, unavoidable memory traffic included
    "profile": {"gpt2-small e2e: waits": 5, "gpt2-small local: waits": 5, "before: waits": 28},
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path)
    p.add_argument("--seconds", type=float, default=540.0)
    p.add_argument("--only", default=",".join(STAGES))
    p.add_argument("--data", default="")
    p.add_argument("--device", default="cuda")
    p.add_argument("--small", action="store_true")
    p.add_argument("--commit", default="")
    p.add_argument("--keep", type=Path)
    p.add_argument("--to", type=Path, default=KEPT)
    p.add_argument("--stage", help=argparse.SUPPRESS)
    p.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.keep is not None:
        return keep(a.keep, a.to)
    if a.out is None:
        p.error("--out DIR says where the figures go (or --keep DIR which are to be kept)")
    if unknown := set(a.only.split(",")) - set(STAGES):
        p.error(f"unknown stage {sorted(unknown)[0]!r}; there are {', '.join(STAGES)}")
    a.out = a.out.resolve()
    a.out.mkdir(parents=True, exist_ok=True)
    if a.stage:
        return RUN[a.stage](a)
    conduct(a)


def conduct(a: argparse.Namespace) -> None:
    "Run the stages, one after the other, within the time there is."
    end = time.time() + a.seconds
    note(a, "about", {"commit": a.commit or None, "seconds": a.seconds, "small": a.small, "command": "python benchmarks/gpu.py " + " ".join(sys.argv[1:])})
    for name in a.only.split(","):
        limit = min(STAGES[name], end - time.time() - 5)
        if limit < 15:
            note(a, name, {"skipped": "no time was left"})
            continue
        clock, code = time.time(), None
        command = [sys.executable, __file__, *sys.argv[1:], "--stage", name, "--until", str(clock + limit)]
        with open(a.out / f"{name}.log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT, cwd=ROOT, start_new_session=True)
            try:
                code = process.wait(limit + 5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)  # with what it started itself
                process.wait()
        note(a, name, {"exit": "stopped at its limit" if code is None else code, "seconds": round(time.time() - clock, 1)})
        print(f"{name}: exit {code}, {time.time() - clock:.0f} s", flush=True)
        if code:
            print("".join((a.out / f"{name}.log").read_text(errors="replace").splitlines(keepends=True)[-12:]), flush=True)
    print(table(json.loads((a.out / "gpu.json").read_text())))


def note(a: argparse.Namespace, stage: str, values: dict[str, Any]) -> None:
    "Add figures to DIR/gpu.json at once; the file is always whole."
    path = a.out / "gpu.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    found.setdefault(stage, {}).update(values)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=1, default=str))
    os.replace(temporary, path)


def table(found: dict[str, Any]) -> str:
    "What was measured, and beside it what was predicted."
    comparable = not found.get("about", {}).get("small") and found.get("smoke", {}).get("device", {}).get("type") == "cuda"
    lines = [f"{'stage':8s} {'what':52s} {'measured':>14s} {'predicted':>12s} {'ratio':>6s}"]
    for stage in STAGES:
        for key, value in found.get(stage, {}).items():
            number = value.get("tokens/s") if isinstance(value, dict) else value
            shown = f"{number:14.5g}" if isinstance(number, (int, float)) else f" {json.dumps(value, default=str)[:90]}"
            told = PREDICTED.get(stage, {}).get(key) if comparable else None
            beside = f" {told:12.5g} {number / told:6.2f}" if told and isinstance(number, (int, float)) else ""
            lines.append(f"{stage:8s} {key[:52]:52s} {shown}{beside}")
    return "\n".join(lines)


def keep(folder: Path, to: Path) -> None:
    "Figures of a device become a result of this project."
    sys.path.insert(0, str(ROOT))
    from e2e_sae_nb.core import load_result, write_json

    path = folder / "gpu.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    record, device = found.get("smoke", {}).get("provenance"), found.get("smoke", {}).get("device", {})
    if record is None:
        sys.exit(f"{path} has no figures of a first stage (smoke), so nothing says where they come from")
    if device.get("type") != "cuda" and to == KEPT:
        sys.exit(f"{path} holds figures of a {device.get('type')}, not of a CUDA device; --to FILE writes them elsewhere")
    about = found.pop("about", {})
    record = record | {"git_commit": record.get("git_commit") or about.get("commit"), "command": about.get("command", record["command"])}
    write_json(to, {"device": device, "figures": found, "predicted": PREDICTED, "provenance": record})
    load_result(to)
    print(f"{to}: {device.get('name')}, driver {device.get('driver')}")


def seconds_of(function: Callable[[], Any], device: str, repeats: int = 7, warm: int = 2) -> float:
    "The median of several calls; by the device's own clock where there is one."
    import torch

    found = []
    for _ in range(warm + repeats):
        if not device.startswith("cuda"):
            clock = time.perf_counter()
            function()
            found.append(time.perf_counter() - clock)
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        function()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / 1e3)
    return sorted(found[warm:])[repeats // 2]


PRECISIONS = (("float32", "float32", "highest"), ("TF32", "float32", "high"), ("bfloat16", "bfloat16", "highest"))  # name, dtype, float32 products


def smoke(a: argparse.Namespace) -> None:
    "Versions, rates, and one step against float64."
    import torch

    from e2e_sae_nb.core import provenance, versions

    say, n = partial(note, a, "smoke"), 512 if a.small else 8192
    say({"provenance": provenance({"seconds": a.seconds, "small": a.small}, device=a.device), "device": facts(a.device), "versions": versions() | more_versions()})
    for name, dtype, products in PRECISIONS:
        torch.set_float32_matmul_precision(products)
        x, y = (torch.randn(n, n, device=a.device).to(getattr(torch, dtype)) for _ in range(2))
        say({f"matrix product {name} TFLOP/s": 2 * n**3 / seconds_of(lambda x=x, y=y: x @ y, a.device, 3) / 1e12})
    torch.set_float32_matmul_precision("highest")
    x = torch.randn(2**20 if a.small else 2**29, device=a.device)
    say({"copy TB/s": 2 * 4 * len(x) / seconds_of(x.clone, a.device, 3) / 1e12})
    del x
    t = gpu_tests(a)
    for loss in ("e2e",) if a.small else t.LOSSES:
        value, expected = t.one_step(loss, torch.float64, "cpu", t.dense_forward)
        for way, (dtype, autocast, _, _) in t.WAYS.items():
            found, gradients = t.one_step(loss, dtype, a.device, t.SPARSE, autocast)
            error = max(t.distance(gradients[key], expected[key]) for key in expected)
            say({f"{loss} step in {way}: error of loss, of gradients": [abs(found / value - 1), error]})


def facts(device: str) -> dict[str, Any]:
    "What the figures depend on."
    import torch

    if not device.startswith("cuda"):
        return {"type": device, "name": device}
    p, driver = torch.cuda.get_device_properties(device), ""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return {"type": "cuda", "name": p.name, "driver": driver, "capability": [p.major, p.minor], "memory_bytes": p.total_memory,
            "multiprocessors": p.multi_processor_count, "cuda": torch.version.cuda, "cpus": os.cpu_count()}


def more_versions() -> dict[str, str]:
    from importlib import metadata

    return {name: metadata.version(name) for name in ("triton", "fastcore") if any(d.metadata["Name"] == name for d in metadata.distributions())}


def gpu_tests(a: argparse.Namespace) -> Any:
    "The module of tests, whose steps are used here too."
    sys.path.insert(0, str(ROOT / "tests"))
    os.environ.setdefault("E2E_SAE_TEST_DEVICE", a.device)
    import test_gpu

    return test_gpu


def tests(a: argparse.Namespace) -> None:
    "The cases of tests/test_gpu.py, each counted as soon as it is through."
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", "-v", "--tb=short", "-p", "no:cacheprovider",
               *(["-k", "bags or prefetch or screen"] if a.small else [])]
    counts: Counter[str] = Counter()
    failed: list[str] = []
    process = subprocess.Popen(command, env=os.environ | {"E2E_SAE_TEST_DEVICE": a.device}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if seen := re.match(r"tests/test_gpu.py::(.+?) (PASSED|FAILED|ERROR|SKIPPED)", line):
            counts[seen[2].lower()] += 1
            failed += [seen[1]] if seen[2] in ("FAILED", "ERROR") else []
            note(a, "tests", {"cases": dict(counts), "failed": failed})
    note(a, "tests", {"pytest": process.wait()})


def micro(a: argparse.Namespace) -> None:
    "The pieces of a step at GPT-2 small's shape."
    import torch
    import torch.nn.functional as F

    from e2e_sae_nb import kernels
    from e2e_sae_nb.sparse_step import SparseCode, find_positive, full_sums
    from e2e_sae_nb.topk import BatchTopK, _top_of_batch

    n, d, wide, vocab = (64, 96, 1024, 501) if a.small else (8192, 768, 46080, 50257)
    chunk, random = min(n, 4096), partial(torch.randn, device=a.device)

    def say(name: str, function: Callable[[], Any]) -> None:
        try:
            note(a, "micro", {f"{name} ms": 1e3 * seconds_of(function, a.device, 5)})
        except Exception as error:  # the next piece may still work
            note(a, "micro", {name: f"{type(error).__name__}: {str(error)[:120]}"})

    x, rows, bias = random(n, d), random(wide, d) / d**0.5, torch.full((wide,), -3.0, device=a.device)
    for name, dtype, products in PRECISIONS:
        torch.set_float32_matmul_precision(products)
        low_x, low_rows = x.to(getattr(torch, dtype)), rows.to(getattr(torch, dtype))
        say(f"encoder product {name}", lambda a=low_rows, b=low_x: a @ b.T)
        for v in (vocab, vocab + -vocab % 128):
            h, w, s = (random(*shape).to(getattr(torch, dtype)) for shape in ((chunk, d), (v, d), (chunk, v)))
            say(f"logits of {chunk} tokens, vocabulary {v}, {name}", lambda h=h, w=w: F.linear(h, w))
            say(f"their gradient, vocabulary {v}, {name}", lambda s=s, w=w: s @ w)
    torch.set_float32_matmul_precision("highest")
    say("find_positive float32", lambda: find_positive(rows, bias, x, 1.0, False))
    say("find_positive screened", lambda: find_positive(rows, bias, x, 1.0, True))
    low_rows, low_x = rows.bfloat16(), x.bfloat16()
    with full_sums():
        say("encoder product bfloat16, float32 sums", lambda: low_rows @ low_x.T)
    exact, screened = (find_positive(rows, bias, x, 1.0, screen) for screen in (False, True))
    assert exact is not None and screened is not None
    note(a, "micro", {"pairs found: in float32, screened": [len(exact.values), len(screened.values)]})
    for dtype in (torch.float32, torch.bfloat16):
        for v in (vocab, vocab + -vocab % 128):
            z, dz = random(chunk, v).to(dtype), random(chunk, v).to(dtype)
            say(f"kl_rows {dtype}, {v} columns", lambda z=z, dz=dz: kernels.kl_rows(z, dz, factor=1.0, width=vocab))
    token, latent = exact.token, exact.latent
    starts = torch.searchsorted(latent, torch.arange(wide + 1, device=a.device))
    say("pair_products", lambda: kernels.pair_products(latent, token, starts, rows, x))
    say("bags as they come", lambda: kernels.bag_sums(token, x, starts[:-1], exact.values))
    say("segment_sums", lambda: kernels.segment_sums(exact.values, latent, starts))
    sizes = torch.tensor([n] * 20 + [4] * 2000, device=a.device)
    index, ones = torch.randint(n, (int(sizes.sum()),), device=a.device), torch.ones(int(sizes.sum()), device=a.device)
    say("20 bags of all tokens", lambda: kernels.bag_sums(index, x, sizes.cumsum(0) - sizes, ones))
    say("firings, order by token", lambda: (SparseCode(exact.values, token, latent, (n,), wide).fired(), torch.argsort(token, stable=True)))
    sae = BatchTopK(d, wide, k=min(50, wide // 20), orthogonal=False).to(a.device)
    with torch.no_grad():
        say("largest of a batch", lambda: _top_of_batch(sae, x, max(1, 2**27 // wide)))
        say("largest of every token", lambda: (x[:2048] @ sae.W_enc).topk(sae.k, sorted=False))
    from transformers.activations import NewGELUActivation

    hidden, narrow = random(n, 4 * d).bfloat16(), random(n, d).bfloat16()
    weights = [(random(*shape).bfloat16(), at) for shape, at in (((3 * d, d), narrow), ((d, d), narrow), ((4 * d, d), narrow), ((d, 4 * d), hidden))]
    with torch.autocast(torch.device(a.device).type, torch.bfloat16):
        say("gelu_new as it is", lambda: NewGELUActivation()(hidden))
        say("gelu_new in one kernel", lambda: F.gelu(hidden, approximate="tanh"))
        say("a block's products bfloat16", lambda: [F.linear(at, weight) for weight, at in weights])


WAYS = {"ours bfloat16": (True, True, "highest"), "reference bfloat16": (False, True, "highest"), "ours float32": (True, False, "highest"),
        "reference float32": (False, False, "highest"), "ours TF32": (True, False, "high"), "reference TF32": (False, False, "high")}


def bench(a: argparse.Namespace) -> None:
    "Whole steps, ours and the reference's way in turns on the same tokens; memory of each beside what the others keep."
    import torch

    from e2e_sae_nb.bench import SHAPES, Method, Side, _sample, bench_losses, bench_subject
    from e2e_sae_nb.compiling import compile_blocks
    from e2e_sae_nb.core import generator

    shape = "embedded" if a.small else "gpt2-small"
    batch, place, g = ((2, 64) if a.small else (8, 1024)), SHAPES[shape]["place"], generator(0, "bench")
    subject, cuda = bench_subject(shape, torch.device(a.device)), a.device.startswith("cuda")
    draw = lambda: torch.randint(subject.vocab_size, batch, generator=g).to(a.device)
    sample, losses, first = _sample(subject, place, draw()), bench_losses(subject, place), None
    for compiled in (False, True):
        if compiled:  # it changes the blocks of the one network, for both ways
            clock = time.time()
            worked = compile_blocks(subject, draw(), partial(torch.autocast, torch.device(a.device).type, torch.bfloat16))
            note(a, "bench", {"compiled": worked, "seconds to compile": time.time() - clock})
            if not worked:
                return
        for name in ("e2e", "local", "e2e+ds"):
            sides: dict[str, Side] = {}
            for way, (ours, low, _) in WAYS.items():
                if compiled and not low:
                    continue
                side = copy.copy(first) if first else Side(Method(ours, low), subject, place, SHAPES[shape]["ratio"], losses[name], sample)
                first = first or copy.copy(side)  # 70 million numbers drawn on a CPU take seconds: once
                side.method, side.loss, side.seconds, side.sae = Method(ours, low), losses[name], [], copy.deepcopy(first.sae)
                kind = type(first.optimizer) if ours else partial(torch.optim.Adam, fused=True)
                side.optimizer = kind(list(side.sae.parameters()), lr=1e-5)
                sides[f"{name} {way}" + " compiled" * compiled] = side
            if not in_turns(a, sides, draw, 2 if a.small else 5, cuda):
                return


def in_turns(a: argparse.Namespace, sides: dict[str, Any], draw: Callable[[], Any], steps: int, cuda: bool) -> bool:
    "Time the sides of one objective; False: no time was left."
    import torch

    from e2e_sae_nb.bench import floor_multiply_adds

    peaks, firsts, broken = dict.fromkeys(sides, 0), {}, {}
    for _ in range(steps + 1):
        tokens = draw()
        for key, side in sides.items():
            if time.time() > a.until - 5:
                note(a, "bench", {"stopped": f"before a step of {key}"})
                return False
            if key in broken:
                continue
            torch.set_float32_matmul_precision(WAYS[key.removesuffix(" compiled").split(" ", 1)[1]][2])
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            try:
                firsts.setdefault(key, side.run(tokens)) if key not in firsts else side.run(tokens)
            except Exception as error:  # out of memory, most likely
                broken[key] = note(a, "bench", {key: f"{type(error).__name__}: {str(error)[:160]}"})
                continue
            if cuda and len(side.seconds) > 1:  # its own weights, gradients and moments exist by now
                own = sum(p.numel() * p.element_size() for p in side.sae.parameters()) * 4
                peaks[key] = max(peaks[key], torch.cuda.max_memory_allocated() - before + own)
    torch.set_float32_matmul_precision("highest")
    speeds: dict[str, float] = {}
    for key, side in sides.items():
        if key in broken:
            continue
        seconds, tokens = sorted(side.seconds[1:])[len(side.seconds[1:]) // 2], draw().numel()
        floor, name = floor_multiply_adds(side.subject, side.place, side.sae.d_sae, key.startswith("local")), key.split(" ")[0]
        speeds[key] = tokens / seconds
        note(a, "bench", {key: {"tokens/s": tokens / seconds, "ms": 1e3 * seconds, "all ms": [1e3 * s for s in side.seconds], "first loss": firsts[key],
                                "TFLOP/s of the floor's arithmetic": 2 * floor * tokens / seconds / 1e12, "share of the floor": tokens / seconds / PREDICTED["floor"][name],
                                "peak GB": peaks[key] / 1e9 or None}})
    theirs = {key: speed for key, speed in speeds.items() if not sides[key].method.ours}
    note(a, "bench", {f"{key} / {other.split(' ', 1)[1]}": speed / theirs[other] for key, speed in speeds.items() if key not in theirs for other in theirs})
    return True


def profile(a: argparse.Namespace) -> None:
    "Where the time of a step goes."
    import warnings

    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    from e2e_sae_nb.bench import SHAPES, Method, Side, _sample, bench_losses, bench_subject
    from e2e_sae_nb.core import generator

    cuda, g = a.device.startswith("cuda"), generator(0, "bench")
    for shape in ("embedded",) if a.small else ("gpt2-small", "embedded"):
        batch = (2, 64) if a.small else SHAPES[shape]["cuda_batch"]
        subject, place = bench_subject(shape, torch.device(a.device)), SHAPES[shape]["place"]
        draw = lambda: torch.randint(subject.vocab_size, batch, generator=g).to(a.device)
        losses = bench_losses(subject, place)
        side = Side(Method(True, not a.small), subject, place, SHAPES[shape]["ratio"], losses["e2e"], _sample(subject, place, draw()))
        for name in ("e2e", "local"):
            side.loss = losses[name]
            for _ in range(3):
                side.run(draw())
            tokens = draw()
            with watch(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
                side.run(tokens)
            events = [e for e in seen.key_averages() if not cuda or str(e.device_type).endswith("CUDA")]
            spent = lambda e: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3
            quiet = min(side.seconds[1:-1]) * 1e3  # without a profiler
            note(a, "profile", {f"{shape} {name}: ms of a step": quiet, f"{shape} {name}: ms in kernels": sum(map(spent, events)),
                                f"{shape} {name}: busy share": sum(map(spent, events)) / quiet, f"{shape} {name}: launches": sum(e.count for e in events),
                                f"{shape} {name}: kernels": {e.key[:90]: [round(spent(e), 3), e.count] for e in sorted(events, key=spent, reverse=True)[:30]}})
            if not cuda:
                continue
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                side.run(tokens)
            torch.cuda.set_sync_debug_mode("default")
            at = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message))
            note(a, "profile", {f"{shape} {name}: waits": sum(at.values()), f"{shape} {name}: waits by line": at})


def train(a: argparse.Namespace) -> None:
    "A frontier on the embedded network for as long as there is time: speed, and whether the margin over local SAEs grows."
    import torch

    from e2e_sae_nb.frontiers import frontier, row
    from e2e_sae_nb.members import FrontierConfig
    from e2e_sae_nb.models import load_subject
    from e2e_sae_nb.ratios import bootstrap_ratio, ce_increase_ratio

    subject, batch, say = load_subject("docstrings", device=a.device), 4 if a.small else 16, partial(note, a, "train")
    data = a.data if (Path(a.data) / "shards.json").is_file() else made_up(a, subject)
    base = {"tlens_model_name": "docstrings", "saes": {"sae_positions": "blocks.3.hook_resid_pre", "dict_size_to_input_ratio": 16},
            "train_data": {"dataset_name": str(data), "n_ctx": 256, "seed": 0}, "batch_size": batch, "min_lr_factor": 0.1, "max_grad_norm": 10.0,
            "compute_dtype": "float32" if a.small else "bfloat16", "device": a.device, "collect_act_frequency_every_n_samples": 0,
            "log_every_n_grad_steps": 50, "save_every_n_samples": None, "save_dir": None, "frontier": {
                "local": {"lr": 1e-2, "sparsity": [2.0, 4.0, 8.0]}, "e2e": {"lr": 1e-2, "sparsity": [0.25, 0.8, 2.5]},
                "e2e+ds": {"lr": 1e-2, "sparsity": [5.0, 12.0, 30.0], "total_coeff": 2.5, "kl_coeff": 0.5}}}
    made = lambda n, evaluated: FrontierConfig.from_dict(base | {"n_samples": n, "warmup_samples": min(1000, n // 2), "eval_n_samples": evaluated})
    probe, clock = (2 if a.small else 60) * batch, time.time()
    frontier(made(probe, 4), subject=subject)
    rate = probe / (time.time() - clock)
    left = a.until - time.time() - (5 if a.small else 35)  # for the evaluation and what is not foreseen
    n = min(100_000, max(batch, int(0.85 * rate * left) // batch * batch), 4 * batch if a.small else 100_000)
    say({"data": "the embedded corpus" if data == a.data else "made-up tokens", "probe sequences/s": rate, "sequences": n, "tokens per SAE": n * 256})
    clock = time.time()
    runs = frontier(made(n, 8 if a.small else 400), subject=subject, on_finish=lambda run: say({f"SAE {run.summary['type']} {run.summary['sparsity_coeff']:g}": {
        key: row(run)[key] for key in ("type", "sparsity_coeff", "l0", "ce_increase", "kl", "alive", "d_sae", "tokens", "seconds", "seconds_shared")}}))
    say({"seconds of all": time.time() - clock, "tokens/s of the pass": n * 256 / (time.time() - clock),
         "peak GB": torch.cuda.max_memory_allocated() / 1e9 if a.device.startswith("cuda") else None})
    rows = [row(run) | {"ce_increase_per_sequence": run.ce_increase_per_sequence} for run in runs]
    curve = lambda kind: ([r["l0"] for r in rows if r["type"] == kind], [r["ce_increase"] for r in rows if r["type"] == kind])
    for kind in ("e2e", "e2e+ds"):
        say({f"{kind}: CE increase relative to local, interval": [ce_increase_ratio(curve(kind), curve("local")), bootstrap_ratio(rows, kind)]})


def made_up(a: argparse.Namespace, subject: Any) -> Path:
    "Token shards without meaning."
    import numpy as np

    from e2e_sae_nb.core import FORMAT_VERSION, write_json
    from e2e_sae_nb.shards import tokenizer_facts

    folder, sides = a.out / "shards", {}
    folder.mkdir(exist_ok=True)
    for side, n in (("train", 200_000), ("held_out", 30_000)):
        np.save(folder / f"{side}.npy", (4096 * np.random.default_rng(0).random(n) ** 3).astype(np.uint16))
        sides[side] = [{"file": f"{side}.npy", "tokens": n, "sha256": ""}]
    write_json(folder / "shards.json", {"format_version": FORMAT_VERSION, "dtype": "uint16", "held_out_share": None,
                                        "tokenizer": tokenizer_facts(subject.tokenizer), "sides": sides})
    return folder


RUN = {"smoke": smoke, "tests": tests, "micro": micro, "bench": bench, "profile": profile, "train": train}

if __name__ == "__main__":
    main()
