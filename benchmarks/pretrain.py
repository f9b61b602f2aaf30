"""Pre-training steps against LitGPT's model and transformers', call by call; writes results/pretrain.json.

    python benchmarks/pretrain.py [--calls 20]

A Llama of 6.5M parameters in float32, one thread each, the same weights and data, fused AdamW and clipping everywhere.
Needs the peers' environments: make bench-peers.
"""

from __future__ import annotations

from pathlib import Path

import comparison
import llama
from comparison import Measured, claim
from interleave import Task, interleaved, require_equal_losses

from lightning_llm.models.size import attended_pairs, training_flops


def measure(folder: Path, calls: int) -> Measured:
    model = llama.write_model(folder / "model", seed=0)
    common = {"model": model, "learning_rate": 1e-4}
    count = calls + comparison.WARM_UP
    rows = interleaved(
        {
            "ours": Task("ours", "pretrain"),
            "ours with Lightning": Task("ours", "pretrain_with_lightning"),
            "litgpt": Task("in_litgpt", "pretrain", "litgpt"),
            "transformers": Task("in_transformers", "pretrain", "transformers"),
            "limit": Task("ours", "limit"),
        },
        {**common, "documents": llama.full_rows(count), "products": llama.products(4 * 512)},
        folder,
        calls=calls,
    )
    require_equal_losses(rows)
    better = min(("litgpt", "transformers"), key=lambda peer: rows.ratios("ours", peer)["median"])
    ratio = rows.ratios("ours", better)
    rate = {name: rows.figures(name)["cpu_seconds"]["median"] for name in ("ours", "limit")}
    flops = training_flops(llama.CONFIG, 4 * 512, 4 * attended_pairs(512))
    limit = rows.calls["limit"][0]["flops"] / rate["limit"]
    lightning = 1 / rows.ratios("ours with Lightning", "ours")["median"]

    mixed = interleaved(
        {"ours": Task("ours", "pretrain"), "transformers": Task("in_transformers", "pretrain", "transformers")},
        {**common, "documents": llama.mixed_documents(count)},
        folder,
        calls=calls,
    )
    require_equal_losses(mixed)
    claims = [
        claim(f"Full rows: CPU-seconds of the better peer ({better}) over ours", ratio["median"], at_least=1.05),
        claim("The same, lower quartile", ratio["lower_quartile"], at_least=1.0),
        claim("Share of the machine's rate of matrix products", flops / rate["ours"] / limit, at_least=0.55),
        claim("Documents of 32 to 512 tokens: transformers, padded, over ours", mixed.ratios("ours", "transformers")
              ["median"], at_least=1.5),
        claim("Lightning's loop over our own bare one, CPU-seconds", lightning, at_most=1.03),
    ]  # fmt: skip
    return {"full rows": comparison.figures(rows), "mixed documents": comparison.figures(mixed)}, claims


if __name__ == "__main__":
    comparison.main("pretrain", str(__doc__), measure)
