"""Supervised fine-tuning against TRL's SFTTrainer, unpacked; writes results/sft.json.

python benchmarks/sft.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import claims
import post_training as common
import workload


def main() -> None:
    rows = workload.conversations(common.CALLS + common.WARM_UP)
    with tempfile.TemporaryDirectory() as folder:
        found = common.measure("sft", {"conversations": rows}, Path(folder))
    ratio = found.ratios("ours", "trl")["median"]
    judged = [
        claims.claim("SFT: times TRL's rate, unpacked, median", ratio, at_least=1.7),
        claims.claim("SFT: the aim", ratio, at_least=2.0),
        claims.claim("SFT: share of TRL's peak memory", found.memory_share("ours", "trl"), at_most=0.5),
    ]
    claims.finish([claims.write_part("sft", "unpacked", common.report(found, judged))])


if __name__ == "__main__":
    main()
