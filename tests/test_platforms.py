"""Windows and Apple, as far as Linux can play them: what these refuse is refused here, and a whole run has to go through."""

import builtins
import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_inputs import place, small_run  # noqa: F401  (a fixture)
from transformers import AutoTokenizer

from e2e_sae_nb import core, evaluate, load_run, train
from e2e_sae_nb.checkpoint import load_tensors, locked, optimizer_tensors, read_cfg, save_checkpoint
from e2e_sae_nb.core import UserError, atomic_path, move, safe_name, wide
from e2e_sae_nb.data import open_stream
from e2e_sae_nb.documents import DataConfig
from e2e_sae_nb.remote import is_path, is_url
from e2e_sae_nb.runs import new_run_dir
from e2e_sae_nb.tokenization import write_shards

ROOT = Path(__file__).resolve().parent.parent
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, to play another system")


def in_use(path):
    "Whether this process holds a file open or mapped, or one below a folder."
    real = os.path.realpath(path)
    held = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    held |= {line.split(maxsplit=5)[5].strip() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines() if len(line.split(maxsplit=5)) == 6}
    return any(name == real or name.startswith(real + os.sep) for name in held)


@pytest.fixture
def windows(monkeypatch):
    "What Windows refuses: flushing what is open for reading, and moving, replacing or removing what is open or mapped."
    fsync, replaced = os.fsync, {name: getattr(os, name) for name in ("replace", "rename", "unlink", "remove")}

    def flushed(fd):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(fd)

    def guarded(name):
        def call(*paths, **keys):
            for path in paths:
                if not isinstance(path, int) and not keys.get("dir_fd") and in_use(path):
                    raise PermissionError(errno.EACCES, "The process cannot access the file because it is being used by another process", str(path))
            return replaced[name](*paths, **keys)
        return call

    monkeypatch.setattr(os, "fsync", flushed)
    for name in replaced:
        monkeypatch.setattr(os, name, guarded(name))


@linux
def test_the_guards_guard(windows, tmp_path):
    "What the tests below rely on."
    (tmp_path / "a").write_bytes(b"x" * 10_000)
    with open(tmp_path / "a", "rb") as f:
        with pytest.raises(OSError):
            os.fsync(f.fileno())
        for call in (lambda: os.replace(tmp_path / "a", tmp_path / "b"), lambda: (tmp_path / "a").unlink(), lambda: tmp_path.rename(tmp_path.with_name("other"))):
            with pytest.raises(PermissionError):
                call()
    mapped = torch.UntypedStorage.from_file(str(tmp_path / "a"), False, 10_000)
    with pytest.raises(PermissionError):
        os.replace(tmp_path / "a", tmp_path / "b")
    del mapped
    os.replace(tmp_path / "a", tmp_path / "b")


@linux
def test_a_run_as_on_windows(windows, place):  # noqa: F811
    run = train(small_run(place))
    evaluate(run)
    (run.path / "summary.json").unlink()
    again = train(resume_from=run.path)  # its last checkpoint is written anew
    assert again.summary["kl"] == run.summary["kl"] and (run.path / "summary.json").is_file()
    assert load_run(run.path).summary["kl"] == run.summary["kl"]


@linux
def test_a_checkpoint_in_use_can_be_replaced(windows, place):  # noqa: F811
    run = train(small_run(place))
    folder = sorted((run.path / "checkpoints").iterdir())[-1]
    tensors = load_tensors(folder, "training.safetensors", read_cfg(folder))
    saved = load_run(run.path).saes
    save_checkpoint(folder, saved, {"subject": "x"}, tensors=tensors, state={})  # while its content is held
    assert all(torch.equal(value, load_tensors(folder, "training.safetensors", read_cfg(folder))[name]) for name, value in tensors.items())
    optimizer = torch.optim.Adam(next(iter(saved.values())).parameters())
    assert optimizer_tensors(optimizer) == {}


@linux
def test_shards_as_on_windows(windows, place):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    config = DataConfig(str(place / "a.jsonl"), held_out_share=0.2, n_ctx=16)
    for _ in range(2):
        write_shards(config, place / "shards", tokenizer, shard_tokens=500)
    stream = open_stream(DataConfig(str(place / "shards"), held_out_share=0.2, n_ctx=16), batch_size=2, tokenizer=tokenizer)
    next(stream)
    for path in (place / "shards").iterdir():  # nothing is held while it is read
        os.replace(path, path.with_suffix(".moved"))


def test_a_file_in_use_for_a_moment_is_waited_for(monkeypatch, tmp_path):
    real, refusals = os.replace, [3]

    def busy(*paths):
        if refusals[0]:
            refusals[0] -= 1
            raise PermissionError(errno.EACCES, "in use")
        real(*paths)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(core.sys, "platform", "win32")
    monkeypatch.setattr(core.time, "sleep", lambda seconds: None)
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_bytes(b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole" and refusals == [0]
    refusals[0] = 10**9
    with pytest.raises(PermissionError):
        move(tmp_path / "a", tmp_path / "b", patience=0)
    monkeypatch.setattr(core.sys, "platform", "linux")
    refusals[0] = 1
    with pytest.raises(PermissionError):
        move(tmp_path / "a", tmp_path / "b")


def test_locks_need_nothing_of_unix(monkeypatch, tmp_path):
    "A second holder is refused by the lock's own file, whoever made it and whatever is in it."
    real = builtins.__import__
    ours = lambda name, globals=None, *rest: (_ for _ in ()).throw(ImportError(name)) if name in ("fcntl", "resource") and str(
        (globals or {}).get("__name__", "")).startswith("e2e_sae_nb") else real(name, globals, *rest)
    monkeypatch.setattr(builtins, "__import__", ours)
    (tmp_path / ".lock").write_text("left by a process that was killed", encoding="utf-8")
    with locked(tmp_path):
        with pytest.raises(UserError, match="is being written to by another run; wait until it ends"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_locked_is_written_to_all_the_same(monkeypatch, tmp_path):
    import filelock

    def refuse(*_, **__):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with locked(tmp_path):
        pass


def test_imports_need_nothing_of_unix():
    code = """
import sys, importlib, pkgutil
for name in ("fcntl", "resource", "pwd", "grp", "termios"): sys.modules[name] = None
import e2e_sae_nb
for module in ("core", "checkpoint", "data", "tokenization", "state", "training", "evaluation", "cli", "frontiers", "lm", "demonstration"):
    importlib.import_module(f"e2e_sae_nb.{module}")
print("whole")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "whole\n", done.stderr[-2000:]


def test_names_that_windows_forbids(place):  # noqa: F811
    for name in ("a:b", 'x"y', "v1.", "nul", "LPT1.txt", "a|b?*", "tab\there"):
        folder = new_run_dir(small_run(place, wandb_run_name=name))
        for part in folder.relative_to(place).parts:
            assert not re.search(r'[<>:"\\|?*\x00-\x1f]', part) and not part.endswith((".", " ")), part
            assert not re.fullmatch(r"(?i)(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?", part), part
    assert safe_name("L3_lambda0.5-seed0") == "L3_lambda0.5-seed0"


def test_places_on_windows():
    for name in (r"C:\data\text.jsonl", "C:/data/text.jsonl", r"\\server\share\x", r".\x", r"..\x"):
        assert is_path(name) and not is_url(name)
    with pytest.raises(UserError, match="holds no data files"):  # and not a name that is asked of the Hub
        next(open_stream(DataConfig(r"Q:\nowhere\text.jsonl", n_ctx=8, is_tokenized=True), batch_size=1))


def test_every_text_file_names_its_encoding():
    "Windows would take another one than UTF-8."
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--preview", "--select", "PLW1514", "--no-cache", "e2e_sae_nb", "tools", "benchmarks", "setup.py"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@linux
def test_lines_end_alike_everywhere(monkeypatch, place):  # noqa: F811
    "Text mode writes two bytes for an end of line on Windows unless it is told not to; then bytes are counted as they were written."
    real = Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda self, data, encoding=None, errors=None, newline=None: real(
        self, data, encoding, errors, newline="\r\n" if newline is None else newline))
    run = train(small_run(place, log_every_n_grad_steps=1))
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        assert b"\r" not in (run.path / name).read_bytes(), name
    log = (run.path / "metrics.jsonl").read_bytes()
    assert train(resume_from=run.path).summary["kl"] == run.summary["kl"] and (run.path / "metrics.jsonl").read_bytes() == log


def test_wide_numbers_where_there_are_none():
    assert wide(torch.ones(2)).dtype == torch.float64
    place_ = SimpleTensor()
    assert wide(place_) == "float64 of cpu"  # type: ignore[arg-type]


class SimpleTensor:
    "Knows what is asked of it."

    device = torch.device("mps")

    def cpu(self):
        other = SimpleTensor()
        other.device = torch.device("cpu")
        return other

    def to(self, dtype):
        assert self.device.type == "cpu", "asked the device for float64"
        return f"{str(dtype).removeprefix('torch.')} of {self.device}"


@pytest.mark.parametrize("what", ["train", "sparse", "evaluate", "features", "generate", "demo"])
def test_apple_is_asked_only_for_what_it_has(what):
    "Neither for float64 nor for an operator that torch has for other devices only."
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "pretend_apple.py"), what], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.endswith("whole\n"), done.stderr[-3000:]


def test_ci_runs_on_three_systems():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))["jobs"]
    others = jobs["others"]
    assert {jobs["test"]["runs-on"], *others["strategy"]["matrix"]["os"]} == {"ubuntu-latest", "macos-latest", "windows-latest"}
    commands = " ".join(step.get("run", "") for step in others["steps"])
    assert "make" not in commands and "pytest" in commands  # Windows has no make
