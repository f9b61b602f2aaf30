"""Direct preference optimisation against TRL's DPOTrainer; writes results/dpo.json.

    python benchmarks/dpo.py [online precomputed]

Prompts of 64 to 256 tokens, responses of 16 to 128. Both ask the reference in each step, or both have asked it before.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import claims
import post_training as common
import workload

PARTS = {"online": (False, 3.0), "precomputed": (True, 2.5)}  # the reference's log-probabilities; times TRL's rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    verdicts = []
    for name in parser.parse_args().parts or PARTS:
        precomputed, bound = PARTS[name]
        settings = {
            "pairs": workload.pairs(common.CALLS + common.WARM_UP),
            "beta": 0.1,
            "precomputed": precomputed,
        }
        with tempfile.TemporaryDirectory() as folder:
            found = common.measure("dpo", settings, Path(folder))
        ratio = found.ratios("ours", "trl")["median"]
        judged = [
            claims.claim(f"DPO, reference {name}: times TRL's pairs per CPU-second, median", ratio, at_least=bound),
            claims.claim(
                f"DPO, reference {name}: share of TRL's peak memory", found.memory_share("ours", "trl"), at_most=0.4
            ),
        ]
        verdicts.append(claims.write_part("dpo", name, common.report(found, judged)))
    claims.finish(verdicts)


if __name__ == "__main__":
    main()
