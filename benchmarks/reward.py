"""A reward model against TRL's RewardTrainer; writes results/reward.json.

    python benchmarks/reward.py

Prompts of 64 to 256 tokens, responses of 16 to 128. Ours computes a prompt once for both of its responses.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import claims
import post_training as common
import workload


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "pairs": workload.pairs(common.CALLS + common.WARM_UP),
            "model": workload.save_reward_model(Path(folder) / "reward_model", seed=0),
        }
        found = common.measure("reward", settings, Path(folder))
    judged = [
        claims.claim(
            "Reward model: times TRL's pairs per CPU-second, median",
            found.ratios("ours", "trl")["median"],
            at_least=1.7,
        ),
        claims.claim("Reward model: share of TRL's peak memory", found.memory_share("ours", "trl"), at_most=0.6),
    ]
    claims.finish([claims.write_part("reward", "pairs", common.report(found, judged))])


if __name__ == "__main__":
    main()
