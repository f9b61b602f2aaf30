"""What it costs to merge models that lie in files: seconds, and memory beside the files. Writes results/merging.json.

    python benchmarks/merging.py

Each merge is a process of its own, on one core. In turns with it the same files are only read and as much is written:
that is what the disk takes. Before either the system forgets the files, and behind both what is written is on the disk.
The models are random.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import claims
import figures
import machine
import torch

from lightning_llm.merging.config import DareConfig, LinearConfig, MergeConfig, SlerpConfig, TiesConfig
from lightning_llm.models import ModelConfig, Transformer
from lightning_llm.models.shards import Shards, write_shards

RESULT = claims.RESULTS / "merging.json"
MODEL = ModelConfig(
    name="merged", family="llama", vocab_size=32_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=7,
    num_attention_heads=16, num_key_value_heads=16, attention_bias=False, tie_word_embeddings=True,
)  # fmt: skip
METHODS: dict[str, MergeConfig] = {
    "linear": LinearConfig(), "slerp": SlerpConfig(), "ties": TiesConfig(), "dare": DareConfig(),
}  # fmt: skip
TRIALS = [(name, count) for name in METHODS for count in (2, 3)]
ROUNDS = 3
PIECE = 2**20  # bytes that are read at a time
INTERVAL = 0.002  # seconds between two looks at the memory


def anonymous() -> int:
    """Bytes of this process that lie in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def merge(method: str, folder: Path, count: int) -> dict[str, float]:
    """Merge in this process: seconds, those of the disk alone, and by how much its memory rose at most."""
    torch.set_num_threads(1)
    config = METHODS[method]
    places = [folder / str(number) for number in range(0 if config.needs_start else 1, count + 1)]
    before = peak = anonymous()
    is_over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(INTERVAL):
            peak = max(peak, anonymous())

    def timed(work: Callable[[Path], None]) -> float:
        forget(places)
        with tempfile.TemporaryDirectory(dir=folder) as output:
            begin = time.perf_counter()
            work(Path(output))
            for file in Path(output).iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            return time.perf_counter() - begin

    def merging(output: Path) -> None:
        shards = [Shards(place) for place in places]
        states = shards[-count:]
        write_shards(output, config.build(states, shards[0] if config.needs_start else None, seed=0), states[0])

    seconds: dict[str, list[float]] = {"disk": [], "merge": []}
    for _ in range(ROUNDS):
        seconds["disk"].append(timed(lambda output: copy(places, output)))
        watcher = threading.Thread(target=watch)
        is_over.clear()
        watcher.start()
        seconds["merge"].append(timed(merging))
        is_over.set()
        watcher.join()
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": found["merge"], "disk_seconds": found["disk"], "bytes": peak - before}


def forget(places: Sequence[Path]) -> None:
    """Have the system drop what it keeps of the models' files in memory."""
    for file in (file for place in places for file in place.glob("*.safetensors")):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(places: Sequence[Path], output: Path) -> None:
    """Read all models, and write the last."""
    buffer = memoryview(bytearray(PIECE))
    for place in places:
        is_last = place == places[-1]
        for file in place.glob("*.safetensors"):
            with file.open("rb", buffering=0) as source, (output / file.name).open("wb", buffering=0) as target:
                while size := source.readinto(buffer):
                    if is_last:
                        target.write(buffer[:size])


def measure(folder: Path) -> dict[str, Any]:
    """All methods, of two models and of three."""
    for number in range(max(count for _, count in TRIALS) + 1):
        model = Transformer(MODEL)
        model.reset_parameters(number)
        model.save_pretrained(folder / str(number), eos_token_ids=[1])
    os.sync()  # else nothing of them can be forgotten
    shards = Shards(folder / "0")
    sizes = [4 * torch.Size(shards.shape_of(name)).numel() for name in shards]
    found = []
    for name, count in TRIALS:
        words = [sys.executable, __file__, "--merge", name, str(count), str(folder)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        found.append({"method": name, "models": count, **json.loads(done.stdout)})
        print(found[-1], flush=True)
    largest = max(sizes)
    worst = max(each["bytes"] / (each["models"] * largest) for each in found)
    slowest = max(each["seconds"] / each["disk_seconds"] for each in found)
    says = "A merge needs memory for one tensor of each model (share of the largest one of each), worst"
    return {
        "machine": machine.describe(),
        "claims": [
            claims.claim(says, worst, at_most=1.0),
            claims.claim(
                "Seconds of a merge over those of its files' way from and to the disk, worst", slowest, at_most=2.0
            ),
        ],
        "model_bytes": sum(sizes),
        "largest_tensor_bytes": largest,
        "merges": found,
    }


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of the table of methods."""
    rows: list[Sequence[str]] = []
    for each in result["merges"]:
        tensors = f"{each['bytes'] / result['largest_tensor_bytes']:.2f}"
        files = each["models"] + METHODS[each["method"]].needs_start + 1  # read, and the one that is written
        moved = files * result["model_bytes"] / each["seconds"]
        memory = f"{each['bytes'] / 1e6:,.0f} MB"
        method = f"`{each['method']}`"
        disk = f"{each['disk_seconds']:.1f}"
        share = f"{each['seconds'] / each['disk_seconds']:.2f}"
        speed = f"{moved / 1e9:.1f} GB/s"
        rows.append([method, str(each["models"]), f"{each['seconds']:.1f}", speed, disk, share, memory, tensors])
    head = ["method", "models", "seconds", "read once and written", "disk alone", "ratio"]
    head += ["memory beside the files", "in largest tensors"]
    return figures.lines_of_table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merge", nargs=3, metavar=("METHOD", "MODELS", "FOLDER"), help=argparse.SUPPRESS)
    if asked := parser.parse_args().merge:
        method, count, folder = asked
        print(json.dumps(merge(method, Path(folder), int(count))))
        return
    with tempfile.TemporaryDirectory() as place:
        result = measure(Path(place))
    claims.write(RESULT, result)
    print("\n".join(table(result)))
    claims.finish([claims.say(result["claims"])])


if __name__ == "__main__":
    main()
