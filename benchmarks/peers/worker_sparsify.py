"""eai-sparsify's own trainer, taking turns: `worker_sparsify.py kl|fvu BATCH CONTEXT STEPS`. Runs in an environment that has eai-sparsify.

Its `Trainer.fit` is run as it is, on GPT-2 small with random weights, TopK 50, Adam; the turn is taken where it fetches the next batch. Its
coder switches bfloat16 autocast on for CUDA only; here the whole of it runs under CPU autocast, which is faster.
"""

import sys
import tempfile

from turns import take_over_stdout, wait_for_turn

take_over_stdout()

import torch  # noqa: E402
from sparsify import SaeConfig, TrainConfig, Trainer  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

loss, batch, context, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()


class Tokens(torch.utils.data.Dataset):
    "Random tokens; the first row of a batch is where a step begins."

    def __len__(self) -> int:
        return batch * steps

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        if row % batch == 0:
            wait_for_turn()
        return {"input_ids": torch.randint(50257, (context,), generator=torch.Generator().manual_seed(row))}


config = TrainConfig(SaeConfig(num_latents=46080, k=50), batch_size=batch, loss_fn=loss, optimizer="adam", lr=1e-5, hookpoints=["h.5"],
                     log_to_wandb=False, save_every=10**9)
with tempfile.TemporaryDirectory() as folder, torch.autocast("cpu", torch.bfloat16):
    config.save_dir = folder  # it saves once at the end, whatever it is told
    Trainer(config, Tokens(), model).fit()
    wait_for_turn()
