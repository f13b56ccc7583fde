"""Scaled offline Q-learning on Atari (Kumar et al., ICLR 2023), as a thin library for the notebooks.

Import the module you need: ``from scaled_ql import replay, networks, losses``. Modules that do not need
jax (games, environments, replay, metrics, plots, parameters, runs) do not import it.
"""
