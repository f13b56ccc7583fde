"""The notebooks' parameters: names, types and limits, checked before anything runs, all mistakes at once.

Defaults are the paper's (Table B.1) where the paper has a value; a notebook's parameters cell repeats them, and a
file in `params/` holds only what differs.
"""

import ast
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from scaled_ql import defaults, documents
from scaled_ql.defaults import Embedding, Head, Heads, Parts, Rewards
from scaled_ql.environments import MAX_STEPS

Encoder = Literal[tuple(defaults.ENCODERS)]
VITS = [name for name, (family, *_) in defaults.ENCODERS.items() if family == "vit"]
_SIZES = {"cql": defaults.ENCODERS, "bc": defaults.ENCODERS, "mae": VITS}
_SIZES |= {"dt": defaults.TRANSFORMERS, "bc_transformer": defaults.TRANSFORMERS}
System = Literal[tuple(f"{method} {size}" for method, sizes in _SIZES.items() for size in sizes)]
TorchEncoder = Literal[tuple(name for name, (family, *_) in defaults.ENCODERS.items() if family != "impala")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0)]


def _alpha(value: Any) -> float | str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "paper" or (number and 0 <= value < float("inf")):
        return value
    raise ValueError(f"alpha: expected a number >= 0 or the word paper, got {value!r}")


def _target_return(value: Any) -> float | str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value in ("notebook", "paper", "data") or (number and abs(value) < float("inf")):
        return value
    raise ValueError(f"target_return: expected notebook, paper, data or a number, got {value!r}")


class ParameterError(ValueError):
    """Invalid parameters of a notebook; the message lists every mistake."""


class Parameters(pydantic.BaseModel):
    """Parameters of every notebook."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    run: Name = "default"  # name of the run: its folder below outputs/<notebook>/
    outputs: str = ""  # folder that holds the runs; "" is outputs/ of the workspace


class Walkthrough(Parameters):
    """`00_walkthrough`; defaults that differ from the paper are the quickstart's."""

    num_transitions: Count = 5_000
    seed: Seed = 0
    steps_before_reward: Annotated[int, Field(ge=0)] = 4
    encoder: Encoder = "nature_narrow"
    hidden_sizes: Annotated[list[Count], Field(min_length=1)] = [256, 256]
    v_min: float = -3.0
    v_max: float = 3.0
    num_atoms: Annotated[int, Field(ge=2)] = defaults.NUM_ATOMS
    n_step: Count = 10
    discount: Share = 0.97
    alpha: Annotated[float, Field(ge=0)] = 0.05
    learning_rate: Annotated[float, Field(gt=0)] = 1.0e-3
    adam_epsilon: Annotated[float, Field(gt=0)] = 1.0e-8
    target_update_period: Count = 200
    batch_size: Count = 32
    num_steps: Count = 400

    @pydantic.model_validator(mode="after")
    def _support_is_not_empty(self) -> "Walkthrough":
        if self.v_min >= self.v_max:
            raise ValueError(f"v_min ({self.v_min}) must be below v_max ({self.v_max})")
        return self


class DataCollection(Parameters):
    """`01_data_collection`."""

    player: Literal["scripted", "two_minds", "checkpoints"] = "scripted"
    agents: str = ""
    games: Annotated[list[str], Field(min_length=1)] = ["Breakout", "Freeway", "Pong"]
    num_transitions: Count = 20_000
    seed: Seed = 0
    final_epsilon: Annotated[float, Field(le=1)] = -1.0
    sticky_actions: Share = 0.25
    max_steps: Count = MAX_STEPS
    processes: Count = 2
    export: bool = False

    @property
    def last_epsilon(self) -> float:
        """Final share of random moves; a negative `final_epsilon` selects the player's default."""
        usual = {"scripted": 0.1, "two_minds": 0.2, "checkpoints": 0.01}
        return self.final_epsilon if self.final_epsilon >= 0 else usual[self.player]

    @pydantic.model_validator(mode="after")
    def _agents_play(self) -> "DataCollection":
        if self.player == "checkpoints" and not self.agents:
            raise ValueError("agents: missing; player 'checkpoints' needs a folder of trained agents")
        if self.agents and self.player != "checkpoints":
            raise ValueError(
                f"agents: without effect with player {self.player!r}; set player to checkpoints, or leave out"
            )
        return self


class OnlineAgents(Parameters):
    """`02_online_agents`; `online.agents` lists how the defaults differ from Dopamine's C51."""

    games: Annotated[list[str], Field(min_length=1)] = ["Breakout", "Freeway", "Pong"]
    num_transitions: Count = 200_000
    seed: Seed = 0
    sticky_actions: Share = 0.25
    max_steps: Count = MAX_STEPS
    mode: Annotated[int, Field(ge=-1)] = -1
    difficulty: Annotated[int, Field(ge=-1)] = -1
    environments: Count = 32
    num_threads: Annotated[int, Field(ge=0)] = 0
    export: bool = False

    learner: Literal["independent", "multi_task"] = "independent"
    head: Head = "c51"
    encoder: Encoder = "nature"
    hidden_sizes: Annotated[list[Count], Field(min_length=1)] = [512]
    dtype: Literal["float32", "bfloat16"] = "float32"
    v_max: Annotated[float, Field(gt=0)] = 10.0
    num_atoms: Annotated[int, Field(ge=2)] = defaults.NUM_ATOMS
    narrow_start: bool = False
    n_step: Count = 1
    discount: Share = 0.99
    double_q: bool = False
    learning_rate: Annotated[float, Field(gt=0)] = 2.5e-4
    adam_epsilon: Annotated[float, Field(gt=0)] = defaults.ADAM_EPSILON
    batch_size: Count = 32
    update_period: Count = 4
    target_update_period: Count = defaults.TARGET_UPDATE_PERIOD
    min_history: Count = 20_000
    final_epsilon: Share = 0.01
    epsilon_decay: Count = 250_000
    capacity: Count = 1_000_000
    compressed: bool = False
    checkpoint_every: Count = 10_000
    keep_checkpoint_every: Count = 1_000_000
    tensorboard: bool = False
    eval_episodes: Annotated[int, Field(ge=0)] = 10


class DataExploration(Parameters):
    """`03_data_exploration`."""

    dataset: str = "01_data_collection/default/replay"
    view: str = ""
    game: str = ""
    episode: int = -1
    frames_shown: Count = 8
    seed: Seed = 0


# Parameters of training runs that affect neither learning nor evaluation, and the seed.
INCIDENTAL = frozenset((
    "run", "outputs", "seed", "replay_storage", "sampling_processes", "log_every", "checkpoint_every",
    "keep_checkpoint_every", "tensorboard", "eval_every", "video_steps", "probe_moments", "num_devices", "distributed",
    "shard_parameters", "accumulate", "remat", "steps_per_dispatch", "deterministic",
))  # fmt: skip
# Refused if set for a method that ignores them; alpha, tau and kappa may be set in a file that several methods share.
CHECKED = (
    "head", "double_q", "scale_rewards", "dr3", "attention_temperature", "attention_entropy", "rewards", "transformer",
    "tokenizer", "sequence_length", "return_low", "return_high", "target_return", "return_kappa", "return_samples",
    "return_temperature", "action_percentile",
)  # fmt: skip


class ScaledTraining(Parameters):
    """`04_scaled_training`."""

    dataset: str = "01_data_collection/default/replay"
    view: str = ""
    replay_storage: Literal["auto", "disk", "memory", "device"] = "auto"
    sampling_processes: Annotated[int, Field(ge=0)] = 0
    num_devices: Annotated[int, Field(ge=0)] = 0
    distributed: bool = False
    shard_parameters: bool = False
    accumulate: Count = 1
    remat: bool = False
    steps_per_dispatch: Count = 1
    deterministic: bool = False
    seed: Seed = 0

    method: Literal[tuple(defaults.METHODS)] = "cql"
    encoder: Encoder = "resnet101"
    head: Head = "c51"
    heads: Heads = "per_game"
    hidden_sizes: Annotated[list[Count], Field(min_length=1)] = list(defaults.HIDDEN_SIZES)
    embedding: Embedding = "pointwise"
    normalize_features: bool = True
    group_size: Count = defaults.GROUP_SIZE
    subtract_mean_frames: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    transformer: Literal[tuple(defaults.TRANSFORMERS)] = "40M"
    tokenizer: Literal[("patches", *defaults.ENCODERS)] = "patches"
    sequence_length: Count = 4
    return_low: int = defaults.RETURN_LOW
    return_high: int = defaults.RETURN_HIGH
    target_return: Annotated[Any, pydantic.PlainValidator(_target_return)] = "notebook"
    return_kappa: Annotated[float, Field(ge=0)] = defaults.RETURN_KAPPA
    return_samples: Count = defaults.RETURN_SAMPLES
    return_temperature: Positive = defaults.RETURN_TEMPERATURE
    action_percentile: Annotated[float, Field(ge=0, lt=100)] = defaults.ACTION_PERCENTILE

    v_min: float = defaults.V_MIN
    v_max: float = defaults.V_MAX
    num_atoms: Annotated[int, Field(ge=2)] = defaults.NUM_ATOMS
    narrow_start: bool = False
    rewards: Rewards = "real"
    n_step: Count = 3
    discount: Share = 0.99
    alpha: Annotated[Any, pydantic.PlainValidator(_alpha)] = "paper"
    double_q: bool = False
    tau: Share = defaults.TAU
    kappa: Annotated[float, Field(ge=0)] = defaults.KAPPA
    scale_rewards: Literal["auto", "yes", "no"] = "auto"
    dr3: Annotated[float, Field(ge=0)] = 0.0
    attention_temperature: Annotated[float, Field(ge=0)] = 0.0
    attention_entropy: Share = defaults.ATTENTION_ENTROPY
    random_shift: Annotated[int, Field(ge=0, le=42)] = 0
    optimizer: Literal["adam", "lamb"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = defaults.LEARNING_RATE
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_learning_rate: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 0.0
    adam_epsilon: Annotated[float, Field(gt=0)] = defaults.ADAM_EPSILON
    target_update_period: Count = defaults.TARGET_UPDATE_PERIOD
    games_per_batch: Count = 128
    transitions_per_game: Count = 4

    num_steps: Count = 10_000_000
    log_every: Count = 1_000
    checkpoint_every: Count = 10_000
    keep_checkpoint_every: Count = 1_000_000
    tensorboard: bool = False

    eval_episodes: Count = 10
    eval_min_steps: Annotated[int, Field(ge=0)] = 0
    eval_every: Annotated[int, Field(ge=0)] = 0
    eval_epsilon: Share = defaults.EVAL_EPSILON
    eval_sticky_actions: Share = 0.0
    eval_max_steps: Count = MAX_STEPS
    eval_seed: Seed = 0
    video_steps: Annotated[int, Field(ge=0)] = 900

    @pydantic.model_validator(mode="after")
    def _periods_fit(self) -> "ScaledTraining":
        if self.v_min >= self.v_max:
            raise ValueError(f"v_min ({self.v_min}) must be below v_max ({self.v_max})")
        if self.return_low >= self.return_high:
            raise ValueError(f"return_low ({self.return_low}) must be below return_high ({self.return_high})")
        if self.eval_every % self.log_every:
            raise ValueError(f"eval_every ({self.eval_every}) must be a multiple of log_every ({self.log_every})")
        idle = [
            name
            for name in CHECKED
            if name not in defaults.METHODS[self.method][1]
            and getattr(self, name) != type(self).model_fields[name].default
        ]
        if idle:
            raise ValueError(f"{', '.join(idle)}: without effect in method {self.method!r}; leave out")
        if self.target_return == "data" and self.rewards != "real":
            raise ValueError(
                f"target_return: data has real returns, rewards are {self.rewards}; choose notebook or paper"
            )
        if self.method == "mae" and self.encoder not in VITS:
            raise ValueError(f"encoder ({self.encoder!r}): method 'mae' needs one of {', '.join(VITS)}")
        if self.attention_temperature and self.encoder not in VITS:
            raise ValueError(f"attention_temperature: {self.encoder!r} has no attention; choose {', '.join(VITS)} or 0")
        if self.method == "cpc" and self.sequence_length < 2:
            raise ValueError("sequence_length (1): method 'cpc' needs at least 2, a frame and its successor")
        if self.warmup_steps >= self.num_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below num_steps ({self.num_steps})")
        return self


class Transfer(Parameters):
    """`06_transfer`; offline as in appendix B.4. `online.yaml` has what differs online, Dopamine's C51 but for B.4."""

    initial: str = "04_scaled_training/default"
    built_like: str = "04_scaled_training/default"
    parts: Parts = "encoder + embedding"
    freeze: bool = False
    setting: Literal["offline", "online"] = "offline"
    game: str = "Alien"
    mode: Annotated[int, Field(ge=-1)] = -1
    difficulty: Annotated[int, Field(ge=-1)] = -1
    seed: Seed = 0

    v_min: float = defaults.V_MIN
    v_max: float = defaults.V_MAX
    narrow_start: bool = False
    n_step: Count = 3
    discount: Share = 0.99
    learning_rate: Annotated[float, Field(gt=0)] = 5.0e-5
    decay_learning_rate: bool = False
    adam_epsilon: Annotated[float, Field(gt=0)] = defaults.ADAM_EPSILON
    target_update_period: Count = defaults.TARGET_UPDATE_PERIOD
    batch_size: Count = 32
    checkpoint_every: Count = 10_000
    tensorboard: bool = False
    deterministic: bool = False

    dataset: str = "01_data_collection/default/replay"
    view: str = ""
    alpha: Annotated[Any, pydantic.PlainValidator(_alpha)] = "paper"
    num_steps: Count = 300_000
    log_every: Count = 1_000
    steps_per_dispatch: Count = 1

    num_transitions: Count = 750_000
    sticky_actions: Share = 0.25
    max_steps: Count = MAX_STEPS
    environments: Count = 16
    num_threads: Annotated[int, Field(ge=0)] = 0
    min_history: Count = 20_000
    update_period: Count = 4
    final_epsilon: Share = 0.01
    epsilon_decay: Count = 250_000
    capacity: Count = 1_000_000
    compressed: bool = False

    eval_episodes: Count = 10
    eval_min_steps: Annotated[int, Field(ge=0)] = 0
    eval_every: Annotated[int, Field(ge=0)] = 0
    eval_epsilon: Share = defaults.EVAL_EPSILON
    eval_sticky_actions: Share = 0.0
    eval_max_steps: Count = MAX_STEPS
    eval_seed: Seed = 0
    video_steps: Annotated[int, Field(ge=0)] = 900
    probe_moments: Annotated[int, Field(ge=0)] = 2_000

    @property
    def variant(self) -> dict[str, int | None]:
        """Mode and difficulty as the environments take them: None is the default."""
        return {name: value if (value := getattr(self, name)) >= 0 else None for name in ("mode", "difficulty")}

    @property
    def updates(self) -> int:
        """Gradient steps in all: online, one for every `update_period` transitions after the first `min_history`."""
        online = max(1, (self.num_transitions - self.min_history) // self.update_period)
        return self.num_steps if self.setting == "offline" else online

    @pydantic.model_validator(mode="after")
    def _settings_fit(self) -> "Transfer":
        if self.v_min >= self.v_max:
            raise ValueError(f"v_min ({self.v_min}) must be below v_max ({self.v_max})")
        if self.freeze and self.initial == "scratch":
            raise ValueError("freeze: nothing is transferred to a network from scratch; set initial, or leave out")
        if self.setting == "offline" and not self.dataset:
            raise ValueError("dataset: missing; offline fine-tuning needs a replay with the game")
        if self.setting == "offline" and self.eval_every % self.log_every:
            raise ValueError(f"eval_every ({self.eval_every}) must be a multiple of log_every ({self.log_every})")
        idle = ONLY[{"offline": "online", "online": "offline"}[self.setting]]
        idle = [name for name in idle if getattr(self, name) != type(self).model_fields[name].default]
        if idle:
            raise ValueError(f"{', '.join(idle)}: without effect in setting {self.setting!r}; leave out")
        return self


# Parameters of `06_transfer` that concern one setting alone.
ONLY = {
    "offline": ("dataset", "view", "alpha", "num_steps", "log_every", "steps_per_dispatch"),
    "online": (
        "num_transitions", "sticky_actions", "max_steps", "environments", "num_threads", "min_history",
        "update_period", "final_epsilon", "epsilon_decay", "capacity", "compressed",
    ),
}  # fmt: skip


class Agents(Parameters):
    """`07_agents`."""

    agent: str = "04_scaled_training/quickstart"
    step: Annotated[int, Field(ge=-1)] = -1
    game: str = ""
    seed: Seed = 0
    max_steps: Count = 1_000
    dataset: str = ""
    view: str = ""
    other: str = ""
    other_step: Annotated[int, Field(ge=-1)] = -1
    map_states: Annotated[int, Field(ge=4)] = 600


class PaperReport(Parameters):
    """`08_paper_report`."""

    sub_optimal: str = "forty_games_suboptimal"
    near_optimal: str = "forty_games_near_optimal"
    scores: list[str] = ["outputs/gallery/scores_quickstart.csv", "outputs/gallery/scores_six_games.csv"]
    transfer_scores: str = "outputs/gallery/transfer.csv"
    seed: Seed = 0
    replicates: Count = 50_000


class Ablations(Parameters):
    """`05_ablations`."""

    forty_games: str = "forty_games.yaml"
    six_games: str = "six_games.yaml"
    six_games_long: str = "six_games_long.yaml"
    encoders: Annotated[list[Encoder], Field(min_length=1)] = ["resnet34", "resnet50", "resnet101"]
    encoder: Encoder = "resnet101"
    long_encoder: Encoder = "resnet50"
    sizes: Annotated[list[Encoder], Field(min_length=1)] = [
        "impala_x4", "impala_x8", "impala_x16", "resnet34", "resnet50", "resnet101", "resnet152",
    ]  # fmt: skip
    transformer: Literal[tuple(defaults.TRANSFORMERS)] = "40M"
    vit: Encoder = "vit_base"
    resnet: Encoder = "resnet152"
    tables: list[str] = []
    compare: list[str] = []
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    replicates: Count = 50_000
    seed: Seed = 0


class LearningFromReward(Parameters):
    """`05_learning_from_reward`."""

    base: str = "five_seeds.yaml"
    control: Literal["zero", "shuffled"] = "zero"


class Performance(Parameters):
    """`09_performance`."""

    encoders: Annotated[list[Encoder], Field(min_length=1)] = [
        "resnet34", "resnet50", "resnet101", "resnet152", "impala_x4", "impala_x8", "impala_x16",
    ]  # fmt: skip
    dtypes: Annotated[list[Literal["float32", "bfloat16"]], Field(min_length=1)] = ["float32", "bfloat16"]
    batch_sizes: Annotated[list[Count], Field(min_length=1)] = [128, 512]
    hidden_sizes: Annotated[list[Count], Field(min_length=1)] = list(defaults.HIDDEN_SIZES)
    systems: Annotated[list[System], Field(min_length=1)] = [
        "cql resnet34", "cql resnet50", "cql resnet101", "cql vit_base", "dt 40M", "dt 200M",
    ]  # fmt: skip
    systems_batch: Count = 512
    heads_encoder: Encoder = "resnet34"
    heads_batch: Count = 512
    num_games: Annotated[list[Annotated[int, Field(ge=1, le=40)]], Field(min_length=1)] = [1, 10, 40]
    torch_encoders: Annotated[list[TorchEncoder], Field(min_length=1)] = ["resnet101"]
    torch_batch: Count = 512
    torch_games: Annotated[int, Field(ge=1, le=40)] = 40
    torch_hidden_sizes: Annotated[list[Count], Field(min_length=1)] = list(defaults.HIDDEN_SIZES)
    peer_rates: str = ""
    dataset: str = "01_data_collection/default/replay"
    view: str = ""
    encoder: Encoder = "resnet101"
    games_per_batch: Count = 128
    transitions_per_game: Count = 4
    sampling_processes: Annotated[int, Field(ge=0)] = 0
    copies: Count = 1_000
    compare_steps: Count = 500
    seconds: Annotated[float, Field(gt=0)] = 5.0


NOTEBOOKS: dict[str, type[Parameters]] = {
    "00_walkthrough": Walkthrough,
    "01_data_collection": DataCollection,
    "02_online_agents": OnlineAgents,
    "03_data_exploration": DataExploration,
    "04_scaled_training": ScaledTraining,
    "05_ablations": Ablations,
    "05_learning_from_reward": LearningFromReward,
    "06_transfer": Transfer,
    "07_agents": Agents,
    "08_paper_report": PaperReport,
    "09_performance": Performance,
}


def check(notebook: str, values: Mapping[str, Any], source: str = "parameters") -> Parameters:
    """Validate a notebook's parameters; absent names take their defaults.

    Args:
        notebook: name without ``.ipynb``.
        values: values by name.
        source: their origin, for the message.

    Raises:
        ParameterError: unknown names (with the nearest valid one), wrong types and values out of range, all at once.
    """
    if notebook not in NOTEBOOKS:
        near = difflib.get_close_matches(notebook, NOTEBOOKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(NOTEBOOKS)}."
        raise ParameterError(f"{source}: unknown notebook {notebook!r}; {hint}")
    schema = NOTEBOOKS[notebook]
    try:
        return schema(**values)
    except pydantic.ValidationError as error:
        mistakes = "\n".join(f"  {_describe(mistake, schema)}" for mistake in error.errors())
        raise ParameterError(f"{source}: not valid for {notebook}:\n{mistakes}") from None


def _describe(mistake: Any, schema: type[Parameters]) -> str:
    name, given = ".".join(map(str, mistake["loc"])) or "together", mistake["input"]
    if mistake["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, schema.model_fields, n=1, cutoff=0.5)
        return f"{name}: no such parameter" + (f"; did you mean {near[0]}?" if near else "")
    if mistake["type"] == "value_error":
        return str(mistake["ctx"]["error"])
    return f"{name}: {mistake['msg']}, got {given!r}{_hint(mistake['type'], given)}"


def _hint(kind: str, given: Any) -> str:
    """Suggest how to write the probable meaning in YAML."""
    if kind in ("string_type", "literal_error") and not isinstance(given, str):
        return " (in YAML, text that looks like something else needs quotes: '1')"
    if kind == "bool_type" and str(given).lower() in ("yes", "no", "on", "off", "y", "n", "true", "false"):
        return f" (write {str(given).lower() in ('yes', 'on', 'y', 'true')}".lower() + ")"
    if kind == "float_type" and isinstance(given, str):
        return " (write 1.0e-4, without quotes; papermill's -y and -f take 1e-4 for text)"
    if kind == "int_type" and isinstance(given, str):
        return " (write a number without quotes)"
    return ""


def from_notebook(notebook: str, namespace: dict[str, Any]) -> Parameters:
    """Validate the variables of a notebook's parameters cell, and of the cell that papermill injected after it.

    A parameters cell holds only assignments, and sets a known parameter or was injected. All its names count, so a
    misspelt one is an error, where papermill only warns. Unknown names are deleted, so it is enough to correct the
    cell and execute it again.

    Args:
        notebook: name without ``.ipynb``.
        namespace: the notebook's ``globals()``.

    Raises:
        ParameterError: see `check`.
    """
    known = set(NOTEBOOKS[notebook].model_fields)
    names = {name for source in namespace["In"] for name in assigned(source, known)}
    values = {name: namespace[name] for name in names if name in namespace}
    for name in values.keys() - known:
        del namespace[name]
    return check(notebook, values, f"{notebook}.ipynb")


def assigned(source: str, known: set[str]) -> set[str]:
    """Names that a parameters cell assigns; none for any other cell.

    Args:
        source: source of the cell.
        known: parameters of its notebook.
    """
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a magic
        return set()
    if not all(isinstance(node, ast.Assign | ast.AnnAssign) for node in body):
        return set()
    nodes = [node for statement in body for node in ast.walk(statement)]
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names if source.startswith("# Parameters") or names & known else set()


def load(file: str | Path) -> dict[str, Any]:
    """Read a YAML file of parameters.

    Raises:
        ParameterError: not readable, not YAML, a name given twice, or not a mapping.
    """
    try:
        values = documents.load(file)
    except documents.DocumentError as error:
        raise ParameterError(str(error)) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ParameterError(f"{file}: expected a mapping of parameter names to values, got {type(values).__name__}.")
    return values
