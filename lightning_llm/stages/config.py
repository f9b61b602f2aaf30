"""Settings of the stages: what a recipe's `stages.<name>` may say, and what each verb is handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from lightning_llm.data.config import STAGE, DataConfig, TokenizerConfig
from lightning_llm.evaluation.config import EvaluationConfig, JudgeConfig
from lightning_llm.generation.config import SamplingConfig
from lightning_llm.merging.config import MergeConfig
from lightning_llm.models.config import MIXTURE_FIELDS, SIZES, ModelConfig, PruneConfig
from lightning_llm.objectives.config import ObjectiveConfig, PolicyConfig
from lightning_llm.optimization.config import LearningRateConfig, OptimizerConfig
from lightning_llm.settings import came_later, option, refuse_below
from lightning_llm.training.config import AveragingConfig, RolloutConfig

MODELS = ("train", "merge", "prune", "upcycle")  # kinds of stages that leave a model
MERGING = "optimizer.online_merging."  # in front of `base` and `reference`
INSERTED = (
    "prepare",
    "reference",
    "teacher",
    "evaluate",
    "gate",
    "tokenizer",
    "evaluation",
)  # nodes beside a stage's own


@dataclass(frozen=True)
class Edge:
    """What a stage is made from, by the setting that says so."""

    setting: str  # below the stage's own name, as "starts_from" or "data.sources.best.path"
    source: str  # a stage, or where `may_leave` the folder of a model
    kinds: tuple[str, ...]  # of stages that it may lead to
    may_leave: bool = False


@dataclass
class StageConfig:
    """One entry of `stages`: what all kinds have in common. An option of conf/stage/ chooses the kind."""

    reads: ClassVar[tuple[str, ...]] = ()  # kinds of stages that `data` may name, where it names stages

    kind: str = "???"  # the verb's file in stages/

    def edges(self) -> list[Edge]:
        """All that the stage is made from: models, then rows."""
        found = []
        for setting in ("starts_from", "learns_from", "models", "judged_by"):
            named = getattr(self, setting, None) or []
            names = [named] if isinstance(named, str) else named
            found += [Edge(setting, name, MODELS, may_leave=True) for name in names]
        data = getattr(self, "data", None)
        if isinstance(data, list):
            found += [Edge("data", name, self.reads) for name in data]
        if isinstance(data, DataConfig):  # rows of another stage among its sources
            paths = {name: source.path or "" for name, source in data.sources.items()}
            found += [
                Edge(f"data.sources.{name}.path", path.removeprefix(STAGE), ("select",))
                for name, path in paths.items()
                if path.startswith(STAGE)
            ]
        return found

    def redirected(self, target: Callable[[Edge], str | None]) -> StageConfig:
        """The same stage with edges that lead elsewhere.

        Args:
            target: where an edge leads; None: the edge goes.
        """
        changes: dict[str, Any] = {}
        for edge in self.edges():
            source = target(edge)
            if edge.setting.startswith("data.sources."):
                data: DataConfig = changes.get("data", self.data)  # pyright: ignore[reportAttributeAccessIssue]
                name = edge.setting.removeprefix("data.sources.").removesuffix(".path")
                sources = {other: config for other, config in data.sources.items() if other != name or source}
                if source:
                    sources[name] = replace(sources[name], path=STAGE + source)
                changes["data"] = replace(data, sources=sources)
            elif edge.setting.startswith(MERGING):
                optimizer: OptimizerConfig = changes.get("optimizer", self.optimizer)  # pyright: ignore[reportAttributeAccessIssue]
                role = edge.setting.removeprefix(MERGING)
                merging = replace(optimizer.online_merging, **{role: source})
                changes["optimizer"] = replace(optimizer, online_merging=merging)
            elif isinstance(getattr(self, edge.setting), list):
                changes.setdefault(edge.setting, [])
                changes[edge.setting] += [source] if source is not None else []
            else:
                changes[edge.setting] = source
        return replace(self, **changes)


@option("stage", "rounds")
@dataclass
class RoundsStage(StageConfig):
    """A part of the recipe that is repeated (pipeline/rounds.py). Llama 3: six rounds of post-training (4.1.6)."""

    kind: str = "rounds"
    rounds: int = 2
    stages: dict[str, StageConfig] = field(default_factory=dict)
    by_round: dict[str, Any] = field(default_factory=dict)  # stage -> setting -> a list with its value in each round
    begins_with: dict[str, str] = field(default_factory=dict)  # what previous_round.<stage> is in the first round

    def __post_init__(self):
        refuse_below(1, self, "rounds")


@dataclass
class GateConfig:
    """What a stage's evaluation has to show before a run goes on (stages/gate.py). None: it is not asked."""

    # share by which perplexity at the recipe's first context may have risen since before the first gated stage in a row
    short_context: float | None = None
    needle: float | None = None  # share of needles that are found, at each length up to the stage's context

    def __post_init__(self):
        refuse_below(0, self, "needle")
        if self.needle is not None and self.needle > 1:
            raise ValueError(f"needle is a share, at most 1, is {self.needle:g}")

    @property
    def is_on(self) -> bool:
        """Whether anything is asked."""
        return self.short_context is not None or self.needle is not None


@option("stage", "train")
@dataclass
class TrainStage(StageConfig):
    """A training run: objective x data x schedule. Figures are the report's; `scaled` maps them."""

    kind: str = "train"
    phase: str = "pretrain"  # one of pipeline/mappings.py:PHASES: whose figures in the scale apply
    starts_from: str | None = None  # a stage, an artifact's path or a Hugging Face directory; none: random weights
    learns_from: str | None = None  # a teacher, named alike, for an objective that has one
    model: ModelConfig | None = None  # of random weights, where they are of another shape than the recipe's model
    tokens: float | None = None  # exactly one of tokens, examples, steps
    examples: float | None = None  # rows (conversations, pairs, prompts); become tokens by data.tokens_per_example
    steps: float | None = None
    epochs: float = 1.0  # passes over `examples`
    context: Any = 4096  # tokens, or a ramp [{at: <tokens>, value: ...}]; none: as long as where the stage starts from
    batch_tokens: Any = None  # tokens of one optimizer step, or a ramp
    rope_theta: float | None = None  # the RoPE base from this stage on; none: as before
    rope_scaling: Any = None  # from this stage on, as {rope_type: linear | llama3 | yarn, factor: ..., ...}
    evaluate_every: float | None = None  # tokens between validation losses; none: a tenth of the stage
    lr: LearningRateConfig = field(default_factory=LearningRateConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluate: bool = True
    # added to the recipe's seed: runs that begin as one model and differ in the order of their data, in what a rollout
    # samples and in what online merging drops (WARM, WARP)
    seed_offset: int = 0
    rollout: RolloutConfig | None = None  # learn from what the policy itself says to the prompts of `data`
    judge: JudgeConfig | None = None  # what its responses are worth
    judged_by: list[str] = field(default_factory=list)  # reward models: stages, artifacts or directories
    averaging: AveragingConfig = field(default_factory=AveragingConfig)  # its model is a mean of the weights on its way
    gate: GateConfig = field(default_factory=GateConfig)  # what a run goes on for, as Llama 3 to the next context
    optional: bool = False  # left out of the recipe where no other stage is made from it, as judged_by: [<this>]

    @property
    def passes(self) -> float:
        """Optimizer steps that learn from an example."""
        return self.epochs * (self.rollout.epochs if self.rollout else 1)

    def edges(self) -> list[Edge]:
        """Also the models whose difference each step is merged with."""
        merging = self.optimizer.online_merging
        found = {"base": merging.base, "reference": merging.reference} if merging.is_on else {}
        named = {role: model for role, model in found.items() if model is not None}
        return super().edges() + [Edge(MERGING + role, model, MODELS, may_leave=True) for role, model in named.items()]


@option("stage", "merge")
@dataclass
class MergeStage(StageConfig):
    """One model of several. Llama 3: after every step of post-training (4.1.5); Gemma 2: after each phase."""

    kind: str = "merge"
    models: list[str] = field(default_factory=list)  # stages, artifacts or Hugging Face directories
    starts_from: str | None = None  # where they all began: what they have learnt since is merged, if the method asks
    method: MergeConfig = field(default_factory=MergeConfig)
    evaluate: bool = True


@option("stage", "prune")
@dataclass
class PruneStage(StageConfig):
    """A smaller model of one: the parts that matter most. AFM-on-device: 6.4 billion parameters become 2.7."""

    kind: str = "prune"
    starts_from: str | None = None  # a stage, an artifact's path or a Hugging Face directory
    method: PruneConfig = field(default_factory=PruneConfig)
    # hidden units that stay in each layer; none: all, or what masks were learnt for
    intermediate_size: int | None = None
    num_key_value_heads: int | None = None  # with the query heads that share them
    hidden_size: int | None = None  # channels of the stream between layers
    num_hidden_layers: int | None = None
    data: DataConfig = field(default_factory=DataConfig)  # what flows through the model, for a method that measures it
    tokens: float = 131_072  # of it
    context: int = 4096
    evaluate: bool = True

    def __post_init__(self):
        refuse_below(1, self, *SIZES, "tokens", "context")

    @property
    def sizes(self) -> dict[str, int]:
        """What is made smaller."""
        return {name: size for name in SIZES if (size := getattr(self, name)) is not None}


@option("stage", "upcycle")
@dataclass
class UpcycleStage(StageConfig):
    """A mixture of experts of a dense model. Qwen2-57B-A14B: from the 7B (section 2.2.2)."""

    kind: str = "upcycle"
    starts_from: str | None = None  # a stage, an artifact's path or a Hugging Face directory
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_intermediate_size: int | None = None  # none: the dense feed-forward's, as of shared_expert_intermediate_size
    shared_expert_intermediate_size: int | None = None
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = 0.001
    experts: str = "slices"  # slices (of shuffled feed-forwards) | copies (each is the whole feed-forward)
    reinitialised: float = 0.5  # share of the parameters of routed slices that is drawn anew
    of: str = "entries"  # entries (each by itself) | units (whole hidden units)
    keeps_scale: bool = True  # what the experts add is as large in the mean as what the feed-forward added
    evaluate: bool = True

    def __post_init__(self):
        refuse_below(1, self, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
        refuse_below(1, self, "shared_expert_intermediate_size")
        refuse_below(0, self, "router_aux_loss_coef", "reinitialised")
        if self.reinitialised > 1:
            raise ValueError(f"reinitialised is a share in [0, 1], is {self.reinitialised:g}")

    @property
    def mixture(self) -> dict[str, Any]:
        """Fields of the model's configuration that it gives."""
        return {name: getattr(self, name) for name in MIXTURE_FIELDS}


ENGINES = ("own", "vllm")  # of a stage that generates


@option("stage", "generate")
@dataclass
class GenerateStage(StageConfig):
    """Responses of one model or of a committee to prompts. Llama 3: 10 to 30 of the latest best model (4.2.2)."""

    kind: str = "generate"
    models: list[str] = field(default_factory=list)  # stages, artifacts or Hugging Face directories
    data: DataConfig = field(default_factory=DataConfig)  # questions or prompts; rows that are held out are not asked
    prompts: float = 1000  # so many of them, drawn by the seed; all, where there are fewer
    per_prompt: int = 8  # responses of each model to each prompt
    max_new_tokens: int = 512  # a response is cut after so many
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    round: int = 0  # prompts of the rounds before are passed over; unrolling sets it
    stop: list[str] = came_later([])  # strings that end a response and are left out of its text
    engine: str = came_later("own")  # own | vllm; the latter on a GPU, with the extra of that name

    def __post_init__(self):
        refuse_below(1, self, "prompts", "per_prompt", "max_new_tokens")
        refuse_below(0, self, "round")
        if "" in self.stop:
            raise ValueError("stop: an empty string would end every response before it begins")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, is {self.engine}")
        if self.engine == "vllm" and self.stop:
            raise ValueError("stop is our own engine's: leave engine at own, or end responses by tokens")
        if self.per_prompt > 1 and (sure := self.sampling.sure_by):
            raise ValueError(f"{sure}: all responses of a model to a prompt would be the same")


@option("stage", "judge")
@dataclass
class JudgeStage(StageConfig):
    """A verdict on every response that other stages have sampled."""

    reads: ClassVar[tuple[str, ...]] = ("generate",)

    kind: str = "judge"
    data: list[str] = field(default_factory=list)  # stages that generate
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    judged_by: list[str] = field(default_factory=list)  # reward models: stages, artifacts or directories


@option("stage", "select")
@dataclass
class SelectStage(StageConfig):
    """Rows to learn from, out of judged responses. Llama 3: the best of K by the reward model (4.2.2)."""

    reads: ClassVar[tuple[str, ...]] = ("judge", "generate")

    kind: str = "select"
    data: list[str] = field(default_factory=list)  # stages that judge; for the controls stages that generate will do
    rule: str = "best"  # best | threshold (all from minimum_score on) | first, random (controls: nobody is asked)
    form: str = "conversations"  # conversations | pairs: the best against the worst of each prompt
    minimum_score: float | None = None  # a response below it is not kept
    per_prompt: int = 1  # responses that are kept of a prompt, at most; of different text
    keep: float = 1.0  # share of the rows that stay
    balance: str = "none"  # none | difficulty: what stays is drawn from hard and easy prompts alike
    # a response of this score is right; the share of right ones is a prompt's difficulty; what only ranks has neither
    right_from: float = 0.5
    bins: int = 4  # of difficulty

    def __post_init__(self):
        refuse_below(1, self, "per_prompt", "bins")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is a share in (0, 1], is {self.keep:g}")


@option("compute", "compute")
@dataclass
class ComputeConfig:
    """Devices, precision, kernels and how ranks start, together. None of it changes a result or a key but precision."""

    name: str = "cpu"
    accelerator: str = "cpu"  # cpu | gpu
    devices: int = 1
    strategy: str = "single"  # single | ddp
    precision: str = "fp32"  # fp32 | bf16 (fp32 weights and optimizer state, bf16 products)
    attention: str = "auto"  # auto (the fastest for documents of unlike length) | sdpa | varlen | flex | flash
    compile: bool = False  # feed-forward and norms (lightning_llm/models/compilation.py); gains little on a CPU
    activation_checkpointing: str = (
        "none"  # none | full (each layer runs once more backwards: up to a third more FLOPs)
    )
    micro_batch_tokens: int = 16_384  # of one forward and backward pass on one device
    threads: int | None = None  # of one process; none: torch's default
    flops_per_second: float = (
        2e11  # of one device at its best, dense, in this precision: what utilisation is a share of
    )
    efficiency: float = 0.4  # the share of it that estimates of time count on
    generation_efficiency: float = 0.05  # the same of responses, which come a token at a time
    memory_gib: float = 16.0  # of one device

    def __post_init__(self):
        refuse_below(1, self, "threads")
        for name in ("efficiency", "generation_efficiency"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is a share of flops_per_second, at most 1, is {getattr(self, name):g}")


# ---- what the verbs are handed (section "Verbs" of docs/architecture.md); all of it enters the stage's key ----


@dataclass
class TokenizerSettings:
    """kind prepare: train a tokenizer, or copy a given one."""

    tokenizer: TokenizerConfig
    source: str  # "train", or the directory or hub name
    seed: int
    validation: float = 0.0  # share of rows held out: merges are not learnt from them


@dataclass
class PrepareSettings:
    """kind prepare: rows of every source into token stores, split into training and held-out rows."""

    data: DataConfig
    contexts: list[int]  # all the contexts that the stage will use
    splits: list[str]  # of "train", "validation"
    seed: int


@dataclass
class ScoreSettings:
    """kind score: per-token log-probabilities of every row under a frozen model."""

    context: int
    split: list[str]
    precision: str
    on_long: str = "drop"  # as in the data that the scores are for: a truncated prompt gives other scores


@dataclass
class TeacherSettings(ScoreSettings):
    """kind score: what a teacher expects in the place of every token that a stage consumes."""

    data: DataConfig = field(default_factory=DataConfig)  # the stage's mixture, with what decides how much it consumes
    contexts: list[int] = field(default_factory=list)
    tokens: int = 0
    seed: int = 0
    k: int = 1  # ids that are kept of each token
    stored_as: str | None = None  # of their log-probabilities: float16 | uint8; None: the ids alone
    temperature: float = 1.0


@dataclass
class TrainSettings:
    """kind train: everything that decides the trained weights. Tokens, batch and schedule are resolved."""

    model: ModelConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    data: DataConfig
    lr: LearningRateConfig  # peak, final, warmup_tokens resolved
    tokens: int
    context: list[dict[str, Any]]  # a ramp [{at: tokens, value: tokens}], at least one entry
    batch_tokens: list[dict[str, Any]]
    rope_theta: float | None
    precision: str
    seed: int
    rope_scaling: dict[str, Any] | None = came_later(None)
    rollout: RolloutConfig | None = came_later(None)
    judge: JudgeConfig | None = came_later(None)
    averaging: AveragingConfig | None = came_later(None)  # none: its model is what the last step leaves
    # what draws new parameters, where it is not `seed`: runs of other `seed_offset` begin as one model
    seed_of_parameters: int | None = came_later(None)

    @property
    def draws_by(self) -> int:
        """The seed of all that is drawn anew for the stage's model: random weights, heads, scores of masks."""
        return self.seed if self.seed_of_parameters is None else self.seed_of_parameters

    @property
    def draws_otherwise(self) -> str | None:
        """A line where a policy gradient learns from responses that are not drawn from the policy itself."""
        if self.rollout is None or not isinstance(self.objective, PolicyConfig):
            return None
        if self.rollout.sampling.draws_from_model:
            return None
        return (
            "rollout.sampling cuts off or has another temperature: the gradient is not exactly that of the mean reward"
        )


@dataclass
class GenerateSettings:
    """kind generate: everything that decides the responses."""

    models: list[str]  # as the tables call them; they are the inputs model.0, model.1, ...
    weights: dict[str, float]  # source -> share of the prompts
    prompts: int
    round: int  # whose turn it is in the seed's order of prompts
    per_prompt: int
    max_new_tokens: int
    sampling: SamplingConfig
    precision: str
    seed: int
    stop: list[str] = came_later([])
    engine: str = came_later("own")


@dataclass
class MergeSettings:
    """kind merge: how; of what is told by the inputs `model.0` and so on, and `starts_from`."""

    method: MergeConfig
    seed: int  # 0 where nothing is drawn


@dataclass
class PruneSettings:
    """kind prune: what of the parent stays. What it measures on is in the input `data`, if it measures."""

    method: PruneConfig
    intermediate_size: int | None
    num_key_value_heads: int | None
    hidden_size: int | None
    num_hidden_layers: int | None
    data: DataConfig
    tokens: int  # 0 where nothing is measured, as the next three
    context: int
    precision: str
    seed: int

    @property
    def sizes(self) -> dict[str, int | None]:
        """What is made smaller."""
        return {name: getattr(self, name) for name in SIZES}


@dataclass
class UpcycleSettings:
    """kind upcycle: all of `UpcycleStage` but its edge."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int | None
    shared_expert_intermediate_size: int | None
    norm_topk_prob: bool
    router_aux_loss_coef: float
    experts: str
    reinitialised: float
    of: str
    keeps_scale: bool
    seed: int

    @property
    def mixture(self) -> dict[str, Any]:
        """Fields of the model's configuration that it gives."""
        return {name: getattr(self, name) for name in MIXTURE_FIELDS}


@dataclass
class JudgeSettings:
    """kind judge: what decides a verdict beside the samples and the reward models."""

    judge: JudgeConfig
    precision: str
    seed: int


@dataclass
class SelectSettings:
    """kind select: all of `SelectStage` but its edges."""

    rule: str
    form: str
    minimum_score: float | None
    per_prompt: int
    keep: float
    balance: str
    right_from: float | None  # none: no score says that a response is right
    bins: int
    seed: int


@dataclass
class EvaluateSettings:
    """kind evaluate."""

    evaluation: EvaluationConfig
    context: int  # the recipe's first context: perplexities of all stages are comparable
    full_context: int  # the context of the evaluated stage
    preference_mode: str  # "implicit_reward" (against starts_from) or "likelihood" (length-normalised)
    precision: str
    seed: int


@dataclass
class GateSettings:
    """kind gate: all of `GateConfig`."""

    short_context: float | None
    needle: float | None


@dataclass
class EvaluateRewardsSettings:
    """kind evaluate, of a reward model: on what its own data holds out."""

    comparisons: int  # of all sources together, at most
    context: int
    on_long: str
    precision: str
