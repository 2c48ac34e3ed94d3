"""e2e_sae's own training step, taking turns: `worker_e2e_sae.py local|e2e|e2e+ds BATCH CONTEXT [CHECKOUT]`. Runs in an environment in which e2e_sae
can be imported (TransformerLens 2), or with the folder of a checkout.

Model, SAE, hooks and losses are e2e_sae's; the few lines between them follow its train loop (two passes, its loss function, Adam with torch's
defaults), without logging.
"""

import sys

from turns import take_over_stdout, wait_for_turn

take_over_stdout()
objective, batch, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
sys.path[1:1] = sys.argv[4:]

import torch  # noqa: E402
from e2e_sae.losses import LossConfigs, calc_loss  # noqa: E402
from e2e_sae.models.transformers import SAETransformer  # noqa: E402
from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: E402

torch.manual_seed(0)
PLACE, LATER = "blocks.6.hook_resid_pre", [f"blocks.{i}.hook_resid_pre" for i in range(7, 12)]
network = HookedTransformer(HookedTransformerConfig(
    n_layers=12, d_model=768, n_ctx=1024, d_head=64, n_heads=12, d_mlp=3072, d_vocab=50257, act_fn="gelu_new", normalization_type="LNPre"))
model = SAETransformer(network, [PLACE], 60, init_decoder_orthogonal=False)
model.tlens_model.requires_grad_(False)
with torch.no_grad():  # about 50 active latents, as in a trained SAE
    _, kept = model.forward_raw(torch.randint(50257, (1, context)), run_entire_model=False, final_layer=7)
    linear = model.saes[PLACE.replace(".", "-")].encoder[0]
    linear.bias.zero_()
    linear.bias.fill_(-float(linear(kept[PLACE].flatten(0, 1)).topk(50, dim=-1).values[:, -1].mean()))
terms = {"sparsity": {"coeff": 4.0}, "in_to_orig": None, "out_to_orig": None, "out_to_in": None, "logits_kl": None}
terms |= {"local": {"out_to_in": {"coeff": 1.0}}, "e2e": {"logits_kl": {"coeff": 1.0}},
          "e2e+ds": {"logits_kl": {"coeff": 0.5}, "in_to_orig": {"total_coeff": 2.5, "hook_positions": LATER}}}[objective]
loss, local, cached = LossConfigs(**terms), objective == "local", LATER if objective == "e2e+ds" else None
optimizer = torch.optim.Adam(model.saes.parameters(), lr=1e-5)
while True:
    wait_for_turn()
    tokens = torch.randint(50257, (batch, context))
    logits, acts = model.forward_raw(tokens, run_entire_model=not local, final_layer=7 if local else None, cache_positions=cached)
    new_logits, new_acts = model.forward(tokens, [PLACE], cached, orig_acts=acts if local else None)
    value, _ = calc_loss(acts, new_acts, None if local else logits.detach().clone(), new_logits, loss)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    value.item()
