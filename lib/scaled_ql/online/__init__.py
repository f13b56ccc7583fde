"""Agents that learn online in ALE while all their experience is logged: a DQN-Replay of your own."""
