"""Does memory grow with the data? Peak memory of reading, tokenizing and training's batches, for inputs of 0.2 and of 2 GB.

`python benchmarks/flat_memory.py` writes data/results/flat_memory.json (some twenty minutes on 2 cores, 7 GB of disk in the system's
temporary folder, all of it removed). Each figure is the peak resident memory of a process of its own that does one thing:
`stream` makes batches from a JSONL file, tokenizing as it goes; `tokenize` writes a Parquet file's tokens to shards; `shards` makes batches
from shards of that size, fully shuffled; `nothing` only imports. The words are long and few, which tokenizes quickly: bytes, documents and
rows are what could fill the memory, not the variety of words.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from e2e_sae_nb.core import Stopwatch, peak_memory_bytes, provenance, write_json

SIZES = tuple(float(word) for word in sys.argv[1:]) if "--" not in sys.argv else ()  # GB
OUT = Path(__file__).resolve().parent.parent / "data" / "results" / "flat_memory.json"
STAGES = ("nothing", "stream", "tokenize", "shards")
SETTINGS = {"words": 60, "word_letters": [150, 250], "words_per_document": [5, 100], "n_ctx": 1024, "batch_size": 16, "shuffle_buffer": 1000,
            "shard_tokens": 2**22, "row_group": 2000, "workers": 2}


def words() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("etaoinshrdlu", k=rng.randint(*SETTINGS["word_letters"]))) for _ in range(SETTINGS["words"])]


def make(folder: Path, gigabytes: float) -> None:
    "A JSONL file, a Parquet file and a folder of shards of that size, and a tokenizer."
    import pyarrow as pa
    import pyarrow.parquet as pq

    from e2e_sae_nb.corpus import train_tokenizer
    from e2e_sae_nb.shards import tokenizer_facts
    from e2e_sae_nb.tokenization import SideWriter

    rng, known, written = random.Random(1), words(), 0
    tokenizer = train_tokenizer([" ".join(known)] * 3, vocab_size=20_000)
    tokenizer.save_pretrained(folder / "tokenizer")
    low, high = SETTINGS["words_per_document"]
    schema = pa.schema([("text", pa.string())])
    with open(folder / "text.jsonl", "w", encoding="utf-8") as lines, pq.ParquetWriter(folder / "text.parquet", schema, compression="none", use_dictionary=False) as table:
        while written < gigabytes * 1e9:
            group = [" ".join(rng.choices(known, k=rng.randint(low, high))) for _ in range(SETTINGS["row_group"])]
            written += sum(lines.write(json.dumps({"text": text}) + "\n") for text in group)
            table.write_table(pa.table({"text": group}, schema))
    (folder / "shards").mkdir()
    side, numbers = SideWriter(folder / "shards", "train", SETTINGS["shard_tokens"], "uint16"), np.random.default_rng(0)
    for _ in range(int(gigabytes * 1e9 / 2 / SETTINGS["shard_tokens"])):
        side.add(numbers.integers(0, 500, SETTINGS["shard_tokens"], dtype=np.uint16))
    write_json(folder / "shards" / "shards.json", {"format_version": 1, "dtype": "uint16", "held_out_share": 0.02, "documents": {},
                                                   "tokenizer": tokenizer_facts(tokenizer), "sides": {"train": side.entries, "held_out": []}})


def stage(name: str, folder: Path) -> dict[str, float]:
    "Do one thing to the end, and say how much memory that took."
    from transformers import AutoTokenizer

    from e2e_sae_nb.data import open_stream
    from e2e_sae_nb.documents import DataConfig
    from e2e_sae_nb.prefetch import Prefetch
    from e2e_sae_nb.tokenization import write_shards

    torch.set_num_threads(1)
    tokenizer, clock, tokens = AutoTokenizer.from_pretrained(folder / "tokenizer"), Stopwatch(), 0
    source = {"stream": "text.jsonl", "tokenize": "text.parquet", "shards": "shards", "nothing": ""}[name]
    config = DataConfig(str(folder / source), n_ctx=SETTINGS["n_ctx"], shuffle_buffer=SETTINGS["shuffle_buffer"], workers=SETTINGS["workers"],
                        streaming=name != "shards", seed=0)
    if name == "tokenize":
        index = write_shards(config, folder / "written", tokenizer, SETTINGS["shard_tokens"])
        tokens = sum(entry["tokens"] for side in index["sides"].values() for entry in side)
    elif name != "nothing":
        stream = open_stream(config, batch_size=SETTINGS["batch_size"], tokenizer=tokenizer, repeat=False)
        tokens = sum(batch.numel() for batch in Prefetch(stream))
    return {"peak_bytes": peak_memory_bytes(torch.device("cpu")), "tokens": tokens, "seconds": float(clock)}


def main(sizes: tuple[float, ...]) -> None:
    clock, rows = Stopwatch(), []
    for gigabytes in sizes:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), gigabytes)
            size = {"stream": "text.jsonl", "tokenize": "text.parquet", "shards": "shards"}
            for name in STAGES:
                paths = [p for p in Path(folder, size.get(name, "none")).rglob("*.npy")] or [Path(folder, size[name])] if name in size else []
                done = subprocess.run([sys.executable, __file__, "--", name, folder], check=True, capture_output=True, text=True)
                rows.append({"stage": name, "input_bytes": sum(p.stat().st_size for p in paths), **json.loads(done.stdout.splitlines()[-1])})
                print(rows[-1], flush=True)
    peaks = {name: [row["peak_bytes"] for row in rows if row["stage"] == name] for name in STAGES}
    growth = {name: peak[-1] / peak[0] for name, peak in peaks.items()}
    print(growth)
    if sizes == (0.2, 2.0):
        write_json(OUT, {"rows": rows, "growth": growth, "provenance": provenance(SETTINGS, seed=0, seconds=float(clock), command="python benchmarks/flat_memory.py")})


if __name__ == "__main__":
    if "--" in sys.argv:
        print(json.dumps(stage(sys.argv[2], Path(sys.argv[3]))))
    else:
        main(SIZES or (0.2, 2.0))
