"""The `Method` record, and the parts that objectives share."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scaled_ql import losses
from scaled_ql.defaults import Head, Rewards
from scaled_ql.games import NUM_ACTIONS
from scaled_ql.networks import make_q_network
from scaled_ql.replay.batch import Batch

PyTree = Any
Metrics = dict[str, jax.Array]
Objective = Callable[[PyTree, PyTree, Batch, jax.Array], tuple[jax.Array, Metrics]]
Preferences = Callable[[PyTree, jax.Array, jax.Array], jax.Array]


class MethodError(TypeError):
    """A loss or an objective with an invalid result; the message describes the result."""


class Method(NamedTuple):
    """A method as one record, which training, evaluation and reports read.

    Attributes:
        minimises: the loss, in Markdown with LaTeX, with this method's weights.
        build: (encoder, number of games, seed, **architecture of `networks.make_q_network`) -> the network.
        objective: (graph, sizes of the games' action sets, reward scale float32 [games] or None) -> the objective:
            (params, target_params, batch, key) -> (loss, metrics); `checked_objective` specifies the metrics.
        preferences: (graph, sizes) -> jitted (params, uint8 [B, 84, 84, 4], game int32 [B]) -> float32 [B, 18], -inf
            outside the game's set: the largest is played. With a `memory` instead (params, `replay.Sequences` of that
            many steps, int32 [B, 3]) -> float32 [B, 18], log-probabilities of the full joystick's actions; see
            `evaluation.MemoryPlayer`. None: the trained network cannot play.
        metrics: plotted metrics and their titles; the first has sums per game, too.
        batches: ``transitions``; ``returns``: transitions whose reward is the discounted return to go; ``sequences``:
            windows of steps, `replay.Sequences`; ``sequences with returns``: with their undiscounted returns to go.
        scales_rewards: whether the objective divides rewards by `replay.reward_scales`.
        before: for parts of the network, by name, the method that trains them first; they are frozen afterwards.
        values: name of the `preferences`, for a figure's axis.
        samples: whether the policy softmax(preferences) is evaluated, too.
        memory: how many of its episode's last steps the policy sees; 0: a stack of frames alone.
        decisions: of a method with a memory, all of what `preferences` gives a part of: (graph, sizes) -> (params,
            `replay.Sequences`, int32 [B, 3]) -> `decision_transformer.Decision`, not compiled.
        temperature: of its actions in evaluation, see `evaluation.evaluate`; 0: the largest is played.
        distributions: (graph, sizes, reward scale) -> (params, target_params, batch) -> predicted and target
            distribution of the data's actions, each float32 [B, N]; None: there are none to compare.
        pictures: graph -> (params, batch, key) -> what the network sees and paints, by title, each float32 [B, 84, 84]
            from 0 to 255; None: it paints nothing.
    """

    minimises: str
    build: Callable[..., nnx.Module]
    objective: Callable[..., Objective]
    preferences: Callable[[nnx.GraphDef, list[int]], Preferences] | None
    metrics: Mapping[str, str]
    batches: Literal["transitions", "returns", "sequences", "sequences with returns"] = "transitions"
    scales_rewards: bool = False
    before: Mapping[str, "Method"] = MappingProxyType({})
    values: str = "Q(s, a)"
    samples: bool = False
    memory: int = 0
    decisions: Callable[[nnx.GraphDef, list[int]], Callable] | None = None
    temperature: float = 0.0
    distributions: Callable[..., Callable] | None = None
    pictures: Callable[[nnx.GraphDef], Callable] | None = None

    def stages(self, network: nnx.Module) -> list[tuple[str, "Method", nnx.Module]]:
        """Stages of training, in order: (folder below the run's, method, network or part of it)."""
        return [(name, method, getattr(network, name)) for name, method in self.before.items()] + [("", self, network)]


def build_network(encoder: str, num_games: int, seed: int = 0, *, head: Head, **architecture: Any) -> nnx.Module:
    """`networks.make_q_network` with a method's head, for `Method.build`."""
    return make_q_network(encoder, num_games, head, seed, **architecture)


def action_masks(num_actions: list[int]) -> jax.Array:
    """Masks of each game's actions, bool [games, 18], from the sizes of their minimal sets."""
    return jnp.arange(NUM_ACTIONS) < jnp.array(num_actions)[:, None]


def outputs(
    network: nnx.Module,
    observation: jax.Array,
    game: jax.Array,
    augment: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A network's outputs and the representation before its heads."""
    features = network.features(observation, game, augment)
    return network.heads(features, game), features.astype(jnp.float32)


def represent(
    network: nnx.Module,
    observation: jax.Array,
    game: jax.Array,
    augment: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """A network's representation, and how evenly each block of its ViT attends, [B, blocks], or None without one."""
    if getattr(network, "has_attention", False):
        return network.features_and_entropies(observation, game, augment)
    return network.features(observation, game, augment), None


def shifts(
    key: jax.Array, size: int, pixels: int
) -> tuple[Callable[[jax.Array], jax.Array] | None, Callable[[jax.Array], jax.Array] | None]:
    """Independent random shifts of a batch's two observations, or None where `pixels` is 0."""
    if not pixels:
        return None, None
    offsets = [losses.random_offsets(one, size, pixels) for one in jax.random.split(key)]
    return tuple(partial(jax.vmap(partial(losses.shift_image, pixels=pixels)), offset=offset) for offset in offsets)


def by_game(name: str, values: jax.Array, game: jax.Array, games: int) -> Metrics:
    """Sums and counts per game of values [B]."""
    return {
        f"{name}_sum": jax.ops.segment_sum(values, game, games),
        f"{name}_count": jax.ops.segment_sum(jnp.ones_like(values), game, games),
    }


def masked_preferences(values: Callable, graph: nnx.GraphDef, num_actions: list[int]) -> Preferences:
    """`Method.preferences` from values: (network, observation, game, mask bool [B, 18]) -> (values [B, 18], mask)."""
    masks = action_masks(num_actions)

    @jax.jit
    def prefer(params: PyTree, observation: jax.Array, game: jax.Array) -> jax.Array:
        preferred, mask = values(nnx.merge(graph, nnx.State(params)), observation, game, masks[game])
        return jnp.where(mask, preferred, -jnp.inf)

    return prefer


def without_rewards(objective: Objective, rewards: Rewards) -> Objective:
    """Make a control: an objective that minimises the same loss on uninformative rewards.

    Anything it learns is not learned from rewards; frames, actions, discounts and terminations are unchanged.

    Args:
        objective: objective of a method.
        rewards: ``zero``: every reward is 0; ``shuffled``: each transition has the reward of another one of its game in
            the batch, which keeps the rewards' distribution; ``real``: `objective` itself. A window of steps has
            rewards and returns to go, zero or another window's; its padding has none, and its end still tells.
    """
    if rewards == "real":
        return objective

    def control(params: PyTree, target_params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        told = {name: x for name, x in batch._asdict().items() if name in ("reward", "return_to_go")}
        other = jax.tree.map(jnp.zeros_like, told)
        if rewards == "shuffled":
            mixed = jnp.lexsort((jax.random.uniform(jax.random.fold_in(key, 1), batch.game.shape), batch.game))
            other = jax.tree.map(lambda new, x: new.at[jnp.argsort(batch.game)].set(x[mixed]), other, told)
            if "return_to_go" in told:  # padding has no reward, in play neither
                other["reward"] = jnp.where(batch.mask, other["reward"], 0)
        return objective(params, target_params, batch._replace(**other), key)

    return control


def checked_objective(objective: Objective) -> Objective:
    """Wrap an objective so that its results are checked while it is traced, before anything is compiled.

    Metrics are float scalars, one of them ``loss``, averaged over the steps of a row of the log; and two arrays
    float [games], ``<name>_sum`` and ``<name>_count``: sums over the batch's transitions of each game, and their
    numbers, which the log reports as ``<name>/<game>``. `by_game` makes them.

    Raises:
        MethodError: the objective returns something else; raised when traced.
    """

    def checked(params: PyTree, target_params: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        returned = objective(params, target_params, batch, key)
        if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)):
            raise MethodError(f"an objective must return (loss, metrics), got {type(returned).__name__}.")
        loss, metrics = returned
        if np.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise MethodError(f"an objective's loss must be a float scalar, got {describe_array(loss)}.")
        if "loss" not in metrics:
            raise MethodError(f"an objective's metrics must have a scalar loss, got only {', '.join(metrics)}.")
        games = {name for name, value in metrics.items() if np.ndim(value)}
        names = {name.removesuffix("_sum") for name in games if name.endswith("_sum")}
        if len(names) != 1 or games != {f"{name}{suffix}" for name in names for suffix in ("_sum", "_count")}:
            raise MethodError(
                "an objective's metrics must be scalars and one pair of sums per game, <name>_sum and <name>_count "
                f"(`methods.common.by_game`), got the arrays {', '.join(sorted(games)) or 'none'}."
            )
        return returned

    return checked


def describe_array(value: Any) -> str:
    """Dtype and shape in an error message, such as ``float32[18]``."""
    return f"{jnp.result_type(value)}{list(np.shape(value))}"
