"""The paper's claims on runs made here: contrasts, controls, verdicts, and scores that are read back from one file."""

import json
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from scipy import stats

from scaled_ql import ablations, claims, command, metrics, parameters
from scaled_ql.claims import Claim
from scaled_ql.games import reference_score

SOURCE = "five_seeds.yaml"
GAMES = ("Breakout", "Qbert")


def write(outputs, scores, data="abc", games=GAMES, **changes):
    """A finished run of the base's, with human-normalised scores, points, of some games."""
    values = ablations.base(SOURCE).model_dump() | changes
    name = ".".join(f"{key}-{value}" for key, value in changes.items())
    folder = outputs / "04_scaled_training" / name
    folder.mkdir(parents=True)
    (folder / "parameters.yaml").write_text(yaml.safe_dump(values | {"run": name}))
    (folder / "status.json").write_text('{"state": "finished"}')
    returns = {}
    for game, score in zip(games, np.broadcast_to(scores, len(games))):
        random, human = (reference_score(game, who) for who in ("random", "human"))
        raw = [random + share / 100 * (human - random) for share in (float(score), 3.0, 2.0)]
        returns[game] = {
            "agent_return": raw[0],
            "dataset_return": raw[1],
            "constant_return": raw[2],
            "agent_episodes": 64,
        }
    summary = {"games": returns, "dataset": data, "parameters": 7, "paper_parameters": 3, "steps": 12_000}
    (folder / "summary.json").write_text(json.dumps(summary | {"steps_per_second": 100.0}))


AGENT, MSE, ZERO = (10.0, 12.0, 14.0), (7.0, 8.0, 9.5), (1.0, 1.0, 1.5)


@pytest.fixture
def outputs(tmp_path):
    for seed in range(3):
        write(tmp_path, AGENT[seed], seed=seed)
        write(tmp_path, MSE[seed], seed=seed, head="mse")
        write(tmp_path, ZERO[seed], seed=seed, rewards="zero")
        write(tmp_path, [3.0, 40.0], seed=seed, rewards="zero", head="mse")
        write(tmp_path, AGENT[seed] + 2, seed=seed, encoder="nature")
    write(tmp_path, 5.0, seed=0, normalize_features=False)
    write(tmp_path, 5.0, seed=1, eval_epsilon=0.5)  # another protocol
    write(tmp_path, 5.0, seed=1, num_steps=5)
    return tmp_path


def test_a_contrast_of_two_is_welchs_and_of_one_students():
    first, second = np.array([3.0, 5.0, 4.5, 7.0, 2.0]), np.array([1.0, 1.5, 0.5])
    welch = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    expected = (first.mean() - second.mean(), welch.low, welch.high)
    assert metrics.contrast([1, -1], [first, second]) == pytest.approx(expected)
    one = stats.ttest_1samp(first, 2.5).confidence_interval(0.95)
    assert metrics.contrast([1, -1], [first, [2.5]])[1:] == pytest.approx((one.low - 2.5, one.high - 2.5))
    assert metrics.contrast([1, -1], [np.ones(3), np.zeros(1)]) == (1, 1, 1)


def test_intervals_of_differences_of_differences_cover_the_truth():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        arms = [rng.normal(mean, spread, n) for mean, spread, n in ((3, 1, 5), (1, 2, 4), (2, 0.5, 5), (1, 1, 3))]
        _, low, high = metrics.contrast([1, -1, -1, 1], arms)
        covered += low <= 1 <= high
    assert 0.92 < covered / 400 < 0.99


def test_a_plain_reading_gives_the_same_effects(outputs):
    which = [one for one in claims.claims() if one.name.startswith(("a: better than its", "c", "d"))]
    table = claims.test(ablations.gather(outputs), SOURCE, which).set_index(["claim", "encoder"])
    row = table.loc[("c: C51 better than MSE", "nature_narrow")]
    welch = stats.ttest_ind(AGENT, MSE, equal_var=False).confidence_interval(0.95)
    assert row[["effect", "low", "high"]].tolist() == pytest.approx([12 - 24.5 / 3, welch.low, welch.high])
    assert row["control"] == pytest.approx(12 - 3.5 / 3) and row["control low"] > 0
    assert row["seeds"] == "3 + 3" and row["minutes"] == pytest.approx(6 * 2) and row["verdict"] == "inconclusive"
    assert row["spread"] == pytest.approx(np.sqrt((np.var(AGENT, ddof=1) + np.var(MSE, ddof=1)) / 2))
    data = table.loc["a: better than its data"]
    assert data["effect"].tolist() == pytest.approx([11, 9])  # of nature, nature_narrow
    assert data["verdict"].tolist() == ["unlearned", "yes"] and np.isnan(data["control"].iloc[0])  # no control
    assert table.loc[("d: feature normalisation helps", ""), "verdict"] == "missing"  # one seed shows no spread


def test_what_did_not_learn_from_reward_supports_nothing(outputs):
    mse, agent, zero = {"head": "mse"}, {}, {"rewards": "zero"}
    which = [
        Claim("contradicted", ((1, zero), (-1, agent))),
        Claim("no better than its control", ((1, mse), (-1, zero))),
        Claim("beaten by what did not learn", ((1, zero), (-1, mse))),
        Claim("supported", ((1, agent), (-1, zero))),
    ]
    table = claims.test(ablations.gather(outputs), SOURCE, which)
    assert table["verdict"].tolist() == ["no", "unlearned", "unlearned", "yes"]  # MSE without rewards scores 21.5
    assert table["low"][1] > 0 and table["control"][1] < 0
    said = claims.verdict(table)
    assert "perhaps no better than without rewards**: no better than its control (nature_narrow); beaten by" in said


def test_one_network_for_all_games_is_compared_with_one_for_each(tmp_path):
    rng = np.random.default_rng(0)
    scores = {
        name: 10 * k + rng.normal(size=(3, 2)) for k, name in enumerate(("alone without", "alone", "without", "both"))
    }
    for seed in range(3):
        write(tmp_path, scores["both"][seed], seed=seed)
        write(tmp_path, scores["without"][seed], seed=seed, alpha=0.0)
        write(tmp_path, ZERO[seed], seed=seed, rewards="zero")
        for k, game in enumerate(GAMES):
            one = {"seed": seed, "view": f"only_{game}", "data": game, "games": [game]}
            write(tmp_path, scores["alone"][seed, k], **one)
            write(tmp_path, scores["alone without"][seed, k], **one, alpha=0.0)
    write(tmp_path, 90.0, seed=3, view="only_Qbert", data="Qbert", games=["Qbert"])  # Breakout's is not there
    gathered = ablations.gather(tmp_path)
    table = claims.test(gathered, SOURCE, claims.together(gathered, SOURCE)).set_index("claim")
    more, better = table.index
    means = {name: each.mean(axis=1) for name, each in scores.items()}
    welch = stats.ttest_ind(means["both"], means["alone"], equal_var=False).confidence_interval(0.95)
    expected = [means["both"].mean() - means["alone"].mean(), welch.low, welch.high]
    assert table.loc[better, ["effect", "low", "high"]].tolist() == pytest.approx(expected)
    gains = [
        means[one].mean() - means[other].mean() for one, other in (("both", "without"), ("alone", "alone without"))
    ]
    assert table.loc[more, "effect"] == pytest.approx(gains[0] - gains[1])
    assert table["seeds"].tolist() == ["3 + 3 + 3 + 3", "3 + 3"] and table.loc[better, "minutes"] == pytest.approx(
        9 * 2
    )
    assert table.loc[better, "verdict"] == "yes"
    kept = claims.save(gathered, SOURCE)
    assert set(kept["run"]) == set(gathered.runs.index)
    write(tmp_path, 5.0, seed=0, view="also_Qbert", data="x", games=["Qbert"])  # which is Qbert's?
    gathered = ablations.gather(tmp_path)
    assert claims.test(gathered, SOURCE, claims.together(gathered, SOURCE))["verdict"].tolist() == ["missing"] * 2


def test_growth_is_asked_of_the_largest_and_the_smallest(tmp_path):
    gains = {"resnet_narrow": 1.0, "resnet34": 2.0, "resnet50": 5.0}
    for number, (encoder, gain) in enumerate(gains.items()):
        for seed in range(3):
            write(tmp_path, 10 + gain + seed, seed=seed, encoder=encoder)
            write(tmp_path, 10 + seed, seed=seed, encoder=encoder, head="mse")
        for file in tmp_path.glob(f"*/*encoder-{encoder}*/summary.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"paper_parameters": number}))
    table = claims.test(gathered := ablations.gather(tmp_path), SOURCE, claims.growing(gathered, SOURCE)).set_index(
        "claim"
    )
    tried = table["verdict"] != "missing"
    assert table.loc[tried, "effect"].to_dict() == pytest.approx({
        "g: score rises with size, resnet_narrow to resnet50": 4,
        "c: C51's lead grows with size, resnet_narrow to resnet50": 4,
    })  # fmt: skip
    assert table.index[~tried].tolist() == ["g: score rises with size, impala", "c: C51's lead grows with size, impala"]


@pytest.mark.parametrize("games", [1, 2, 3, 4, 6, 9])
def test_a_seeds_score_is_the_middle_half_of_its_games(games):
    scores = np.random.default_rng(games).normal(size=(5, games))
    cut = games // 4
    naive = [sum(sorted(row)[cut : games - cut]) / (games - 2 * cut) for row in scores.tolist()]
    assert claims.overall(pd.DataFrame(scores)) == pytest.approx(naive)


def test_arms_of_other_games_or_data_are_refused_and_cut_games_are_named(outputs):
    which = [Claim("c", ((1, {}), (-1, {"head": "mse"})))]
    gathered = ablations.gather(outputs)
    first, scores = gathered.runs.index[gathered.runs["head"] == "mse"][0], gathered.scores
    without = gathered._replace(scores=scores[~((scores["run"] == first) & (scores["game"] == "Qbert"))])
    with pytest.raises(ablations.GatherError, match="not measured in the same games"):
        claims.test(without, SOURCE, which)
    mse = gathered.runs.index[gathered.runs["head"] == "mse"]
    without = gathered._replace(scores=scores[~(scores["run"].isin(mse) & (scores["game"] == "Qbert"))])
    with pytest.raises(ablations.GatherError, match="different games"):
        claims.test(without, SOURCE, which)
    other = gathered._replace(runs=gathered.runs.assign(data_id=np.where(gathered.runs["head"] == "mse", "b", "a")))
    with pytest.raises(ablations.GatherError, match="different contents"):
        claims.test(other, SOURCE, which)
    cut = gathered._replace(scores=scores.assign(cut=(scores["run"] == first) & (scores["game"] == "Qbert")))
    table = claims.test(cut, SOURCE, which)
    assert table["without"].tolist() == ["Qbert"] and "without" in claims.shown(table)
    zero = gathered.runs.index[gathered.runs["rewards"] == "zero"]
    cut = gathered._replace(scores=scores.assign(cut=scores["run"].isin(zero) & (scores["game"] == "Qbert")))
    assert claims.test(cut, SOURCE, which)["effect"].equals(claims.test(gathered, SOURCE, which)["effect"])
    nothing = gathered._replace(scores=scores.assign(cut=True))
    assert claims.test(nothing, SOURCE, which)["verdict"].tolist() == ["missing"]


def test_pretraining_helps_only_above_pretraining_without_rewards():
    arms = {"scratch": 1, "Scaled QL, frozen": 9, "Scaled QL, zero rewards, frozen": 9, "Scaled QL, fine-tuned": 9}
    rows = [
        {"arm": arm, "learning_rate": 1e-3, "seed": seed, "game": "Pong", "mode": -1, "difficulty": 2, "cut": False,
         "agent_return": score + seed / 9, "dataset_return": 3.0, "truncated_share": 0.0, "distance": "near"}
        for arm, score in arms.items() for seed in range(3)
    ]  # fmt: skip
    table = claims.transferred(pd.DataFrame(rows)).set_index("arm")
    assert table["claim"].unique().tolist() == ["h: Pong, difficulty 2, offline"]
    verdicts = {"Scaled QL, frozen": "unlearned", "Scaled QL, zero rewards, frozen": "control"}
    assert table["verdict"].to_dict() == verdicts | {"Scaled QL, fine-tuned": "yes"}
    assert claims.transferred(pd.DataFrame(rows[:1])).empty


def test_scores_in_one_file_replace_the_runs(outputs, tmp_path):
    file = tmp_path / "scores.csv"
    arguments = ["runs", "scores", f"params/04_scaled_training/{SOURCE}", str(file), "--outputs", str(outputs)]
    result = CliRunner().invoke(command.main, arguments, catch_exceptions=False)
    assert result.output == f"16 runs in {file}\n"
    gathered, (again, source) = ablations.gather(outputs), claims.read(file)
    assert source == SOURCE and not again.runs["eval_epsilon"].eq(0.5).any()
    kept = gathered.runs.loc[again.runs.index]
    pd.testing.assert_frame_equal(again.runs.drop(columns="run"), kept.drop(columns="run"), check_dtype=False)
    pd.testing.assert_frame_equal(claims.test(again, SOURCE), claims.test(gathered, SOURCE))
    variants, few = {"C51": {}, "MSE": {"head": "mse"}}, {"replicates": 100}
    tables = [ablations.compare(which, ablations.base(SOURCE), variants, **few) for which in (gathered, again)]
    pd.testing.assert_frame_equal(*(table.drop(columns=["otherwise"]) for table in tables), check_dtype=False)
    for words in pd.read_csv(file)["command"].map(shlex.split):
        values = dict(zip(words[5::3], words[6::3]))
        (step,) = command._steps(words[2], words[3], command._overrides(tuple(values.items())))
        assert step.cells[0].run == values.get("run", "five_seeds")  # the command is one


def test_a_file_of_other_columns_or_of_two_bases_is_refused(outputs, tmp_path):
    table = claims.save(ablations.gather(outputs), SOURCE)
    (tmp_path / "old.csv").write_text(table.drop(columns="command").to_csv(index=False))
    with pytest.raises(ValueError, match=r"old.csv: no columns command; write it with scaled-ql runs scores"):
        claims.read(tmp_path / "old.csv")
    table.loc[0, "command"] = table["command"][0].replace(SOURCE, "quickstart.yaml")
    table.loc[0, "run"] = "other"
    table.to_csv(tmp_path / "two.csv", index=False)
    with pytest.raises(parameters.ParameterError, match="one base"):
        claims.read(tmp_path / "two.csv")


def test_a_difference_that_is_detectable_is_found_four_times_in_five():
    for seeds, weights in ((5, (1, -1)), (10, (1, -1)), (5, (1,)), (5, (1, -1, -1, 1))):
        difference, freedom = claims.detectable(2.0, seeds, weights), len(weights) * (seeds - 1)
        shift = difference / (2.0 * np.sqrt(len(weights) / seeds))
        power = stats.nct.sf(stats.t.ppf(0.975, freedom), freedom, shift)
        assert power == pytest.approx(0.8, abs=0.02)


def test_a_budget_says_what_the_pilot_can_detect(outputs):
    table = claims.test(ablations.gather(outputs), SOURCE)
    row = claims.budget(table).set_index(["claim", "encoder"]).loc[("c: C51 better than MSE", "nature_narrow")]
    assert row["minutes a run"] == pytest.approx(2) and row["seeds"] == 3
    assert "device" not in row and row["devices"] == ""  # these runs did not record them
    needed = int(row["seeds for 5 points"])
    assert claims.detectable(row["spread"], needed) <= 5 < claims.detectable(row["spread"], needed - 1)


def test_the_gallerys_scores_are_what_the_reports_say(workspace: Path):
    gallery = workspace / "outputs" / "gallery"
    rung, source = claims.read(gallery / "scores_quickstart.csv")
    table = claims.test(rung, source).set_index(["claim", "encoder"])
    assert table.loc[("a: better than its data", "nature_narrow"), "verdict"] == "yes"
    assert table.loc[("b: better than cloning", "nature_narrow"), "seeds"] == "5 + 5"
    readme = " ".join((workspace / "README.md").read_text().split())
    for claim in ("a: better than its data", "b: better than a clone that samples", "c: C51 better than MSE"):
        row = table.loc[(claim, "nature_narrow")]
        assert f"{row['effect']:.1f} ({row['low']:.1f} to {row['high']:.1f}" in readme
    default = parameters.check("08_paper_report", {}).scores
    assert sorted(default) == sorted(f"outputs/gallery/{file.name}" for file in gallery.glob("scores_*.csv"))
    second, base = claims.read(gallery / "scores_six_games.csv")
    assert base == "six_games_500k.yaml" and sorted(second.scores["game"].unique()) == sorted(
        ["Assault", "Boxing", "Breakout", "DemonAttack", "KungFuMaster", "Qbert"]
    )
    tried = claims.test(second, base).set_index("claim")
    for claim in ("a: better than its data", "a: better than the best constant action"):
        row = tried.loc[claim]
        assert row["seeds"] == "5" and f"{row['effect']:.1f} ({row['low']:.1f} to {row['high']:.1f}" in readme
    assert list(claims.players(second, base).index) == sorted(second.scores["game"].unique())
    transferred = claims.transferred(pd.read_csv(workspace / "outputs" / "gallery" / "transfer.csv"))
    assert {name[0] for name in transferred["claim"]} == {"h", "i"}
    assert "effect, 95% interval" in claims.shown(transferred)
