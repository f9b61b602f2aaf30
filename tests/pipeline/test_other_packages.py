"""An objective that another, installed package brings: chosen, checked, planned and built as one of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lightning_llm.settings import OPTIONS

ROOT = Path(__file__).parents[2]
SETTINGS = '''
from dataclasses import dataclass
from typing import ClassVar

from lightning_llm.objectives.config import PreferenceConfig
from lightning_llm.settings import option


@option("objective", "hinge")
@dataclass
class HingeConfig(PreferenceConfig):
    """Sequence likelihood calibration against a reference."""

    implementation: ClassVar[str] = "hinge.objective:Hinge"
    name: str = "hinge"
    margin: float = 1.0
'''
OBJECTIVE = """
from lightning_llm.objectives.dpo import Preference


class Hinge(Preference):
    def pair_losses(self, policy, reference):
        chosen, rejected = (self.config.beta * (p - r) for p, r in zip(policy, reference, strict=True))
        return (self.config.margin - (chosen - rejected)).clamp(min=0)
"""
YAML = "defaults: [/schema/objective@_here_: hinge, _self_]\nname: hinge\nmargin: 2.5\n"
BUILD = """
import sys
import torch
from lightning_llm import compose
from lightning_llm.models import ModelConfig, Transformer

swap = ["objective@stages.dpo.objective=hinge", "stages.dpo.objective.beta=0.5"]
settings = compose("qwen2", overrides=swap, config_dir=sys.argv[1]).stages["dpo"].objective
model = Transformer(ModelConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                num_attention_heads=2, num_key_value_heads=1))
policy, reference = (torch.tensor([3.0, 0.0]), torch.tensor([1.0, 4.0])), (torch.zeros(2), torch.zeros(2))
print(settings.build(model).pair_losses(policy, reference).tolist())
"""
FILES = {
    "hinge/__init__.py": "",
    "hinge/settings.py": SETTINGS,
    "hinge/objective.py": OBJECTIVE,
    "hinge-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: hinge\nVersion: 1.0\n",
    "hinge-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "hinge-1.0.dist-info/entry_points.txt": "[lightning_llm.settings]\nhinge = hinge.settings\n",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that pip has installed the package into, and the user's folder with the option's YAML."""
    place = tmp_path_factory.mktemp("other")
    wheel = place / "hinge-1.0-py3-none-any.whl"
    record = "".join(f"{name},,\n" for name in (*FILES, "hinge-1.0.dist-info/RECORD"))
    with zipfile.ZipFile(wheel, "w") as file:
        for name, text in (FILES | {"hinge-1.0.dist-info/RECORD": record}).items():
            file.writestr(name, text)
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--target", str(place / "site"))
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, str(wheel)], check=True)
    (place / "mine" / "objective").mkdir(parents=True)
    (place / "mine" / "objective" / "hinge.yaml").write_text(YAML)
    return place / "site", place / "mine"


def python(*words: str, path: tuple[Path, ...]) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)


def plan(*words: str, path: tuple[Path, ...]) -> subprocess.CompletedProcess:
    program = "import sys; from lightning_llm.cli import main; sys.exit(main())"
    return python("-c", program, "plan", "recipe=qwen2", "objective@stages.dpo.objective=hinge", *words, path=path)


def test_its_option_is_chosen_planned_and_checked(installed):
    site, mine = installed
    done = plan("--config-dir", str(mine), path=(site,))
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:3] for line in done.stdout.splitlines() if line.startswith("dpo ")] == [
        ["dpo", "hinge", "sft"]
    ]
    done = plan("--config-dir", str(mine), "stages.dpo.objective.marign=1", path=(site,))
    assert done.returncode == 2
    assert "marign is not a setting of hinge. The nearest is margin (number, default 1.0)" in done.stderr


def test_its_objective_is_built_from_the_settings(installed):
    site, mine = installed
    done = python("-c", BUILD, str(mine), path=(site,))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[1.5, 4.5]"  # 2.5 - 0.5 (3 - 1) and 2.5 - 0.5 (0 - 4)


def test_without_the_package_there_is_no_such_option(installed):
    assert ("objective", "hinge") not in OPTIONS
    done = plan("--config-dir", str(installed[1]), path=())
    assert done.returncode == 2
    assert "hinge" in done.stderr
    assert "Traceback" not in done.stderr
