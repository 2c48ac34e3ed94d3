"""`python -m e2e_sae_nb` is `e2e-sae`; torchrun needs a module: `torchrun --nproc-per-node 2 -m e2e_sae_nb train CONFIG.yaml`."""

from e2e_sae_nb.cli import main

if __name__ == "__main__":
    main()
