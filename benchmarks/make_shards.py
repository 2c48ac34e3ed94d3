"""The embedded network's corpus as token shards, for a machine that lacks the packages whose docstrings it is made of.

`python benchmarks/make_shards.py FOLDER` (some minutes if the corpus was never read on this machine; 14 MiB). A training configuration takes the
folder as train_data.dataset_name.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

from e2e_sae_nb.core import FORMAT_VERSION, data_path, provenance, write_json
from e2e_sae_nb.corpus import docstring_corpus
from e2e_sae_nb.shards import tokenizer_facts


def main(folder: Path) -> None:
    from transformers import AutoTokenizer

    network, sides = data_path("docstrings-lm"), {}
    corpus = docstring_corpus(network)
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("train", "held_out"):
        tokens = np.array(corpus.tokens(side), dtype=np.uint16)
        np.save(folder / f"{side}-00000.npy", tokens)
        sides[side] = [{"file": f"{side}-00000.npy", "tokens": len(tokens), "sha256": hashlib.sha256(tokens.data).hexdigest()}]
    count = {side: entries[0]["tokens"] for side, entries in sides.items()}
    write_json(folder / "shards.json", {
        "format_version": FORMAT_VERSION, "dtype": "uint16", "held_out_share": None, "documents": corpus.info["documents"], "sides": sides,
        "settings": {}, "tokenizer": tokenizer_facts(AutoTokenizer.from_pretrained(network)) | {"name": "docstrings"},
        "provenance": provenance({}, tokens=sum(count.values()))})
    print(", ".join(f"{n:,} tokens {side}" for side, n in count.items()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python benchmarks/make_shards.py FOLDER")
    main(Path(sys.argv[1]))
