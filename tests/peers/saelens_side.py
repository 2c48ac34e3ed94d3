"""Runs in an environment with the real sae-lens: reads SAEs we exported, writes SAEs of its own, and says what each computes.

`python saelens_side.py FOLDER`: FOLDER/x.safetensors holds inputs, FOLDER/ours/NAME the SAEs exported by this project. Results go to
FOLDER/theirs/NAME (SAEs made and saved by sae-lens) and FOLDER/outputs.safetensors (encodings and reconstructions of all).
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
x, outputs = load_file(folder / "x.safetensors")["x"], {}


def note(name: str, sae) -> None:
    with torch.no_grad():
        code = sae.encode(x)
        outputs[f"{name}.code"], outputs[f"{name}.output"] = code.to_dense() if code.is_sparse else code, sae(x)


for path in sorted((folder / "ours").glob("*/*/cfg.json")):
    note(f"ours/{path.parent.parent.name}", SAE.load_from_disk(path.parent))

g = torch.Generator().manual_seed(1)
for kind, further in (("standard", {}), ("standard", {"apply_b_dec_to_input": True}), ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
                      ("jumprelu", {"apply_b_dec_to_input": True}), ("gated", {"apply_b_dec_to_input": True})):
    cls, config = get_sae_class(kind)
    cfg = config(**{"d_in": 12, "d_sae": 40, "dtype": "float32", "apply_b_dec_to_input": False, **further})
    cfg.metadata.hook_name, cfg.metadata.model_name = "blocks.1.hook_resid_pre", "tiny"
    sae = cls(cfg)
    for name, p in sae.named_parameters():
        p.data = torch.randn(p.shape, generator=g) * (0.3 if name in ("threshold", "r_mag") else 1.0)
        if name == "threshold":
            p.data = p.data.abs()
    name = f"{kind}_{len(further)}"
    sae.save_model(folder / "theirs" / name)
    note(f"theirs/{name}", SAE.load_from_disk(folder / "theirs" / name))
save_file({k: v.contiguous() for k, v in outputs.items()}, folder / "outputs.safetensors", metadata={"sae-lens": version("sae-lens"), "torch": torch.__version__})
