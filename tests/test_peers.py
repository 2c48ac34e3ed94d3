"""Against the real sae-lens: in its own environment (make test-full), and a stored sample of what it computed (make test).

`python tests/test_peers.py PYTHON` renews the sample with an interpreter that has sae-lens, and data/results/saelens.json, which page 50 shows.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from e2e_sae_nb.architectures import ARCHITECTURES, BatchTopK, Gated, TopK
from e2e_sae_nb.core import provenance, write_json
from e2e_sae_nb.runs import Run, RunConfig
from e2e_sae_nb.saelens import export_saelens, load_saelens, network_of, to_saelens

HERE = Path(__file__).resolve().parent
SAMPLE, CHECKPOINTS = HERE / "golden" / "saelens", HERE / "golden" / "saelens_checkpoints"
PLACE = "blocks.1.hook_resid_pre"
OURS = (*ARCHITECTURES, "relu_transcoder", "jumprelu_transcoder", "batchtopk_transcoder")


def made(name):
    "One of our SAEs, with every number that matters away from its default."
    g = torch.Generator().manual_seed(5)
    kind, _, transcoder = name.partition("_")
    further = {"reads": "blocks.1.mlp.hook_in", "d_out": 7} if transcoder else {}
    sae = ARCHITECTURES[kind](12, 40, seed=3, **further, **({"k": 4} if issubclass(ARCHITECTURES[kind], TopK) else {})).eval()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, 40)[:, None])
        sae.input_scale.fill_(0.5)
        if isinstance(sae, BatchTopK):
            sae.cut.fill_(0.2)
        if isinstance(sae, Gated):
            sae.r_mag.normal_(0, 0.3, generator=g)
            sae.b_mag.normal_(0, 0.3, generator=g)
        if kind == "jumprelu":
            sae.log_threshold.normal_(-1, 0.5, generator=g)
    return sae


def prepare(folder: Path) -> None:
    "Inputs, and our SAEs in sae-lens' format."
    for name in OURS:
        cfg, weights = to_saelens(made(name), PLACE, model_name="tiny")
        target = folder / "ours" / name / PLACE
        target.mkdir(parents=True, exist_ok=True)
        save_file(weights, target / "sae_weights.safetensors")
        write_json(target / "cfg.json", cfg)
    save_file({"x": torch.randn(30, 12, generator=torch.Generator().manual_seed(0))}, folder / "x.safetensors")


def check(folder: Path) -> dict[str, float]:
    "The largest difference of each SAE's code and reconstruction, relative to the largest value."
    x, outputs, worst = load_file(folder / "x.safetensors")["x"], load_file(folder / "outputs.safetensors"), {}
    names = {key.rpartition(".")[0] for key in outputs}
    assert names == {f"ours/{n}" for n in OURS} | {f"theirs/{n}" for n in ("standard_0", "standard_1", "topk_2", "jumprelu_1", "gated_1")}
    for name in sorted(names):
        side, _, kind = name.partition("/")
        sae = made(kind) if side == "ours" else load_saelens(folder / name)[PLACE]
        with torch.no_grad():
            code, output = sae.encode(x), sae(x).output
        theirs = outputs[f"{name}.code"]
        if side == "ours":
            code = code / sae.input_scale  # folded away at export
        else:
            code = code / load_file(folder / name / "sae_weights.safetensors")["W_dec"].norm(dim=-1)  # our codes are in units of unit rows
            if kind.startswith("topk"):
                theirs = theirs / load_file(folder / name / "sae_weights.safetensors")["W_dec"].norm(dim=-1)
        assert (theirs > 0).any()
        worst[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in ((code, theirs), (output, outputs[f"{name}.output"])))
    return worst


def theirs(python: str, folder: Path) -> None:
    done = subprocess.run([python, str(HERE / "peers" / "saelens_side.py"), str(folder)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


TRAINED = {"relu": "standard", "topk": "topk", "batchtopk": "batchtopk", "matryoshka": "matryoshka_batchtopk", "jumprelu": "jumprelu", "gated": "gated"}


def check_training(python: str, folder: Path) -> dict[str, float]:
    "The largest relative differences between training forward passes with the same weights; Matryoshka with the whole dictionary drawn."
    x, worst = torch.randn(30, 12, generator=torch.Generator().manual_seed(0)), {}
    tensors = {"x": x}
    for ours, kind in TRAINED.items():
        sae = made(ours)
        weights = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.dictionary, "b_dec": sae.b_dec}
        if ours == "jumprelu":
            weights["threshold"] = sae.threshold
        if ours == "gated":
            weights |= {"b_gate": weights.pop("b_enc"), "b_mag": sae.b_mag, "r_mag": sae.r_mag}
        tensors |= {f"{kind}/{key}": value.detach().contiguous() for key, value in weights.items()}
    save_file(tensors, folder / "weights.safetensors")
    subprocess.run([python, str(HERE / "peers" / "saelens_training_side.py"), str(folder)], check=True, timeout=600)
    found = load_file(folder / "training.safetensors")
    for ours, kind in TRAINED.items():
        sae = made(ours).train()
        sae.input_scale.fill_(1.0)
        sae.prefixes = (1.0,)
        with torch.no_grad():
            acts = sae(x)
        pairs = (acts.c, found[f"{kind}.code"]), (acts.output, found[f"{kind}.output"])
        worst[ours] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return worst


# first position, special tokens
EXCLUDED = {"none": (False, False), "first": (True, False), "special": (False, True), "both": (True, True)}


def prepare_checkpoints(folder: Path) -> None:
    "Larger inputs, and exported runs that exclude positions."
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"x": 3 * torch.randn(30, 12, generator=torch.Generator().manual_seed(0))}, folder / "x.safetensors")
    for name, (first, special) in EXCLUDED.items():
        config = RunConfig.from_dict({
            "tlens_model_name": "tiny", "lr": 1e-3, "batch_size": 8, "n_samples": 8,
            "loss": {"sparsity": {"coeff": 1.0}, "out_to_in": {"coeff": 1.0}},
            "saes": {"sae_positions": PLACE}, "train_data": {"dataset_name": "text.jsonl", "n_ctx": 8, "add_bos": True},
            "exclude_first_position": first, "exclude_special_tokens": special})
        export_saelens(Run(None, config, {PLACE: made("relu")}), folder / "ours" / name)


def check_checkpoints(folder: Path) -> dict[str, float]:
    "Checkpoints of unfinished trainings, read here, against what sae-lens made of them; and who excludes which positions."
    x, theirs, worst = load_file(folder / "x.safetensors")["x"], load_file(folder / "checkpoints.safetensors"), {}
    for path in sorted((folder / "checkpoints").glob("*/cfg.json")):
        name, cfg = path.parent.name, json.loads(path.read_text())
        ((place, sae),) = load_saelens(path.parent).items()
        assert place == "blocks.1.hook_resid_post" and (theirs[f"{name}.code"] > 0).any()
        assert (cfg["normalize_activations"] == "none") == (name == "unscaled")
        network = network_of(cfg)
        assert network["exclude_first_position"] and network["exclude_special_tokens"]
        assert network["train_data"]["n_ctx"] == 16
        with torch.no_grad():
            code = theirs[f"{name}.code"] * theirs[f"{name}.norms"]
            pairs = (sae.encode(x), code), (sae(x).output, theirs[f"{name}.output"])
        worst[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    positions = json.loads((folder / "positions.json").read_text())
    expected = {name: [list(range(int(first), 8)), special, True] for name, (first, special) in EXCLUDED.items()}
    assert positions == expected
    return worst


def their_checkpoints(python: str, folder: Path) -> None:
    prepare_checkpoints(folder)
    side = str(HERE / "peers" / "saelens_checkpoint_side.py")
    done = subprocess.run([python, side, str(folder)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_stored_checkpoints():
    "Nine that the real package wrote before it folded the activations' factor into them."
    found = check_checkpoints(CHECKPOINTS)
    assert set(found) == {"standard", "standard_b_dec", "topk", "jumprelu", "gated", "batchtopk", "batchtopk_plain",
                          "matryoshka_batchtopk", "unscaled"}
    assert max(found.values()) < 1e-6


def test_stored_sample():
    "What the real package computed, for SAEs of ours and of its own."
    assert max(check(SAMPLE).values()) < 1e-6
    with safe_open(SAMPLE / "outputs.safetensors", "pt") as file:
        assert file.metadata()["sae-lens"].startswith("6.")


@pytest.mark.full
def test_real_package(tmp_path):
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    install = [python, "-m", "pip", "install", "-q", f"torch=={torch.__version__.partition('+')[0]}", "sae-lens"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    prepare(tmp_path)
    theirs(str(python), tmp_path)
    assert max(check(tmp_path).values()) < 1e-6
    assert max(check_training(str(python), tmp_path).values()) < 1e-6
    their_checkpoints(str(python), tmp_path / "middle")
    assert max(check_checkpoints(tmp_path / "middle").values()) < 1e-6


if __name__ == "__main__":
    record = provenance({"peer": "sae-lens", "tokens": 30, "d_in": 12, "d_sae": 40}, seed=5, command="python tests/test_peers.py PYTHON")
    shutil.rmtree(SAMPLE, ignore_errors=True)
    prepare(SAMPLE)
    theirs(sys.argv[1], SAMPLE)
    found = check(SAMPLE)
    shutil.rmtree(CHECKPOINTS, ignore_errors=True)
    their_checkpoints(sys.argv[1], CHECKPOINTS)
    states = [*CHECKPOINTS.glob("*/*/trainer_state.pt"), *CHECKPOINTS.glob("*/*/sparsity.safetensors")]
    for left in (CHECKPOINTS / "final", CHECKPOINTS / "ours", *states):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    with tempfile.TemporaryDirectory() as folder:
        training = check_training(sys.argv[1], Path(folder))
    with safe_open(SAMPLE / "outputs.safetensors", "pt") as file:
        peer = file.metadata()
    worst = {f"{side}_{way}": {name.partition("/")[2]: value for name, value in found.items() if name.startswith(side)}
             for side, way in (("ours", "read_there"), ("theirs", "read_here"))}
    worst |= {"training_forward": training, "checkpoints_read_here": check_checkpoints(CHECKPOINTS)}
    write_json(HERE.parent / "data" / "results" / "saelens.json", {"largest_relative_difference": worst, "peer_versions": peer, "provenance": record})
    print(f"largest relative difference {max(value for part in worst.values() for value in part.values()):.1e}")
