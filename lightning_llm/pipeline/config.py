"""Settings of the pipeline: what a scale may say, and the tree that each verb of the command line is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_llm.data.config import SHORTEST_CONTEXT, SourceConfig, TokenizerConfig
from lightning_llm.evaluation.config import EvaluationConfig
from lightning_llm.generation.config import GenerationConfig
from lightning_llm.models.config import ModelConfig
from lightning_llm.settings import option, refuse_below
from lightning_llm.stages.config import ComputeConfig, GateConfig, StageConfig
from lightning_llm.training.config import LoggerConfig


@dataclass
class PhaseScale:
    """What a scale does to the stages of one phase. None keeps the recipe's own figure."""

    examples: float | None = None  # rows of a post-training stage; its epochs stay
    tokens: float | None = None  # of the phase's first stage; ratios to it are kept
    tokens_per_example: float | None = None  # mean cost of one, where the data mixture does not say it itself
    batch_tokens: float | None = None  # of the phase's first stage at its start; ratios to it are kept
    prompts: int | None = None  # of one optimizer step, where the policy answers them itself
    lr_factor: float = 1.0  # for peak and final alike
    gate: GateConfig = field(default_factory=GateConfig)  # what models of this size can pass, where a stage has a gate

    def __post_init__(self):
        refuse_below(1, self, "examples", "tokens", "tokens_per_example", "batch_tokens", "prompts")
        refuse_below(0, self, "lr_factor")


@dataclass
class EvaluationScale:
    """Sizes of the evaluation. None keeps what the evaluation says."""

    text_tokens: int | None = None
    long_documents: int | None = None
    questions: int | None = None
    preference_pairs: int | None = None
    max_new_tokens: int | None = None
    samples: int | None = None
    comparisons: int | None = None
    needle: dict[str, Any] = field(default_factory=dict)  # fields of evaluation.needle

    def __post_init__(self):
        refuse_below(0, self, "long_documents", "questions", "preference_pairs", "samples")
        refuse_below(1, self, "text_tokens", "max_new_tokens", "comparisons")


@dataclass
class GenerationScale:
    """What a scale does to the stages that generate, and to the length of what others sample. None keeps the recipe's
    own figure."""

    prompts: float | None = None
    per_prompt: int | None = None  # responses of each model to each prompt
    max_new_tokens: int | None = None
    tokens_per_prompt: float | None = None  # mean length of one, where the data does not say it itself

    def __post_init__(self):
        refuse_below(1, self, "prompts", "per_prompt", "max_new_tokens", "tokens_per_prompt")


@option("scale", "scale")
@dataclass
class ScaleConfig:
    """How large a recipe is run. None, and an empty entry, keep what the recipe says (pipeline/scaling.py)."""

    name: str = "???"
    shapes: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # role -> fields of the model; other fields are kept
    vocabulary: int | None = None  # of a tokenizer trained on the recipe's own text; none: the model's own tokenizer
    context: int | None = None  # the recipe's first context; all others keep their multiple of it
    pretraining_tokens: float | None = None  # of all pre-training stages together; their shares are kept
    minimum_share: float = 0.0  # of pretraining_tokens, for each pre-training stage after the first
    minimum_peak_share: float = 0.0  # of the highest learning rate of a phase, for the peak of each of its stages
    minimum_steps: int = 1  # optimizer steps of every stage, and of every segment of a ramp
    minimum_warmup_steps: int = 0  # where a stage warms up at all
    phases: dict[str, PhaseScale] = field(default_factory=dict)
    generation: GenerationScale = field(default_factory=GenerationScale)
    validation: float | None = None  # share of rows held out, of every source
    corpora: dict[str, SourceConfig] = field(default_factory=dict)  # source -> where from; without a path it is dropped
    evaluation: EvaluationScale = field(default_factory=EvaluationScale)

    def __post_init__(self):
        refuse_below(1, self, "vocabulary", "pretraining_tokens", "minimum_steps")
        refuse_below(0, self, "minimum_share", "minimum_peak_share", "minimum_warmup_steps", "validation")
        refuse_below(SHORTEST_CONTEXT, self, "context")
        if self.validation is not None and self.validation >= 1:
            raise ValueError(f"validation must be a share below 1, is {self.validation:g}")


@dataclass
class LimitsConfig:
    """What `run` refuses."""

    hours: float = 24.0  # estimated time of what is missing


@dataclass
class StoreConfig:
    """Where artifacts live; may be shared by any number of runs, recipes and people."""

    root: str = "artifacts"


@dataclass
class RecipeSettings:
    """What `run` and `plan` have in common."""

    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    stages: dict[str, StageConfig | None] = field(default_factory=dict)  # none: of a recipe that this one extends
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    logger: dict[str, LoggerConfig] = field(default_factory=dict)
    store: StoreConfig = field(default_factory=StoreConfig)


@option("verb", "run")
@dataclass
class RunSettings(RecipeSettings):
    """lightning-llm run"""

    until: str | None = None  # the last stage
    only: str | None = None  # the one stage; what it needs has to be there
    force: list[str] = field(default_factory=list)  # stages that are made again
    runs: str = "runs"  # the folder of run folders
    limits: LimitsConfig = field(default_factory=LimitsConfig)


@option("verb", "plan")
@dataclass
class PlanSettings(RecipeSettings):
    """lightning-llm plan"""

    format: str = "text"  # text | json
    until: str | None = None
    only: str | None = None


@option("verb", "report")
@dataclass
class ReportSettings:
    """lightning-llm report RUN..."""

    runs: list[str] = field(default_factory=list)  # run folders
    output: str = "report.html"


@option("verb", "store")
@dataclass
class StoreSettings:
    """lightning-llm store list|verify|remove [ARTIFACT...]"""

    action: str = "list"  # list | verify | remove
    names: list[str] = field(default_factory=list)  # artifacts' folders or keys; none: all (not for remove)
    runs: str = "runs"  # where to look for who refers to them
    force: bool = False  # remove also what a run refers to
    store: StoreConfig = field(default_factory=StoreConfig)


@dataclass
class ModelChoice:
    """`model=` of the verbs that take a finished model."""

    path: str = ""  # an artifact, a Hugging Face directory, or an artifact's name or key in the store


@dataclass
class SpeakSettings(GenerationConfig):
    """What `generate` and `chat` have in common."""

    model: ModelChoice = field(default_factory=ModelChoice)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    store: StoreConfig = field(default_factory=StoreConfig)


@option("verb", "generate")
@dataclass
class GenerateSettings(SpeakSettings):
    """lightning-llm generate model=... prompt="..." """

    prompt: list[str] = field(default_factory=list)  # on the command line one or several prompt=TEXT
    prompts: str | None = None  # a file: *.jsonl with `prompt` or `messages` in each row, else a prompt per line
    template: str = "auto"  # auto: conversations are rendered, texts continued | chat: texts are a user's turn | raw
    format: str = "text"  # text | jsonl
    batch_size: int = 16  # prompts computed together

    def __post_init__(self):
        super().__post_init__()
        refuse_below(1, self, "batch_size")


@option("verb", "chat")
@dataclass
class ChatSettings(SpeakSettings):
    """lightning-llm chat model=..."""

    max_new_tokens: int = 1024
