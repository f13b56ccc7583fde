"""Agents that learn online: C51 and DQN, for one game or many.

`independent_learners` are single-game agents, trained together as one program over stacked parameters;
`multi_task_learner` is one network with a head per game, the paper's online multi-task Impala-DQN (appendix B.5).
`play.play` runs either: acting, learning, logging.

Defaults are the settings of Dopamine's C51 (Castro et al., 2018): support, optimizer, replay, periods, exploration,
protocol. Differences from its agents: the Nature network has no padding, as in Mnih et al. (2015), where Dopamine's
pads (``SAME``), and its initial kernels are He et al.'s normal ones where Dopamine's are uniform; many environments
step side by side, on parameters of one step ago. With ``mse`` the optimizer and the squared error are C51's and
`methods.q_learning`'s; Dopamine's DQN minimises Huber's loss with Adam (learning rate 6.25e-5, epsilon 1.5e-4) or,
in TensorFlow, RMSProp.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from scaled_ql import methods
from scaled_ql.defaults import TARGET_UPDATE_PERIOD
from scaled_ql.evaluation import QFunction, make_q_function
from scaled_ql.networks.q_network import Head, QNetwork
from scaled_ql.replay.batch import Batch
from scaled_ql.training import PyTree, TrainState, make_update


class Learner(NamedTuple):
    """Agents of G games.

    Attributes:
        state: initial state.
        update: (state, batch) -> (state, metrics); donates the state. A batch has [G, B] transitions and metrics have
            [G] losses; [B] and one loss if `shared`.
        greedy: (params, uint8 [G, E, 4, 84, 84]) -> int32 [G, E], the actions of highest value.
        q_function: (params, index of a game) -> its agent's values, for `evaluation.evaluate`.
        shared: whether one network plays all games.
    """

    state: TrainState
    update: Callable[[TrainState, Batch], tuple[TrainState, methods.Metrics]]
    greedy: Callable[[PyTree, np.ndarray], jax.Array]
    q_function: Callable[[PyTree, int], QFunction]
    shared: bool


def independent_learners(
    build: Callable[[jax.Array], QNetwork],
    num_actions: list[int],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    head: Head = "c51",
    atoms: jax.Array | None = None,
    double_q: bool = False,
    target_update_period: int = TARGET_UPDATE_PERIOD,
) -> Learner:
    """Make an agent per game, each with its own network: parameters are stacked, and one program is mapped over games.

    Args:
        build: makes a network with one head from a seed, an int32 scalar.
        num_actions: size of each game's minimal action set.
        optimizer: optimizer of each agent.
        seed: game g starts from `build(seed + g)`.
        head: ``c51``, ``mse`` (plain DQN), or another of `methods.q_learning`.
        atoms: atoms of a categorical head.
        double_q: see `methods.q_learning`.
        target_update_period: updates between copies to the target networks.
    """

    method = methods.q_learning(head=head, alpha=0.0, atoms=atoms, double_q=double_q)

    def parameters(seed: jax.Array) -> PyTree:
        return nnx.to_pure_dict(nnx.split(build(seed), nnx.Param)[1])

    graph, _ = nnx.split(nnx.eval_shape(lambda: build(jnp.int32(0))), nnx.Param)
    params = jax.jit(jax.vmap(parameters))(seed + jnp.arange(len(num_actions), dtype=jnp.int32))
    state = TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), jax.vmap(optimizer.init)(params))
    sizes, key = jnp.array(num_actions), jax.random.key(seed)

    def update(state: TrainState, batch: Batch, size: jax.Array, key: jax.Array) -> tuple:
        objective = method.objective(graph, size[None])
        return make_update(objective, optimizer, target_update_period)(state, batch, key)

    def greedy(params: PyTree, stacks: jax.Array, size: jax.Array) -> jax.Array:
        prefer = method.preferences(graph, size[None])
        game = jnp.zeros(len(stacks), jnp.int32)
        return prefer(params, stacks.transpose(0, 2, 3, 1), game).argmax(-1)

    def q_function(params: PyTree, number: int) -> QFunction:
        prefer = method.preferences(graph, [num_actions[number]])
        own = jax.tree.map(lambda leaf: leaf[number], params)
        return make_q_function(prefer, own, 0, num_actions[number])

    axes = TrainState(None, 0, 0, 0)  # one shared step counter
    over_games = _one_by_one if jax.default_backend() == "cpu" else jax.vmap
    update = over_games(update, in_axes=(axes, 0, 0, None), out_axes=(axes, 0))
    greedy = over_games(greedy, in_axes=(0, 0, 0), out_axes=0)
    compiled, compiled_greedy = jax.jit(update, donate_argnums=0), jax.jit(greedy)
    return Learner(
        state,
        lambda state, batch: compiled(state, batch, sizes, key),
        lambda params, stacks: compiled_greedy(params, stacks, sizes),
        q_function,
        shared=False,
    )


def _one_by_one(function: Callable, in_axes: tuple, out_axes: PyTree) -> Callable:
    """Compute the result of `jax.vmap` as one program without batched operations.

    On a CPU, convolutions mapped over their kernels take two to three times as long as one after another.
    """

    def change(each: Callable, axes: PyTree, *trees: PyTree) -> PyTree:
        return jax.tree.map(
            lambda axis, *parts: parts[0] if axis is None else jax.tree.map(each, *parts),
            axes,
            *trees,
            is_leaf=lambda axis: axis is None,
        )

    def mapped(*arguments: PyTree) -> PyTree:
        count = next(len(jax.tree.leaves(a)[0]) for a, axis in zip(arguments, in_axes) if axis == 0)
        results = [function(*change(lambda leaf, i=i: leaf[i], in_axes, arguments)) for i in range(count)]
        return change(lambda *leaves: jnp.stack(leaves), out_axes, *results)

    return mapped


def multi_task_learner(
    build: Callable[[jax.Array], QNetwork],
    num_actions: list[int],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    head: Head = "c51",
    atoms: jax.Array | None = None,
    double_q: bool = False,
    target_update_period: int = TARGET_UPDATE_PERIOD,
) -> Learner:
    """Make one agent for all games, with a head for each; see `independent_learners`, but `build` makes G heads."""
    graph, variables = nnx.split(build(jnp.int32(seed)), nnx.Param)
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(variables))
    state = TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    method = methods.q_learning(head=head, alpha=0.0, atoms=atoms, double_q=double_q)
    objective = method.objective(graph, num_actions)
    compiled = jax.jit(make_update(objective, optimizer, target_update_period), donate_argnums=0)
    prefer, key = method.preferences(graph, num_actions), jax.random.key(seed)

    @jax.jit
    def greedy(params: PyTree, stacks: jax.Array) -> jax.Array:
        games, environments = stacks.shape[:2]
        together = stacks.reshape(-1, *stacks.shape[2:]).transpose(0, 2, 3, 1)
        game = jnp.repeat(jnp.arange(games, dtype=jnp.int32), environments)
        return prefer(params, together, game).argmax(-1).reshape(games, environments)

    return Learner(
        state,
        lambda state, batch: compiled(state, batch, key),
        greedy,
        lambda params, number: make_q_function(prefer, params, number, num_actions[number]),
        shared=True,
    )
