"""Other people's SAEs through the import command, and ours through export: as their files define them, or one line.

The folders are written here by hand, in the layout that sae-lens 6.54.12 writes; what the real package computes is
compared in test_peers.py.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from e2e_sae_nb import RunConfig, evaluate, load_run, load_subject, train
from e2e_sae_nb.cli import app
from e2e_sae_nb.core import UserError, data_path, read_json, write_json
from e2e_sae_nb.evaluation import evaluate_saes
from e2e_sae_nb.model_card import write_folder
from e2e_sae_nb.models import tiny_model
from e2e_sae_nb.sae import SAE
from e2e_sae_nb.saelens import load_saelens, to_saelens
from e2e_sae_nb.splicing import original_pass
from e2e_sae_nb.state import data_for
from e2e_sae_nb.suites import SuiteSAE

PLACE, D, LATENTS, FACTOR = "blocks.1.hook_resid_pre", 16, 64, 0.05


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    "Tiny models of two families with the embedded tokenizer, and rows of its tokens, some of them special."
    folder, tokenizer, rng = (
        tmp_path_factory.mktemp("home"),
        AutoTokenizer.from_pretrained(data_path("docstrings-lm")),
        random.Random(0),
    )
    for family in ("gpt2", "llama"):
        tiny_model(family, vocab_size=len(tokenizer)).save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    rows = (
        [tokenizer.eos_token_id if rng.random() < 0.1 else rng.randrange(len(tokenizer)) for _ in range(16)]
        for _ in range(300)
    )
    (folder / "tokens.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return folder


def lens(folder: Path, cfg=None, metadata=None, scaler=None, **tensors) -> Path:
    "A folder as sae-lens writes it: a standard SAE unless told otherwise."
    g = torch.Generator().manual_seed(0)
    weights = {
        "W_enc": torch.randn(D, LATENTS, generator=g),
        "b_enc": torch.full((LATENTS,), -1.0),
        "b_dec": 0.1 * torch.randn(D, generator=g),
        "W_dec": torch.randn(LATENTS, D, generator=g) * torch.linspace(0.5, 2, LATENTS)[:, None],
    } | tensors
    base = {
        "d_in": D,
        "d_sae": LATENTS,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "architecture": "standard",
    }
    said = {
        "sae_lens_version": "6.54.12",
        "sae_lens_training_version": "6.54.12",
        "hook_name": PLACE,
        "model_name": "tiny",
        "model_class_name": "HookedTransformer",
        "context_size": 16,
        "prepend_bos": False,
        "seqpos_slice": [None],
        "exclude_special_tokens": False,
        "hook_head_index": None,
        "model_from_pretrained_kwargs": {},
    }
    folder.mkdir(parents=True)
    write_json(folder / "cfg.json", base | (cfg or {}) | {"metadata": said | (metadata or {})})
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "sae_weights.safetensors")
    if scaler is not None:
        write_json(folder / "activation_scaler.json", scaler)
        torch.save({}, folder / "trainer_state.pt")  # lies beside a checkpoint, and is never read
        save_file({"sparsity": torch.zeros(LATENTS)}, folder / "sparsity.safetensors")
    return folder


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def imported(home, folder, out, *settings, family="gpt2", dataset=True):
    "The import command, on the local network and tokens; its run."
    values = {
        "tlens_model_path": home / family,
        "train_data.is_tokenized": "true",
        "train_data.held_out_share": 0.2,
        "eval_n_samples": 24,
        "device": "cpu",
    }
    text = ["--dataset", home / "tokens.jsonl"] if dataset else []
    done = command(
        "import",
        folder,
        "--out",
        out,
        *text,
        *(w for key, value in values.items() for w in ("--set", f"{key}={value}")),
        *settings,
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return load_run(out)


def refused(says, home, folder, out, *settings):
    with pytest.raises(UserError) as caught:
        imported(home, folder, out, *settings)
    assert says in str(caught.value) and "\n" not in str(caught.value) and not out.exists(), caught.value


def inputs(home, run, family="gpt2", place=PLACE):
    subject = load_subject(home / family, device="cpu")
    return (
        original_pass(subject, next(data_for(run.config, subject, "eval")), [place], stop=True)
        .activations[place]
        .flatten(0, 1)
    )


# Checkpoints of a training


@pytest.mark.parametrize("subtracts", [False, True])
def test_an_unfinished_checkpoint(subtracts, home, tmp_path):
    "Active latents and reconstruction on the network's own activations, with the factor of activation_scaler.json."
    cfg = {
        "normalize_activations": "expected_average_only_in",
        "apply_b_dec_to_input": subtracts,
        "decoder_init_norm": 0.1,
        "l1_coefficient": 1.0,
    }
    folder = lens(tmp_path / "theirs", cfg, scaler={"scaling_factor": FACTOR, "has_whitening": False})
    run = imported(home, folder, tmp_path / "run")
    x, w, (sae,) = inputs(home, run), load_file(folder / "sae_weights.safetensors"), run.saes.values()
    code = torch.relu((FACTOR * x - subtracts * w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    ignored = torch.relu((x - subtracts * w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    with torch.no_grad():
        assert torch.equal(sae.encode(x) > 0, code > 0) and (ignored > 0).sum() > 2 * (code > 0).sum() > 0
        theirs = (code @ w["W_dec"] + w["b_dec"]) / FACTOR
        assert (sae(x).output - theirs).abs().max() < 1e-6 * theirs.abs().max()
        assert torch.allclose(sae.encode(x), code * w["W_dec"].norm(dim=-1) / FACTOR, rtol=1e-5, atol=1e-5 / FACTOR)
    assert "alive" in command("evaluate", run.path).output


@pytest.mark.parametrize(
    "scaler",
    [None, {"scaling_factor": None, "has_whitening": False}, {"scaling_factor": "0.05"}, {"scaling_factor": 0.0}, []],
)
def test_a_checkpoint_whose_factor_is_lost(scaler, home, tmp_path):
    for mode in ("expected_average_only_in", True):  # the latter before SAELens 6
        refused(
            "set normalize_activations to none if the weights are folded",
            home,
            lens(tmp_path / str(mode), {"normalize_activations": mode}, scaler=scaler),
            tmp_path / "run",
        )


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescaled", [False, True])
def test_an_unfinished_batchtopk(kind, rescaled, home, tmp_path):
    "Its one threshold becomes every latent's, as in the SAE that SAELens writes at the end."
    cfg = {
        "architecture": kind,
        "k": 4,
        "rescale_acts_by_decoder_norm": rescaled,
        "normalize_activations": "expected_average_only_in",
    }
    folder = lens(
        tmp_path / "theirs",
        cfg,
        scaler={"scaling_factor": FACTOR},
        topk_threshold=torch.tensor(0.3, dtype=torch.float64),
    )
    run = imported(home, folder, tmp_path / "run")
    x, w, (sae,) = inputs(home, run), load_file(folder / "sae_weights.safetensors"), run.saes.values()
    norms = w["W_dec"].norm(dim=-1)
    compared = (FACTOR * x @ w["W_enc"] + w["b_enc"]) * (norms if rescaled else 1.0)
    code = torch.where(compared > 0.3, compared, 0.0)
    theirs = ((code / norms if rescaled else code) @ w["W_dec"] + w["b_dec"]) / FACTOR
    assert run.config.saes.architecture == sae.architecture == "jumprelu" and (code > 0).any()
    with torch.no_grad():
        assert (
            torch.equal(sae.encode(x) > 0, code > 0)
            and (sae(x).output - theirs).abs().max() < 1e-6 * theirs.abs().max()
        )


# Positions


EXCLUSIONS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize("first, special", EXCLUSIONS)
def test_exclusions_go_out_and_come_back(first, special, home, tmp_path):
    "Trained, exported, imported, evaluated: the same positions count, and so the same numbers come out."
    data = {"dataset_name": str(home / "tokens.jsonl"), "is_tokenized": True, "n_ctx": 16, "held_out_share": 0.2}
    run = train(
        RunConfig.from_dict(
            {
                "tlens_model_path": str(home / "gpt2"),
                "lr": 1e-3,
                "batch_size": 8,
                "n_samples": 16,
                "eval_n_samples": 24,
                "device": "cpu",
                "save_dir": str(tmp_path),
                "loss": {"sparsity": {"coeff": 1.0}, "out_to_in": {"coeff": 1.0}},
                "saes": {"sae_positions": PLACE, "dict_size_to_input_ratio": 2, "activation_norm": "unit"},
                "train_data": data,
                "exclude_first_position": first,
                "exclude_special_tokens": special,
            }
        )
    )
    (folder,) = command("export", run.path, "--out", tmp_path / "out").output.split()
    metadata = read_json(Path(folder) / "cfg.json")["metadata"]
    assert (
        list(range(8))[slice(*metadata["seqpos_slice"])] == list(range(int(first), 8))
        and metadata["exclude_special_tokens"] is special
    )
    back = imported(home, tmp_path / "out", tmp_path / "back")
    assert (back.config.exclude_first_position, back.config.exclude_special_tokens) == (first, special)
    found = evaluate(back)
    assert found.tokens == run.summary["eval_tokens"] and found.kl == pytest.approx(run.summary["kl"], rel=1e-4)
    assert found.positions[PLACE].l0 == pytest.approx(run.summary["positions"][PLACE]["l0"], rel=1e-6)
    card = (write_folder(run, "me/run", tmp_path / "shared") / "README.md").read_text()
    assert ("in no number" in card, "first position" in card, "pecial tokens kept" in card) == (
        first or special,
        first,
        special,
    )


@pytest.mark.parametrize(
    "said, first, special",
    [
        ({"seqpos_slice": [1, None]}, True, False),
        ({"seqpos_slice": [1, 16], "exclude_special_tokens": True}, True, True),
        ({"seqpos_slice": [0, 16, 1]}, False, False),
        ({"seqpos_slice": None, "exclude_special_tokens": []}, False, False),
        ({"seqpos_slice": [None, 40]}, False, False),
    ],
)
def test_positions_of_theirs(said, first, special, home, tmp_path):
    config = imported(home, lens(tmp_path / "theirs", metadata=said), tmp_path / "run").config
    assert (config.exclude_first_position, config.exclude_special_tokens) == (first, special)


@pytest.mark.parametrize(
    "said, says, way_out",
    [
        ({"seqpos_slice": [5, -5]}, "positions [5, -5]", "exclude_first_position=true"),
        ({"seqpos_slice": [8]}, "positions [8]", "exclude_first_position=false"),
        ({"seqpos_slice": [None, None, 2]}, "positions [None, None, 2]", "exclude_first_position=false"),
        ({"seqpos_slice": "1:"}, "positions 1:", "exclude_first_position=true"),
        ({"exclude_special_tokens": [0, 5]}, "without the tokens [0, 5]", "exclude_special_tokens=true"),
    ],
)
def test_positions_that_cannot_be_said_here(said, says, way_out, home, tmp_path):
    "Refused, unless the user says what fits better."
    folder, (key, value) = lens(tmp_path / "theirs", metadata=said), way_out.split("=")
    refused(says, home, folder, tmp_path / "run")
    assert getattr(imported(home, folder, tmp_path / "run", "--set", way_out).config, key) is (value == "true")


# Places


@pytest.mark.parametrize("family, name", [("gpt2", "transformer.h.1"), ("llama", "model.layers.1")])
def test_a_block_of_hugging_face(family, name, home, tmp_path):
    "Named after its module, the SAE sits where the block's output is, and evaluates there."
    folder = lens(
        tmp_path / "theirs",
        metadata={
            "hook_name": name,
            "model_class_name": "AutoModelForCausalLM",
            "model_from_pretrained_kwargs": {"torch_dtype": "float32"},
        },
    )
    run = imported(home, folder, tmp_path / "run", family=family)
    assert list(run.saes) == ["blocks.1.hook_resid_post"] and not run.config.processed_weights
    subject = load_subject(home / family, device="cpu")
    batch, kept = next(data_for(run.config, subject, "eval")), []
    hook = subject.model.get_submodule(name).register_forward_hook(
        lambda module, args, out: kept.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    subject(batch)
    hook.remove()
    assert torch.allclose(
        original_pass(subject, batch, list(run.saes), stop=True).activations["blocks.1.hook_resid_post"],
        kept[0],
        atol=1e-6,
    )
    assert evaluate(run, subject=subject).positions["blocks.1.hook_resid_post"].l0 > 0


@pytest.mark.parametrize(
    "name, near",
    [
        ("model.layers.1.mlp", "did you mean 'blocks.1.hook_mlp_out'"),
        ("model.layers.1.self_attn", "did you mean 'blocks.1.hook_attn_out'"),
        ("blocks.1.attn.hook_q", "did you mean 'blocks.1.attn.hook_z'"),
        ("blocks.1.hook_mlp_in", "did you mean 'blocks.1.hook_resid_mid'"),
        ("hook_embed", "known: blocks.0"),
    ],
)
def test_places_that_do_not_exist_here(name, near, home, tmp_path):
    refused(near, home, lens(tmp_path / "theirs", metadata={"hook_name": name}), tmp_path / "run")


def test_heads_side_by_side(home, tmp_path):
    "hook_z: sae-lens flattens heads x d_head before the SAE, as they lie here."
    folder = lens(tmp_path / "theirs", {"reshape_activations": "hook_z"}, {"hook_name": "blocks.1.attn.hook_z"})
    run = imported(home, folder, tmp_path / "run")
    x, w, (sae,) = (
        inputs(home, run, place="blocks.1.attn.hook_z"),
        load_file(folder / "sae_weights.safetensors"),
        run.saes.values(),
    )
    heads = x.view(len(x), 2, -1)
    with torch.no_grad():
        theirs = (torch.relu(heads.flatten(1) @ w["W_enc"] + w["b_enc"]) @ w["W_dec"] + w["b_dec"]).view_as(heads)
        assert torch.allclose(sae(x).output.view_as(heads), theirs, atol=1e-5)


# Everything else


@pytest.mark.parametrize(
    "cfg, said, says",
    [
        ({}, {"hook_head_index": 3}, "reads head 3 alone"),
        ({}, {"hook_head_index": 0}, "reads head 0 alone"),
        ({}, {"model_class_name": "HookedMamba"}, "Mamba"),
        ({"normalize_activations": "layer_norm"}, {}, "at run time (normalize_activations: layer_norm)"),
        (
            {"normalize_activations": "constant_norm_rescale"},
            {},
            "at run time (normalize_activations: constant_norm_rescale)",
        ),
        ({"normalize_activations": "covariance_whitening"}, {}, "import the final SAE"),
        ({"architecture": "abstopk", "k": 4}, {}, "'abstopk' cannot be read"),
        ({"architecture": "skip_transcoder"}, {}, "'skip_transcoder' cannot be read"),
        ({"architecture": "temporal"}, {}, "'temporal' cannot be read"),
        ({"architecture": "matching_pursuit"}, {}, "'matching_pursuit' cannot be read"),
        ({"activation_fn_str": "tanh-relu"}, {}, "activation function is tanh-relu"),
        ({"architecture": "batchtopk", "k": 4}, {}, "topk_threshold missing"),
        ({"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": False}, {}, "rows of equal norm"),
    ],
)
def test_what_has_no_counterpart(cfg, said, says, home, tmp_path):
    refused(says, home, lens(tmp_path / "theirs", cfg, said), tmp_path / "run")


def test_scaled_codes(home, tmp_path):
    "Whether cfg.json mentions the factors or not; ones change nothing."
    for switch in (True, False):
        refused(
            "multiply the rows of W_dec",
            home,
            lens(
                tmp_path / f"a{switch}",
                {"finetuning_scaling_factor": switch},
                scaling_factor=torch.full((LATENTS,), 2.0),
            ),
            tmp_path / "run",
        )
    imported(
        home,
        lens(tmp_path / "b", {"finetuning_scaling_factor": True}, scaling_factor=torch.ones(LATENTS)),
        tmp_path / "run",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_precision(dtype, home, tmp_path):
    "Read as they are stored, computed in 32 bits at least."
    w = {
        name: value.to(dtype) for name, value in load_file(lens(tmp_path / "plain") / "sae_weights.safetensors").items()
    }
    run = imported(home, lens(tmp_path / "theirs", {"dtype": str(dtype).removeprefix("torch.")}, **w), tmp_path / "run")
    (sae,), wide = run.saes.values(), torch.promote_types(dtype, torch.float32)
    x, w = (
        torch.randn(50, D, generator=torch.Generator().manual_seed(1), dtype=wide),
        {name: value.to(wide) for name, value in w.items()},
    )
    theirs = torch.relu(x @ w["W_enc"] + w["b_enc"]) @ w["W_dec"] + w["b_dec"]
    with torch.no_grad():
        assert sae.W_enc.dtype == wide and (sae(x).output - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_a_topk_that_rescales(home, tmp_path):
    cfg = {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True}
    folder = lens(tmp_path / "theirs", cfg)
    (sae,), w = imported(home, folder, tmp_path / "run").saes.values(), load_file(folder / "sae_weights.safetensors")
    x, norms = torch.randn(50, D, generator=torch.Generator().manual_seed(1)), w["W_dec"].norm(dim=-1)
    top = ((x @ w["W_enc"] + w["b_enc"]) * norms).topk(4)
    code = torch.zeros(50, LATENTS).scatter(-1, top.indices, top.values.relu())
    theirs = (code / norms) @ w["W_dec"] + w["b_dec"]
    with torch.no_grad():
        assert (
            torch.equal(sae.encode(x) > 0, code > 0)
            and (sae(x).output - theirs).abs().max() < 1e-6 * theirs.abs().max()
        )


def test_text_that_the_files_name(home, tmp_path):
    "dataset_path, context and first token go into the run; without any text the command asks for one."
    said = {"dataset_path": str(home / "tokens.jsonl"), "context_size": 12, "prepend_bos": False}
    run = imported(home, lens(tmp_path / "theirs", metadata=said), tmp_path / "run", dataset=False)
    assert (run.config.train_data.dataset_name, run.config.train_data.n_ctx, run.config.train_data.add_bos) == (
        str(home / "tokens.jsonl"),
        12,
        False,
    )
    assert evaluate(run).tokens == 24 * 12
    with pytest.raises(UserError, match="name no text that could be evaluated on; give --dataset"):
        imported(home, lens(tmp_path / "silent"), tmp_path / "no", dataset=False)
    assert not (tmp_path / "no").exists()


def test_a_transcoder(home, tmp_path):
    "Both places are translated or refused; the reconstruction is that of its file."
    cfg, weights = to_saelens(
        SAE(D, LATENTS, seed=1, reads="blocks.1.mlp.hook_in", d_out=D).eval(),
        "blocks.1.hook_mlp_out",
        model_name="tiny",
        context_size=16,
    )
    assert cfg["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    run = imported(
        home,
        lens(tmp_path / "theirs", {k: v for k, v in cfg.items() if k != "metadata"}, cfg["metadata"], **weights),
        tmp_path / "run",
    )
    ((place, sae),) = run.saes.items()
    assert (place, sae.reads) == ("blocks.1.hook_mlp_out", "blocks.1.mlp.hook_in") and evaluate(run).positions[
        place
    ].l0 > 0
    refused(
        "did you mean 'blocks.1.mlp.hook_in'",
        home,
        lens(
            tmp_path / "unfolded",
            {k: v for k, v in cfg.items() if k != "metadata"},
            cfg["metadata"] | {"hook_name": "blocks.1.ln2.hook_normalized"},
            **weights,
        ),
        tmp_path / "no",
    )
    refused(
        "reads head 1 alone",
        home,
        lens(
            tmp_path / "head",
            {k: v for k, v in cfg.items() if k != "metadata"},
            cfg["metadata"] | {"hook_head_index_out": 1},
            **weights,
        ),
        tmp_path / "no",
    )
    with pytest.raises(UserError, match="this transcoder reads"):
        SuiteSAE(sae, place, "tiny")


def test_loading_without_a_run(home, tmp_path):
    "`load_saelens` finds the factor, too: the same SAE as the import's, and the same evaluation."
    folder = lens(
        tmp_path / "theirs", {"normalize_activations": "expected_average_only_in"}, scaler={"scaling_factor": FACTOR}
    )
    run, subject = imported(home, folder, tmp_path / "run"), load_subject(home / "gpt2", device="cpu")
    batches = list(data_for(run.config, subject, "eval"))[:3]
    assert evaluate_saes(subject, load_saelens(folder), batches).kl == evaluate(run, subject=subject).kl
