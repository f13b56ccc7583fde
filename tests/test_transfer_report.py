"""Runs on one target, side by side: arms, gains over scratch, what may not be compared."""

import json

import numpy as np
import pytest
import yaml
from scipy import stats

from scaled_ql import parameters, transfer_report
from scaled_ql.ablations import GatherError
from scaled_ql.games import reference_score

BASE = parameters.check("06_transfer", {"run": "base", "game": "Pong"})
PRETRAINED = {"method": "cql", "rewards": "real", "encoder": "nature", "hidden_sizes": [8], "games": ["Breakout"]}
PRETRAINED |= {"dataset": "abc", "steps": 20, "seed": 3}


def write(outputs, name, agent, pretrained=PRETRAINED, *, data="abc", truncated=0.0, curve=(), network=None, **changes):
    """A finished run's folder with an agent's return in its game."""
    folder = outputs / "06_transfer" / name
    folder.mkdir(parents=True)
    changes = ({"initial": "scratch"} if pretrained is None else {}) | changes
    values = parameters.check("06_transfer", BASE.model_dump() | changes | {"run": name})
    (folder / "parameters.yaml").write_text(yaml.safe_dump(values.model_dump()))
    (folder / "status.json").write_text(json.dumps({"state": "finished"}))
    row = {"random_return": -20.7, "dataset_return": -18.0, "agent_return": agent, "agent_episodes": 8}
    summary = {"games": {values.game: row | {"truncated_percent": truncated}}, "dataset": data, "steps": 5}
    summary |= {"parameters": 1, "pretrained": pretrained, "network": network or {"encoder": "nature"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    for step, mean in [*enumerate(curve), (5, agent)]:
        (folder / "evaluation" / f"step-{step}").mkdir(parents=True)
        played = f"episode_return,truncated,action_NOOP\n{mean},False,1\n"
        (folder / "evaluation" / f"step-{step}" / f"{values.game}.csv").write_text(played)


@pytest.fixture
def outputs(tmp_path):
    for seed in range(3):
        write(tmp_path, f"scratch{seed}", -15.0 + 2 * seed, None, seed=seed, curve=(-21, -20))
        write(tmp_path, f"tuned{seed}", 3.0 + seed, seed=seed, curve=(-21, -10), initial=f"04_scaled_training/s{seed}")
        write(tmp_path, f"frozen{seed}", -14.0 + 3 * seed**2, seed=seed, freeze=True)
        control = PRETRAINED | {"rewards": "zero"}
        write(tmp_path, f"control{seed}", -19.0 + 0.1 * seed, control, seed=seed)
    write(tmp_path, "longer", 21.0, num_steps=7)
    write(tmp_path, "elsewhere", 21.0, game="Alien")
    return tmp_path


def scores_of(outputs):
    return transfer_report.siblings(transfer_report.gather(outputs), BASE)


def test_arms_are_told_apart_and_other_targets_stay_out(outputs):
    scores = scores_of(outputs)
    names = ["scratch", "Scaled QL, fine-tuned", "Scaled QL, frozen", "Scaled QL, zero rewards, fine-tuned"]
    assert list(dict.fromkeys(scores["arm"])) == names
    assert all(seeds == [0, 1, 2] for seeds in scores.groupby("arm")["seed"].agg(list))
    assert not {"longer", "elsewhere"} & set(scores["run"])
    assert set(scores.columns) == set(transfer_report.SCORE_COLUMNS)
    assert dict(zip(scores["arm"], scores["distance"])) == dict(zip(names, ["", *["near"] * 3]))


def test_gains_have_welchs_interval(outputs):
    compared = transfer_report.compare(scores_of(outputs))
    scratch, tuned = np.array([-15.0, -13, -11]), np.array([3.0, 4, 5])
    row = compared.loc["Scaled QL, fine-tuned"]
    welch = stats.ttest_ind(tuned, scratch, equal_var=False).confidence_interval()
    own = stats.t.interval(0.95, 2, tuned.mean(), stats.sem(tuned))
    assert row["gain over scratch"] == 17.0
    assert [row["gain low"], row["gain high"]] == pytest.approx([welch.low, welch.high])
    assert [row["low"], row["high"]] == pytest.approx(own)
    assert row["distance"] == "near"
    assert row["seeds"] == 3
    assert np.isnan(compared.loc["scratch", "gain over scratch"])
    said = transfer_report.verdict(compared, "Pong, offline")
    assert said.startswith("**Pong, offline**: better than scratch: Scaled QL, fine-tuned (+17.0,")
    assert "worse: Scaled QL, zero rewards, fine-tuned (-5.9" in said
    assert "inconclusive: Scaled QL, frozen" in said


def test_dqn_normalised_scores_are_of_the_default_variant(outputs):
    compared = transfer_report.compare(scores_of(outputs))
    random, dqn = (reference_score("Pong", player) for player in ("random", "dqn_50m"))
    expected = 100 * (4 - random) / (dqn - random)
    assert compared.loc["Scaled QL, fine-tuned", "DQN-normalised %"] == pytest.approx(expected)
    for seed in range(2):
        write(outputs, f"variant{seed}", 1.0, seed=seed, difficulty=1)
    base = BASE.model_copy(update={"difficulty": 1})
    (row,) = transfer_report.compare(
        transfer_report.siblings(transfer_report.gather(outputs), base)
    ).to_dict("records")  # fmt: skip
    assert np.isnan(row["DQN-normalised %"]) and row["mean return"] == 1.0


def test_all_offline_arms_stand_side_by_side_whatever_their_network(outputs):
    """Figure 7's bars: a score is a mean over seeds; an arm that lacks a game has no mean over games."""
    dt = {"transformer": "40M", "tokenizer": "patches", "return_low": -20}
    for game, agents in {"Pong": (3.0, -2.0), "Alien": (900.0, 700.0)}.items():
        how = {"game": game, "num_steps": 100_000, "network": dt}
        write(outputs, f"dt_{game}", agents[0], PRETRAINED | {"method": "dt"}, parts="all", **how)
        write(outputs, f"dt_scratch_{game}", agents[1], None, **how)
    on_cpc = {"game": "Pong", "network": dt | {"tokenizer": "resnet101"}, "parts": "encoder"}
    write(outputs, "cpc", 1.0, PRETRAINED | {"method": "cpc"}, **on_cpc)
    write(outputs, "online", 21.0, game="Pong", setting="online", data="online")
    table = transfer_report.offline_scores(transfer_report.by_target(outputs)[0])
    assert list(table) == ["Alien", "Pong", "mean"] and table.index.names == ["network", "arm"]

    def normalized(game, score):
        random, dqn = (reference_score(game, player) for player in ("random", "dqn_50m"))
        return 100 * (score - random) / (dqn - random)

    row = table.loc["DT 40M", "DT, fine-tuned"]
    assert row[["Alien", "Pong"]].tolist() == pytest.approx([normalized("Alien", 900), normalized("Pong", 3)])
    assert row["mean"] == pytest.approx(row[["Alien", "Pong"]].mean())
    assert table.loc[("DT 40M", "scratch"), "Pong"] == pytest.approx(normalized("Pong", -2))
    assert table.loc[("nature", "scratch"), "Pong"] == pytest.approx(normalized("Pong", -13)), "of three seeds"
    row = table.loc["DT 40M on resnet101", "CPC, fine-tuned"]
    assert row["Pong"] == pytest.approx(normalized("Pong", 1)) and np.isnan(row["mean"])
    assert transfer_report.offline_scores({}).empty
    assert transfer_report.network_in_words({"transformer": "tiny"}) == "BC transformer tiny"


def test_one_learning_rate_per_arm_the_best(outputs):
    for seed in range(3):
        write(outputs, f"fast{seed}", -5.0, None, seed=seed, learning_rate=1e-3)
        write(outputs, f"fast_tuned{seed}", -20.0, seed=seed, learning_rate=1e-3)
    compared = transfer_report.compare(scores_of(outputs))
    assert compared.loc["scratch", ["mean return", "learning rate"]].tolist() == [-5.0, "0.001"]
    assert compared.loc["Scaled QL, fine-tuned", ["mean return", "learning rate"]].tolist() == [4.0, "5e-05"]
    assert compared.loc["Scaled QL, fine-tuned", "gain over scratch"] == 9.0


def test_pre_trainings_and_parts_that_differ_are_named(outputs):
    write(outputs, "larger", 1.0, PRETRAINED | {"games": ["Breakout", "Freeway"]}, initial="04_scaled_training/larger")
    write(outputs, "less", 1.0, parts="encoder")
    names = set(scores_of(outputs)["arm"])
    assert "Scaled QL, games Breakout Freeway, encoder + embedding, fine-tuned" in names
    assert "Scaled QL, games Breakout, encoder, fine-tuned" in names


def test_a_parameter_that_came_after_a_run_makes_no_arm(outputs):
    write(outputs, "later", 5.0, PRETRAINED | {"tokenizer": "patches"}, seed=9)
    scores = scores_of(outputs).set_index("run")
    assert scores.loc["later", "arm"] == scores.loc["tuned0", "arm"] == "Scaled QL, fine-tuned"


def test_what_cannot_be_compared(outputs):
    write(outputs, "cut", 9.0, parts="encoder", truncated=90.0, seed=0)
    with pytest.raises(GatherError, match="have equal parameters and seeds"):
        write(outputs, "twice", 9.0, seed=0, initial="04_scaled_training/s0")
        scores_of(outputs)
    for run in ("twice",):
        (outputs / "06_transfer" / run / "status.json").write_text('{"state": "running"}')
    assert "twice" not in set(scores_of(outputs)["run"])
    asking = transfer_report.gather(outputs, "twice").runs
    assert "twice" in asking.index, "a run that compares itself counts"
    write(outputs, "other", 9.0, data="def", seed=7)
    with pytest.raises(GatherError, match="different contents of the dataset"):
        scores_of(outputs)


def test_no_verdict_where_episodes_were_cut_short(tmp_path):
    for seed in range(2):
        how = {"seed": seed, "eval_max_steps": 100}
        write(tmp_path, f"scratch{seed}", -15.0 + seed, None, **how)
        write(tmp_path, f"tuned{seed}", 3.0 + seed, truncated=90.0, **how)
    base = BASE.model_copy(update={"eval_max_steps": 100})
    compared = transfer_report.compare(transfer_report.siblings(transfer_report.gather(tmp_path), base))
    assert np.isnan(compared.loc["Scaled QL, fine-tuned", "gain over scratch"])
    assert np.isnan(compared.loc["Scaled QL, fine-tuned", "DQN-normalised %"])
    assert "no verdict" in transfer_report.verdict(compared, "Pong")


def test_curves_have_a_point_per_evaluation(outputs):
    curves = transfer_report.curves(outputs, scores_of(outputs))
    here = curves[curves["run"] == "tuned1"].sort_values("step")
    assert here[["step", "agent_return"]].to_numpy().tolist() == [[0, -21], [1, -10], [5, 4]]
    assert set(curves["arm"]) == set(scores_of(outputs)["arm"])


def test_every_target_has_a_table_and_settings_that_differ_are_sets(outputs):
    for seed in range(2):
        write(outputs, f"mode{seed}", 1.0, game="Freeway", mode=1, setting="online", seed=seed, data="online")
        write(
            outputs,
            f"mode_scratch{seed}",
            0.5,
            None,
            game="Freeway",
            mode=1,
            setting="online",
            seed=seed,
            data="online",
        )
    tables, left_out = transfer_report.by_target(outputs)
    assert left_out.empty
    assert list(tables) == ["Alien, offline", "Freeway, mode 1, online", "Pong, offline", "Pong, offline, set 2"]
    assert sorted(len(table) for table in tables.values()) == [1, 1, 4, 12]
    compared = {name: transfer_report.compare(table) for name, table in tables.items()}
    gains = transfer_report.mean_gain(compared)
    assert "online" not in gains.index.get_level_values("setting"), "a variant has no published score"
    random, dqn = (reference_score("Pong", player) for player in ("random", "dqn_50m"))
    scratch, tuned = (100 * (score - random) / (dqn - random) for score in (-13, 4))
    row = gains.loc[("offline", "Scaled QL, fine-tuned")]
    assert row[["scratch", "score", "gain %"]].tolist() == pytest.approx([scratch, tuned, 100 * (tuned / scratch - 1)])
    assert row["targets"] == "Pong, offline"


def test_a_network_from_scratch_of_another_architecture_is_no_baseline(outputs):
    for seed in range(3):
        write(outputs, f"large{seed}", 15.0, None, seed=seed, network={"encoder": "resnet34"})
    tables, _ = transfer_report.by_target(outputs)
    assert sorted(len(table) for name, table in tables.items() if name.startswith("Pong")) == [1, 3, 12]
    base = parameters.check("06_transfer", BASE.model_dump() | {"run": "tuned0"})
    scores = transfer_report.siblings(transfer_report.gather(outputs), base)
    assert not scores["run"].str.startswith("large").any()


def test_what_has_no_effect_from_scratch_tells_nothing_apart(outputs):
    write(outputs, "again", -15.0, None, seed=0, parts="encoder", built_like="04_scaled_training/elsewhere")
    with pytest.raises(GatherError, match=r"again.*scratch0.* have equal parameters and seeds"):
        scores_of(outputs)
    tables, left_out = transfer_report.by_target(outputs)
    assert "Alien, offline" in tables and max(map(len, tables.values())) == 1, "one target fails alone"
    assert left_out["why"].str.contains("equal parameters and seeds").tolist() == [True]


def test_pre_trainings_that_differ_in_anything_are_arms(outputs):
    other = PRETRAINED | {"alpha": 0.0, "seed": 9, "outputs": "elsewhere"}
    write(outputs, "pessimist", 1.0, other, initial="04_scaled_training/alpha0")
    names = set(scores_of(outputs)["arm"])
    assert {"Scaled QL, alpha 0.0, fine-tuned", "Scaled QL, alpha paper, fine-tuned"} <= names


def test_a_rate_with_one_lucky_seed_is_not_the_best(outputs):
    write(outputs, "lucky", 20.0, seed=0, learning_rate=1e-2)
    compared = transfer_report.compare(scores_of(outputs))
    assert compared.loc["Scaled QL, fine-tuned", ["mean return", "learning rate"]].tolist() == [4.0, "5e-05"]


def test_an_arm_without_a_verdict_is_named(outputs):
    write(outputs, "single", 9.0, PRETRAINED | {"rewards": "shuffled"}, initial="04_scaled_training/shuffled")
    said = transfer_report.verdict(transfer_report.compare(scores_of(outputs)), "Pong")
    assert "no verdict, cut short or without two seeds: Scaled QL, shuffled rewards, fine-tuned" in said


def test_far_games_are_tallied_apart(outputs):
    for seed in range(3):
        write(outputs, f"klax_scratch{seed}", 1.0 + seed, None, game="Klax", seed=seed)
        write(outputs, f"klax{seed}", -9.0 + seed, game="Klax", seed=seed)
        write(outputs, f"breakout_scratch{seed}", 1.0 + seed, None, game="Breakout", mode=12, seed=seed)
        write(outputs, f"breakout{seed}", 1.5 + seed, game="Breakout", mode=12, seed=seed)
    tables, _ = transfer_report.by_target(outputs)
    counts = transfer_report.tally({name: transfer_report.compare(table) for name, table in tables.items()})
    arm = "Scaled QL, fine-tuned"
    assert {key[1]: list(row) for key, row in counts.iterrows() if key[2] == arm} == {
        "near": [1, 1, 0, 0],
        "far": [1, 0, 1, 0],
        "same": [1, 0, 0, 1],
    }


def test_nothing_yet(tmp_path):
    assert transfer_report.by_target(tmp_path)[0] == {} and transfer_report.mean_gain({}).empty
    assert transfer_report.tally({}).empty
    scores = transfer_report.siblings(transfer_report.gather(tmp_path), BASE)
    assert scores.empty and transfer_report.curves(tmp_path, scores).empty
    assert "no verdict" in transfer_report.verdict(transfer_report.compare(scores), "Pong")
