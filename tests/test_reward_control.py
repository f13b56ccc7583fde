"""The control of every claim: rewards that say nothing, and what of an agent's score they leave."""

import json

import jax
import numpy as np
import pytest
import yaml

from scaled_ql import methods, parameters, reward_control
from scaled_ql.ablations import GatherError, gather
from scaled_ql.replay.batch import Batch

BASE = parameters.check("04_scaled_training", {"run": "base", "encoder": "nature"})


def write(outputs, name, agent, *, data="abc", sampled=None, truncated=25.0, **changes):
    """A finished run's folder with an agent's return in Pong."""
    folder = outputs / "04_scaled_training" / name
    folder.mkdir(parents=True)
    (folder / "parameters.yaml").write_text(yaml.safe_dump(BASE.model_dump() | changes | {"run": name}))
    (folder / "status.json").write_text(json.dumps({"state": "finished"}))
    row = {"random_return": -20.7, "constant_return": -20.0, "dataset_return": -18.0, "agent_return": agent}
    row |= {"agent_episodes": 8, "truncated_percent": truncated, "dataset_truncated_percent": 50.0} | (
        {"sampled_return": sampled} if sampled else {}
    )
    summary = {"games": {"Pong": row}, "dataset": data, "parameters": 1, "steps": 5}
    (folder / "summary.json").write_text(json.dumps(summary))
    played = folder / "evaluation" / "step-5"
    played.mkdir(parents=True)
    counts = "6,3,1" if changes.get("rewards") != "zero" else "0,10,0"
    (played / "Pong.csv").write_text(f"episode_return,action_NOOP,action_UP,action_DOWN\n{agent},{counts}\n")


@pytest.fixture
def outputs(tmp_path):
    for seed in range(3):
        write(tmp_path, f"real{seed}", 10.0 + seed, seed=seed)
        write(tmp_path, f"zero{seed}", -20.0 + 0.5 * seed, seed=seed, rewards="zero")
        write(tmp_path, f"clone{seed}", 12.0 - seed, seed=seed, method="bc", sampled=-19.0)
    write(tmp_path, "other", 21.0, n_step=7)
    return tmp_path


def test_arms_are_told_apart_and_other_runs_stay_out(outputs):
    scores = reward_control.scores(gather(outputs), BASE)
    assert len(scores) == 9
    assert "other" not in set(scores["run"])
    (row,) = reward_control.players(scores, "cql").to_dict("records")
    assert row == {
        "random": -20.7, "best constant action": -20.0, "data": -18.0, "cloning": 11.0, "cloning, sampled": -19.0,
        "zero rewards": -19.5, "agent": 11.0,
        "own actions": "NOOP 60%, UP 30%, DOWN 10%", "own actions, zero rewards": "UP 100%, NOOP 0%, DOWN 0%",
        "truncated %": 25.0, "truncated %, zero rewards": 25.0,
        "truncated %, cloning": 25.0, "truncated %, data": 50.0, "seeds": 3,
    }  # fmt: skip


def test_verdicts_follow_from_the_intervals(outputs):
    compared = reward_control.differences(reward_control.scores(gather(outputs), BASE), "cql").set_index("better than")
    assert dict(compared["verdict"]) == {
        "zero rewards": "yes", "cloning": "inconclusive", "cloning, sampled": "yes", "data": "yes",
        "best constant action": "yes",
    }  # fmt: skip
    (sentence,) = reward_control.verdict(compared.reset_index())
    assert "learned from reward: **yes**" in sentence and "+30.5" in sentence


def test_a_control_that_scores_as_much_is_no_learning_from_reward(tmp_path):
    for seed, value in enumerate((20.0, 24.0, 28.0)):
        write(tmp_path, f"real{seed}", value, seed=seed)
        write(tmp_path, f"zero{seed}", value + 1, seed=seed, rewards="zero")
    compared = reward_control.differences(reward_control.scores(gather(tmp_path), BASE), "cql")
    assert compared["verdict"].tolist()[:2] == ["inconclusive", "missing"]


def test_runs_that_were_cut_short_get_no_verdict_and_are_named(tmp_path):
    for limit, refused in ((6_000, True), (27_000, False)):  # at the paper's own limit an episode counts as a game
        folder, base = tmp_path / str(limit), BASE.model_copy(update={"eval_max_steps": limit})
        for seed in range(3):
            write(folder, f"real{seed}", 10.0 + seed, seed=seed, eval_max_steps=limit)
            share = 75.0 if seed == 1 else 50.0
            write(folder, f"zero{seed}", -seed, seed=seed, rewards="zero", eval_max_steps=limit, truncated=share)
        compared = reward_control.differences(reward_control.scores(gather(folder), base), "cql").set_index(
            "better than"
        )
        assert compared.loc["zero rewards", "verdict"] == ("refused" if refused else "yes")
        assert compared.loc["data", "verdict"] == "yes", "the agent's own episodes were not cut"
        (sentence,) = reward_control.verdict(compared.reset_index())
        assert ("no verdict" in sentence) == ("zero1 (75% of its episodes truncated)" in sentence) == refused
        assert "zero0" not in sentence and "zero2" not in sentence


def test_runs_that_were_evaluated_otherwise_are_named_where_they_would_be_needed(tmp_path):
    for seed in range(3):
        write(tmp_path, f"real{seed}", 10.0 + seed, seed=seed)
        write(tmp_path, f"zero{seed}", -1.0 * seed, seed=seed, rewards="zero", eval_episodes=3 if seed else 10)
    write(tmp_path, "aside", 99.0, eval_epsilon=0.5)  # the agent has its three seeds without it
    write(tmp_path, "longer", 99.0, rewards="zero", eval_episodes=3, num_steps=7)  # another training as well
    otherwise = reward_control.evaluated_otherwise(gather(tmp_path), BASE)
    assert dict(zip(otherwise["run"], otherwise["why"])) == {
        "aside": "eval_epsilon 0.5, not 0.001",
        "zero1": "eval_episodes 3, not 10",
        "zero2": "eval_episodes 3, not 10",
    }
    compared = reward_control.differences(reward_control.scores(gather(tmp_path), BASE), "cql", otherwise=otherwise)
    verdicts = compared.set_index("better than")["verdict"]
    assert verdicts["zero rewards"] == "refused" and verdicts["cloning"] == "missing" and verdicts["data"] == "yes"
    (sentence,) = reward_control.verdict(compared)
    assert "no verdict" in sentence and "zero1 (eval_episodes 3, not 10); zero2" in sentence
    assert "aside" not in sentence and "longer" not in sentence


def test_runs_of_two_recordings_or_twice_the_same_are_refused(outputs):
    write(outputs, "again", 1.0, seed=0)
    with pytest.raises(GatherError, match="again, real0"):
        reward_control.scores(gather(outputs), BASE)
    write(outputs, "elsewhere", 1.0, seed=9, data="xyz")
    with pytest.raises(GatherError, match="different contents"):
        reward_control.scores(gather(outputs), BASE)


def seen_by(objective_rewards, seed=0, size=64):
    """The rewards that an objective receives under a control, and the true batch."""
    rng = np.random.default_rng(seed)
    game = rng.integers(3, size=size).astype(np.int32)
    reward = (100 * game + rng.permutation(size)).astype(np.float32)
    fields = dict.fromkeys(Batch._fields) | {"game": game, "reward": reward}

    def objective(params, target_params, batch, key):
        return batch.reward, {}

    control = methods.without_rewards(objective, objective_rewards)
    return np.asarray(control({}, {}, Batch(**fields), jax.random.key(seed))[0]), game, reward


@pytest.mark.parametrize("seed", range(5))
def test_zero_and_shuffled_rewards(seed):
    zero, _, reward = seen_by("zero", seed)
    assert not zero.any()
    real, _, _ = seen_by("real", seed)
    assert (real == reward).all()
    mixed, game, _ = seen_by("shuffled", seed)
    for number in range(3):  # each game keeps its rewards, and nearly all are another transition's
        assert sorted(mixed[game == number]) == sorted(reward[game == number])
    assert (mixed != reward).mean() > 0.7
    assert (mixed != seen_by("shuffled", seed + 100)[0]).any()


def test_without_runs_nothing_is_compared(tmp_path):
    gathered = gather(tmp_path)
    scores, otherwise = reward_control.scores(gathered, BASE), reward_control.evaluated_otherwise(gathered, BASE)
    assert scores.empty and otherwise.empty
    compared = reward_control.differences(scores, "cql", otherwise=otherwise)
    assert compared.empty and reward_control.verdict(compared) == []
    assert reward_control.players(scores, "cql").empty
