"""Prove the hook points of every family on a tiny random model: `python tools/families_table.py` (a minute)."""

from e2e_sae_nb.core import Stopwatch, provenance, repo_root, write_json
from e2e_sae_nb.families import FAMILIES, family_row


def main() -> None:
    "Write data/results/families.json."
    clock = Stopwatch()
    rows = {name: family_row(name) for name in FAMILIES}
    settings = {"families": {name: [kind, sizes] for name, (kind, sizes) in FAMILIES.items()}}
    record = provenance(settings, seed=0, seconds=float(clock), command="python tools/families_table.py")
    root = repo_root()
    assert root is not None
    write_json(root / "data" / "results" / "families.json", {"families": rows, "provenance": record})


if __name__ == "__main__":
    main()
