"""Time and memory of the vocabulary's loss and its gradients, by size; writes results/vocabulary.json.

    python benchmarks/vocabulary.py [8192 16384 .. 262144]

2,048 hidden states of width 256, one target each. Ours in both of its modes, against logits of all tokens at once,
torch's linear cross-entropy, and Liger's where its kernels run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import claims
import machine
from interleave import Refused, Task, interleaved, require_equal_losses

SIZES = [8192, 16_384, 32_768, 65_536, 131_072, 262_144]
TOKENS, WIDTH = 2048, 256
TASKS = {
    "ours": Task("ours", "vocabulary"),
    "ours_in_backward": Task("ours", "vocabulary", settings={"in_backward": True}),
    "dense": Task("in_torch", "dense"),
    "torch_fused": Task("in_torch", "fused"),
}
LIGER = Task("in_liger", "vocabulary", "liger")


def measure(size: int, folder: Path) -> dict[str, Any]:
    settings = {"vocabulary": size, "tokens": TOKENS, "width": WIDTH}
    tasks, refused = dict(TASKS), {}
    try:
        interleaved({"liger": LIGER}, {**settings, "vocabulary": 64}, folder, calls=2, warm_up=0)
        tasks["liger"] = LIGER
    except Refused as error:
        refused["liger"] = str(error).splitlines()[0]
    found = interleaved(tasks, settings, folder, calls=8 if size <= 32_768 else 3 if size <= 131_072 else 2, warm_up=1)
    others = [name for name in tasks if name != "ours"]
    judged = [
        claims.claim(
            f"V = {size:,}: times the speed of dense, median", found.ratios("ours", "dense")["median"], above=1
        ),
        claims.claim(
            f"V = {size:,}: times the speed of torch's, median", found.ratios("ours", "torch_fused")["median"], above=1
        ),
        claims.claim(f"V = {size:,}: share of dense's memory", found.memory_share("ours", "dense"), below=1),
        claims.claim(f"V = {size:,}: share of torch's memory", found.memory_share("ours", "torch_fused"), at_most=1),
    ]
    return {
        "machine": machine.describe(),
        "claims": judged,
        "losses": require_equal_losses(found),
        "gradient_norms": {name: answers[0]["gradients"] for name, answers in found.warm_up.items()},
        "workers": {name: found.figures(name) for name in found.calls},
        "ratios": {name: found.ratios("ours", name) for name in others},
        "refused": refused,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, metavar="size", help=", ".join(map(str, SIZES)))
    verdicts = []
    for size in parser.parse_args().sizes or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            verdicts.append(claims.write_part("vocabulary", str(size), measure(size, Path(folder))))
    claims.finish(verdicts)


if __name__ == "__main__":
    main()
