"""Methods: training objectives and the policies they give. One file per idea; `defaults.METHODS` names them.

::

    method = methods.make(p)  # from a notebook's parameters
    method = methods.q_learning(td_loss=my_loss)  # with your own loss
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from scaled_ql import defaults, losses
from scaled_ql.methods.cloning import bc, return_bc
from scaled_ql.methods.common import Method, MethodError, Metrics, Objective, Preferences, PyTree, without_rewards
from scaled_ql.methods.cpc import cpc
from scaled_ql.methods.decision_transformer import bc_transformer, dt
from scaled_ql.methods.mae import mae
from scaled_ql.methods.q_learning import bcq, q_learning

__all__ = [
    "METHODS", "Method", "MethodError", "Metrics", "Objective", "Preferences", "PyTree", "bc",
    "bc_transformer", "bcq", "cpc", "dt", "mae", "make", "q_learning", "return_bc", "without_rewards",
]  # fmt: skip

METHODS: dict[str, Callable[..., Method]] = {
    name: getattr(import_module(f"{__name__}.{file}"), name) for name, (file, _) in defaults.METHODS.items()
}


def make(p: Any, **changes: Any) -> Method:
    """Make the method that a notebook's parameters describe.

    Args:
        p: parameters of `04_scaled_training`, or of a notebook with the same ones.
        changes: arguments of the method that replace or extend them, such as `td_loss` of `q_learning`.
    """
    given = dict(p) | {"atoms": losses.support(p.v_min, p.v_max, p.num_atoms)}
    names = set(defaults.METHODS[p.method][1]) - {"rewards"}
    return METHODS[p.method](**({name: given[name] for name in names} | changes))
