"""What a step must not do, what batches without a counting token leave as it was, and what old folders, other subjects and members must not decide in silence."""

import json
import random
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from e2e_sae_nb import core, evaluation, memory, state
from e2e_sae_nb.architectures import make_saes
from e2e_sae_nb.config import to_dict
from e2e_sae_nb.core import UserError, data_path, existing
from e2e_sae_nb.data import special_token_ids
from e2e_sae_nb.documents import DataConfig
from e2e_sae_nb.evaluation import evaluate_saes
from e2e_sae_nb.families import FAMILIES
from e2e_sae_nb.frontiers import frontier, frontier_step, shared_plan
from e2e_sae_nb.hub import pull
from e2e_sae_nb.members import FrontierConfig
from e2e_sae_nb.metrics import VarianceExplained, merge_variance
from e2e_sae_nb.model_card import write_folder
from e2e_sae_nb.models import subject_from_model, tiny_model, tiny_subject
from e2e_sae_nb.passes import set_out
from e2e_sae_nb.runs import RunConfig, _rows, as_settled, run_config
from e2e_sae_nb.sae import SAEConfig
from e2e_sae_nb.state import begin, data_for, keep_for
from e2e_sae_nb.sweeps import _same
from e2e_sae_nb.training import train, train_step

PLACE = "blocks.1.hook_resid_pre"
LOCAL = {"sparsity": {"coeff": 0.5}, "out_to_in": {"coeff": 1.0}}


def described(path, **more):
    "A run on token ids (or on the texts of a .txt file)."
    kind = {} if path.suffix == ".txt" else {"is_tokenized": True}
    return {"tlens_model_name": "docstrings", "loss": LOCAL, "lr": 1e-2, "batch_size": 4, "n_samples": 16, "eval_n_samples": 4,
            "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 4}, "collect_act_frequency_every_n_samples": 0, "save_dir": None,
            "train_data": {"dataset_name": str(path), "n_ctx": 8, "seed": 0, "held_out_share": 0.2, **kind}, **more}


@pytest.fixture
def ids(tmp_path):
    rng, path = random.Random(0), tmp_path / "ids.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [rng.randrange(37) for _ in range(8)]}) for _ in range(300)))
    return path


@pytest.fixture(scope="module")
def speaking():
    "A tiny subject with the embedded tokenizer."
    tokenizer = AutoTokenizer.from_pretrained(data_path("docstrings-lm"))
    return subject_from_model(tiny_model("gpt2", vocab_size=len(tokenizer)), tokenizer=tokenizer)


# what a step asks of the tokenizer


@pytest.mark.parametrize("excluded", [{}, {"exclude_first_position": True}, {"exclude_special_tokens": True},
                                      {"exclude_first_position": True, "exclude_special_tokens": True}])
def test_no_step_lists_the_vocabulary_or_the_special_tokens(excluded, ids, speaking, monkeypatch):
    listed, asked, kind = [], [], type(speaking.tokenizer)
    get_vocab, special = kind.get_vocab, state.special_token_ids
    monkeypatch.setattr(kind, "get_vocab", lambda self: listed.append(1) or get_vocab(self))
    monkeypatch.setattr(state, "special_token_ids", lambda tokenizer: asked.append(1) or special(tokenizer))
    config = RunConfig.from_dict(described(ids, **excluded))
    t, two = begin(config, speaking), set_out([config, replace(config, lr=2e-2)], speaking)
    listed.clear()
    asked.clear()
    for _ in range(3):
        train_step(t)
        frontier_step(two.trainings, shared_plan([member.plan for member in two.trainings]))
    assert t.samples == two.samples == 12 and listed == []
    assert len(asked) <= (3 if "exclude_special_tokens" in excluded else 0)  # once for each of the three trainings


def test_what_counts_belongs_to_the_configuration(ids, speaking):
    t = begin(RunConfig.from_dict(described(ids)), speaking)
    tokens = torch.tensor([[5, speaking.tokenizer.eos_token_id, 7]])
    assert t.keep is t.keep and t.keep(tokens) is None
    other = replace(t, config=replace(t.config, exclude_special_tokens=True))
    both = keep_for(replace(t.config, exclude_first_position=True, exclude_special_tokens=True), speaking)
    for keep, given, counted in ((other.keep, tokens, [True, False, True]), (other.keep, tokens.int(), [True, False, True]), (both, tokens, [False, False, True])):
        mask = keep(given)
        assert mask is not None and mask.tolist() == [counted]
    assert t.keep(tokens) is None
    silent = subject_from_model(speaking.model)
    with pytest.raises(UserError, match="no special tokens are known"):
        begin(other.config, silent)


def test_a_tokenizer_without_words_is_none_though_its_words_are_not_listed(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    empty, whole = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(data_path("docstrings-lm"))
    sizes = [len(tokenizer.get_vocab()) for tokenizer in (empty, whole)]
    for tokenizer in (empty, whole):
        monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: pytest.fail("listed"))
    assert [len(empty), len(whole)] == sizes and existing(empty) is None and existing(whole) is whole
    assert special_token_ids(empty) == [] and special_token_ids(whole)


# batches in which no token counts


def test_a_batch_that_does_not_count_changes_nothing():
    subject = tiny_subject("gpt2")
    saes = make_saes({PLACE: 16}, SAEConfig((PLACE,), 4.0), seed=0)
    g = torch.Generator().manual_seed(0)
    first, blank, last = (torch.randint(1, 37, (3, 8), generator=g) for _ in range(3))
    blank[:] = 0
    keep = lambda tokens: tokens > 0
    expected = evaluate_saes(subject, saes, [first, last], keep=keep)
    for batches in ([first, blank, last], [blank, first, blank, blank, last], [blank, blank, first, last]):
        found = evaluate_saes(subject, saes, batches, keep=keep)
        assert found.to_dict() == expected.to_dict()
    with pytest.raises(UserError, match="no tokens to evaluate on"):
        evaluate_saes(subject, saes, [blank, blank], keep=keep)


@pytest.mark.parametrize("layer_normed", [False, True])
def test_no_tokens_explain_no_variance(layer_normed):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 4, generator=g)
    y = x + 0.1 * torch.randn(20, 4, generator=g)
    nothing, some = VarianceExplained(layer_normed), VarianceExplained(layer_normed)
    for _ in range(2):
        nothing.add(y[:0], x[:0])
    some.add(y, x)
    merged = merge_variance([nothing, some, nothing])
    assert nothing.count == 0 and nothing.mean is None
    assert (merged.ratio_of_sums, merged.per_token_mean, merged.mse) == pytest.approx((some.ratio_of_sums, some.per_token_mean, some.mse), rel=1e-12)


# folders and tables of the time before the key `lines`


def without_lines(folder):
    for path in folder.glob("*/config.yaml"):
        text = path.read_text(encoding="utf-8")
        shorter = re.sub(r"\n  lines: \w+", "", text)
        assert shorter != text
        path.write_text(shorter, encoding="utf-8")


def members_on(path, folder, **data):
    values = described(path, save_dir=str(folder), save_every_n_samples=8, frontier={"local": {"lr": 1e-2, "sparsity": [0.5, 1.0]}})
    del values["loss"], values["lr"]
    values["train_data"] |= data
    return FrontierConfig.from_dict(values)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {i} says that {i * i} is the square of {i}" for i in range(400)))
    return path


def test_an_old_frontier_on_other_data_than_text_is_taken_up(ids, tmp_path):
    config, subject = members_on(ids, tmp_path / "out"), tiny_subject("gpt2")
    frontier(config, subject=subject)
    without_lines(tmp_path / "out")
    assert [run.summary["samples"] for run in frontier(config, subject=subject, resume=True)] == [16, 16]


def test_an_old_frontier_on_text_goes_on_by_lines_only(text, speaking, tmp_path):
    config = members_on(text, tmp_path / "out", lines=True)
    frontier(config, subject=speaking)
    without_lines(tmp_path / "out")
    assert all(run_config(path.parent).train_data.lines for path in (tmp_path / "out").glob("*/config.yaml"))
    assert len(frontier(config, subject=speaking, resume=True)) == 2
    with pytest.raises(UserError, match="another configuration"):
        frontier(members_on(text, tmp_path / "out"), subject=speaking, resume=True)


@pytest.mark.parametrize(("name", "lines", "same"), [("text.txt", False, False), ("text.txt", True, True), ("ids.jsonl", False, True), ("docstrings", False, True)])
def test_an_old_table_counts_for_what_it_was_made_of(name, lines, same, tmp_path):
    config = members_on(tmp_path / name, tmp_path / "out", lines=lines)
    stored = to_dict(config)
    assert _same(stored, config)
    del stored["base"]["train_data"]["lines"]
    assert _same(stored, config) is same and "lines" not in stored["base"]["train_data"]


def test_lines_decide_where_they_decide_anything():
    by_lines, by_files = (RunConfig.from_dict(described(data_path("docstrings-lm") / "x.txt") | {"train_data": {"dataset_name": "x.txt", "n_ctx": 8, "lines": lines}})
                          for lines in (True, False))
    assert as_settled(by_files, by_lines) != by_lines
    rows = [replace(c, train_data=replace(c.train_data, dataset_name="owner/name"), eval_data=DataConfig("x.csv", lines=c.train_data.lines)) for c in (by_lines, by_files)]
    assert as_settled(rows[1], rows[0]) == rows[0] != rows[1]


# subjects that take any length


def test_a_subject_without_a_longest_context_is_measured_at_the_length_it_reads(tmp_path, monkeypatch):
    kind, sizes = FAMILIES["bloom"]
    subject = subject_from_model(tiny_model(kind, sizes=sizes))
    rng, path = random.Random(0), tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [rng.randrange(37) for _ in range(1024)]}) for _ in range(60)))
    config = RunConfig.from_dict(described(path) | {"train_data": {"dataset_name": str(path), "is_tokenized": True, "held_out_share": 0.2}})
    rows = next(data_for(config, subject, "train")).shape
    assert subject.n_ctx is None and rows == (4, 1024) == _rows(config, subject)
    screened, tried, can_screen = [], [], state.can_screen
    monkeypatch.setattr(state, "can_screen", lambda x: screened.append(len(x)) or can_screen(x))
    t = begin(config, subject)
    assert screened == [rows.numel()]
    monkeypatch.setattr(memory, "_gradients", lambda trainings, tokens: tried.append(tuple(tokens.shape)))
    assert memory.fitting_batch([t]) == 2 and tried == [(2, 1024)]


# one row for all texts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("passes", "one_row"), [(0.0, True), (0.3, False)])
def test_what_passes_the_stream_by_is_seen_in_any_precision(dtype, passes, one_row, monkeypatch):
    "The zero ablation is one row for all texts only if the texts do not differ after it."
    subject, kind = tiny_subject("gpt2", dtype=dtype), getattr(torch, dtype)
    tokens = torch.randint(37, (3, 8), generator=torch.Generator().manual_seed(0))
    real, known = evaluation.replay, {}

    def leaking(*args, **keywords):
        found = real(*args, **keywords)
        return replace(found, hidden=found.hidden + 1 + passes * (torch.arange(3) == 2).to(kind).view(3, 1, 1))

    monkeypatch.setattr(evaluation, "replay", leaking)
    with torch.no_grad():
        original = evaluation.original_pass(subject, tokens, [], start=evaluation.replay_start(subject, [PLACE]))
        hidden = evaluation._ablated(subject, original, (PLACE,), None, known)
    assert len(hidden) == (1 if one_row else 3) and bool(known) is one_row


# members of one pass


@pytest.mark.parametrize("differing", [{"eval_n_samples": 2}, {"compile": True}, {"eval_data": True}, {"saes": True}])
def test_members_that_only_the_first_would_decide_for_are_refused(differing, ids, tmp_path):
    one = RunConfig.from_dict(described(ids, save_dir=str(tmp_path / "out"), compile=False))
    (key, value), named = next(iter(differing.items())), {"saes": "saes.sharded"}
    value = replace(one.train_data, column_name="input_ids", n_ctx=4) if key == "eval_data" else replace(one.saes, sharded=True) if key == "saes" else value
    with pytest.raises(UserError, match=f"agree on {named.get(key, key)}"):
        frontier([one, replace(one, **{key: value})], subject=tiny_subject("gpt2"))
    assert not (tmp_path / "out").exists()


# folders that somebody looks at for a moment


def test_a_run_folder_is_moved_with_patience(ids, tmp_path, monkeypatch):
    "As on Windows, where a virus scanner may hold a new folder."
    run, replacing, refused = train(RunConfig.from_dict(described(ids, save_dir=str(tmp_path / "out"))), subject=tiny_subject("gpt2")), core.os.replace, []

    def held(source, target):
        if core.Path(source).is_dir() and str(target) not in refused:
            refused.append(str(target))
            raise PermissionError("somebody reads it")
        return replacing(source, target)

    monkeypatch.setattr(core, "sys", SimpleNamespace(**{**vars(sys), "platform": "win32"}))
    monkeypatch.setattr(core.os, "replace", held)
    written = write_folder(run, "owner/name", tmp_path / "card")
    fetched = pull(written, tmp_path / "fetched")
    assert {str(tmp_path / "card"), str(tmp_path / "fetched")} <= set(refused)
    for p, q in zip(run.saes[PLACE].parameters(), fetched.saes[PLACE].parameters(), strict=True):
        assert torch.equal(p, q)
