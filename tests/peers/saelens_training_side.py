"""Runs in an environment with the real sae-lens: what its training modules compute, in training, from weights of this project.

`python saelens_training_side.py FOLDER`: FOLDER/weights.safetensors holds inputs `x` and, per architecture, weights NAME/PARAMETER under sae-lens'
names. Codes and outputs of the training forward pass go to FOLDER/training.safetensors.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file, save_file

FURTHER = {"topk": {"k": 4, "rescale_acts_by_decoder_norm": False}, "batchtopk": {"k": 4, "rescale_acts_by_decoder_norm": False},
           "matryoshka_batchtopk": {"k": 4, "rescale_acts_by_decoder_norm": False, "matryoshka_widths": [10, 20, 40]}}
folder = Path(sys.argv[1])
tensors, outputs = load_file(folder / "weights.safetensors"), {}
for kind in ("standard", "topk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "gated"):
    cls, config = get_sae_training_class(kind)
    sae = cls(config(d_in=12, d_sae=40, dtype="float32", apply_b_dec_to_input=False, **FURTHER.get(kind, {})))
    sae.load_state_dict({k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{kind}/")}, strict=False)
    step = sae.train().training_forward_pass(TrainStepInput(tensors["x"], {name: 1.0 for name in sae.get_coefficients()}, None, 0, False))
    acts = step.feature_acts
    outputs[f"{kind}.code"] = (acts.to_dense() if acts.is_sparse else acts).detach().contiguous()
    outputs[f"{kind}.output"] = step.sae_out.detach().contiguous()
save_file(outputs, folder / "training.safetensors", metadata={"sae-lens": version("sae-lens"), "torch": torch.__version__})
