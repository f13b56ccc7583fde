"""Methods: what a network is trained to do, and how it then plays. One file per idea; `defaults.METHODS` names them.

::

    method = methods.make(p)  # of a notebook's parameters
    method = methods.q_learning(td_loss=my_loss)  # with a loss of one's own
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from scaled_ql import defaults, losses
from scaled_ql.methods.cloning import bc, return_bc
from scaled_ql.methods.common import Method, MethodError, Metrics, Objective, Preferences, PyTree, without_rewards
from scaled_ql.methods.q_learning import bcq, q_learning

__all__ = [
    "METHODS", "Method", "MethodError", "Metrics", "Objective", "Preferences", "PyTree", "bc", "bcq", "make",
    "q_learning", "return_bc", "without_rewards",
]  # fmt: skip

METHODS: dict[str, Callable[..., Method]] = {
    name: getattr(import_module(f"{__name__}.{file}"), name) for name, (file, _) in defaults.METHODS.items()
}


def make(p: Any, **changes: Any) -> Method:
    """The method that a notebook's parameters describe.

    Args:
        p: parameters of `04_scaled_training`, or of a notebook that has the same ones.
        changes: arguments of the method in place of parameters, or beside them, such as `td_loss` of `q_learning`.
    """
    given = dict(p) | {"atoms": losses.support(p.v_min, p.v_max, p.num_atoms)}
    names = set(defaults.METHODS[p.method][1]) - {"rewards"}
    return METHODS[p.method](**({name: given[name] for name in names} | changes))
