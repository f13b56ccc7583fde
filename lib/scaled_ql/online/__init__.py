"""Agents that learn online in ALE while everything they experience is logged: one's own DQN-Replay."""
