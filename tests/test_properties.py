"""Properties over arbitrary configurations, documents and checkpoints (the same examples in every run)."""

import json
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from e2e_sae_nb.architectures import ARCHITECTURES, new_sae
from e2e_sae_nb.checkpoint import load_saes, load_state, load_tensors, read_cfg, save_checkpoint
from e2e_sae_nb.config import apply_overrides, from_dict, read_yaml, to_dict
from e2e_sae_nb.core import UserError
from e2e_sae_nb.data import StreamedRows, TokenStream
from e2e_sae_nb.documents import DataConfig, pack

fixed = settings(derandomize=True, deadline=None, max_examples=60, database=None)
NAMES = st.text(alphabet=st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    name: str = ""


@dataclass(frozen=True)
class Outer:
    size: int
    kind: Literal["a", "b"] = "a"
    inner: Inner = Inner()
    several: tuple[Inner, ...] = ()
    by_name: dict[str, float] | None = None
    flag: bool = False
    where: Path | None = None


FINITE = st.floats(allow_nan=False, allow_infinity=False)
INNER = st.builds(Inner, FINITE, NAMES)
OUTER = st.builds(Outer, st.integers(-(2**53), 2**53), st.sampled_from(["a", "b"]), INNER, st.lists(INNER, max_size=3).map(tuple),
                  st.none() | st.dictionaries(NAMES, FINITE, max_size=3), st.booleans(), st.none() | st.just(Path("a/b")))


@fixed
@given(OUTER)
def test_configs_come_back(config):
    assert from_dict(Outer, to_dict(config)) == config
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text(yaml.safe_dump(to_dict(config), allow_unicode=True), encoding="utf-8")
        assert from_dict(Outer, read_yaml(path)) == config


@fixed
@given(OUTER, NAMES, st.sampled_from([f.name for f in fields(Outer)]))
def test_configs_are_strict(config, word, key):
    values = to_dict(config)
    if word not in values:
        with pytest.raises(UserError, match="unknown key"):
            from_dict(Outer, values | {word: 1})
    with pytest.raises(UserError, match=key):  # nothing takes an object
        from_dict(Outer, values | {key: object()})


@fixed
@given(OUTER, FINITE, st.integers(-(2**53), 2**53))
def test_overrides_change_what_they_name(config, rate, size):
    values = to_dict(config)
    changed = from_dict(Outer, apply_overrides(values, [f"inner.rate={rate!r}", f"size={size}"]))
    assert changed.inner.rate == rate and changed.size == size and values == to_dict(config)
    assert [getattr(changed, f.name) for f in fields(Outer) if f.name not in ("inner", "size")] == [
        getattr(config, f.name) for f in fields(Outer) if f.name not in ("inner", "size")]


@fixed
@given(st.lists(st.lists(st.integers(1, 9), max_size=20), max_size=12), st.integers(2, 9), st.data())
def test_packing_knows_no_documents_but_their_ends(documents, n_ctx, pick):
    "Rows depend on the sequence of tokens alone: cutting a document in two (without an end between) changes nothing."
    ended = [[*document, 0] for document in documents]
    pieces = [part for document in ended for at in [pick.draw(st.integers(0, len(document)))] for part in (document[:at], document[at:])]
    whole, cut = (list(pack(parts, n_ctx, None)) for parts in (ended, pieces))
    assert len(whole) == len(cut) and all(map(np.array_equal, whole, cut))
    tokens = [token for document in ended for token in document]
    assert np.concatenate([*whole, []]).tolist() == tokens[: len(tokens) // n_ctx * n_ctx]  # each token once, in order, in disjoint windows


@fixed
@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 9))
def test_an_epoch_has_every_row_once(n, batch_size, buffer):
    stream = TokenStream(StreamedRows(lambda: (np.full(2, i) for i in range(n)), 0, buffer), batch_size, repeat=False, name="x")
    assert sorted(torch.cat(list(stream))[:, 0].tolist()) == list(range(n))


DTYPES = st.sampled_from([torch.float32, torch.float64])
SAES = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(ARCHITECTURES)), st.integers(1, 5), st.integers(1, 9), DTYPES),
                       min_size=1, max_size=3)


def made(recipe):
    options = lambda kind, d_sae: {"k": 1 + d_sae // 3} if kind in ("topk", "batchtopk", "matryoshka") else {}
    return {name: new_sae(kind, d_in, d_sae, orthogonal=False, dtype=dtype, **options(kind, d_sae)) for name, (kind, d_in, d_sae, dtype) in recipe.items()}


@fixed
@given(SAES, st.dictionaries(NAMES, st.integers() | NAMES | st.none(), max_size=3))
def test_checkpoints_come_back(recipe, state):
    saes = made(recipe)
    with tempfile.TemporaryDirectory() as folder:
        place = save_checkpoint(Path(folder) / "samples_1", saes, {"note": "\U0001f600"}, tensors={"x": torch.arange(3)}, state=state)
        found = load_saes(place)
        assert list(found) == list(saes) and load_state(place, read_cfg(place)) == state
        assert torch.equal(load_tensors(place, "training.safetensors", read_cfg(place))["x"], torch.arange(3))
        for name, sae in saes.items():
            assert type(found[name]) is type(sae) and found[name].options() == sae.options()
            assert found[name].state_dict().keys() == sae.state_dict().keys()
            assert all(v.dtype == sae.state_dict()[k].dtype and torch.equal(v, sae.state_dict()[k]) for k, v in found[name].state_dict().items())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    saes = {"blocks.0.hook_resid_pre": new_sae("relu", 2, 3, orthogonal=False)}
    return save_checkpoint(tmp_path_factory.mktemp("c") / "samples_1", saes, {"samples": 1}, tensors={"x": torch.arange(3.0)}, state={"samples": 1})


@settings(fixed, max_examples=300)
@given(st.sampled_from(["saes.safetensors", "training.safetensors", "training.json", "cfg.json"]), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_any_flipped_byte_is_noticed(checkpoint, file, where, mask):
    "Unless cfg.json says the same with it (white space)."
    path = checkpoint / file
    good = path.read_bytes()
    bad = bytearray(good)
    bad[int(where * len(bad))] ^= mask
    try:
        if file == "cfg.json" and json.loads(bad) == json.loads(good):
            return
    except ValueError:
        pass
    path.write_bytes(bad)
    try:
        with pytest.raises(UserError) as caught:
            load_saes(checkpoint)
            cfg = read_cfg(checkpoint)
            load_tensors(checkpoint, "training.safetensors", cfg)
            load_state(checkpoint, cfg)
        assert "\n" not in str(caught.value)
    finally:
        path.write_bytes(good)


@fixed
@given(st.integers(-5, 5), st.floats(-2, 2))
def test_data_settings_are_in_range_or_refused(n_ctx, share):
    right = n_ctx >= 2 and 0 <= share < 1
    try:
        assert DataConfig("x", n_ctx=n_ctx, held_out_share=share).n_ctx == n_ctx and right
    except UserError:
        assert not right
