"""Runs in an environment with the real sae-lens: trains SAEs for a few steps and saves checkpoints in the middle.

`python saelens_checkpoint_side.py FOLDER`: FOLDER/x.safetensors holds inputs. Checkpoints, as sae-lens' trainer writes
them, go to FOLDER/checkpoints/NAME; what the same SAEs compute once sae-lens has folded the activations' factor into
them and saved them for use, to FOLDER/checkpoints.safetensors. FOLDER/positions.json says how sae-lens reads the
positions that FOLDER/ours/NAME (exported by this project) excludes.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

folder, D, LATENTS = Path(sys.argv[1]), 12, 40
x, outputs = load_file(folder / "x.safetensors")["x"], {}
TOPK = {"k": 4, "rescale_acts_by_decoder_norm": True}
MATRYOSHKA = TOPK | {"matryoshka_widths": [10, 20, 40]}
KINDS = {
    "standard": {},
    "standard_b_dec": {"apply_b_dec_to_input": True},
    "topk": TOPK,
    "jumprelu": {},
    "gated": {"apply_b_dec_to_input": True},
    "batchtopk": TOPK,
    "batchtopk_plain": TOPK | {"rescale_acts_by_decoder_norm": False},
    "matryoshka_batchtopk": MATRYOSHKA,
    "unscaled": {"normalize_activations": "none"},
}


def batches():
    g = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(64, D, generator=g) * 3


for name, further in KINDS.items():
    torch.manual_seed(0)
    kind = {"unscaled": "standard", "standard_b_dec": "standard", "batchtopk_plain": "batchtopk"}.get(name, name)
    cls, config = get_sae_training_class(kind)
    cfg = config(
        **{
            "d_in": D,
            "d_sae": LATENTS,
            "dtype": "float32",
            "apply_b_dec_to_input": False,
            "normalize_activations": "expected_average_only_in",
            **further,
        }
    )
    cfg.metadata.hook_name, cfg.metadata.model_name, cfg.metadata.model_class_name = (
        "model.layers.1",
        "tiny",
        "AutoModelForCausalLM",
    )
    cfg.metadata.seqpos_slice, cfg.metadata.exclude_special_tokens, cfg.metadata.context_size = (1, None), True, 16
    sae = cls(cfg)
    settings = {
        key: value
        for key, value in {
            "n_checkpoints": 0,
            "checkpoint_path": None,
            "save_final_checkpoint": False,
            "total_training_samples": 64 * 40,
            "device": "cpu",
            "autocast": False,
            "lr": 1e-2,
            "lr_end": 1e-3,
            "lr_scheduler_name": "constant",
            "lr_warm_up_steps": 0,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "lr_decay_steps": 0,
            "n_restart_cycles": 1,
            "train_batch_size_samples": 64,
            "dead_feature_window": 100,
            "feature_sampling_window": 100,
            "n_batches_for_norm_estimate": 10,
            "logger": LoggingConfig(log_to_wandb=False),
        }.items()
        if key in SAETrainerConfig.__dataclass_fields__
    }
    trainer = SAETrainer(SAETrainerConfig(**settings), sae, batches())
    kept = {}

    def keep(*args, trainer=trainer, name=name, **kwargs):
        "At the end, before anything is folded in."
        trainer.save_checkpoint(name, base_path=folder / "checkpoints")
        kept["factor"] = trainer.activation_scaler.scaling_factor

    trainer.set_final_sae_metadata, fold = (lambda: None), sae.fold_activation_norm_scaling_factor
    sae.fold_activation_norm_scaling_factor = lambda factor: (keep(), fold(factor))
    trainer.fit()
    if name == "unscaled":
        keep()
    assert (kept["factor"] is None) == (name == "unscaled")
    sae.save_inference_model(folder / "final" / name)
    final = SAE.load_from_disk(folder / "final" / name)
    with torch.no_grad():
        code = final.encode(x)
        outputs[f"{name}.code"], outputs[f"{name}.output"] = code.to_dense() if code.is_sparse else code, final(x)
        outputs[f"{name}.norms"] = final.W_dec.norm(dim=-1)
save_file(
    {k: v.contiguous() for k, v in outputs.items()},
    folder / "checkpoints.safetensors",
    metadata={"sae-lens": version("sae-lens"), "torch": torch.__version__},
)
positions = {}
for path in sorted((folder / "ours").glob("*/*/cfg.json")):
    metadata = SAE.load_from_disk(path.parent).cfg.metadata
    positions[path.parent.parent.name] = [
        list(range(8))[slice(*metadata.seqpos_slice)],
        metadata.exclude_special_tokens,
        metadata.prepend_bos,
    ]
(folder / "positions.json").write_text(json.dumps(positions))
