"""Gathering and comparing runs: what takes part, what is refused, what is missing, and the numbers."""

import json
import shlex
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml

from scaled_ql import ablations, batches, metrics, parameters, plots, runs
from scaled_ql.games import reference_score

BASE = parameters.check("04_scaled_training", {"run": "base", "encoder": "nature", "alpha": 1.0})
GAMES = ("Breakout", "Freeway", "Pong")
VARIANTS = {"MSE": {"head": "mse"}, "C51": {}}
FEW = {"replicates": 200}


def write(outputs, name, scores, *, state="finished", data="abc", **changes):
    """A run's folder, with human-normalised scores of GAMES."""
    folder = outputs / "04_scaled_training" / name
    folder.mkdir(parents=True)
    values = BASE.model_dump() | changes | {"run": name}
    (folder / "parameters.yaml").write_text(yaml.safe_dump(values))
    (folder / "status.json").write_text(json.dumps({"state": state}))
    if state == "finished":
        returns = {}
        for game, score in scores.items():
            random, human = (
                reference_score(game, who) if game in GAMES else who == "human" for who in ("random", "human")
            )
            returns[game] = {"agent_return": random + score * (human - random), "agent_episodes": 3}
        summary = {
            "games": returns,
            "dataset": data,
            "parameters": 72_600_000,
            "steps": 5,
            "paper_parameters": 30_700_000,
        }
        (folder / "summary.json").write_text(json.dumps(summary))


def scores_of(*values):
    return dict(zip(GAMES, values))


@pytest.fixture
def outputs(tmp_path):
    """Three seeds of the base, two of MSE, one with another encoder; and one that is running, one that failed."""
    for seed, values in enumerate([(0.1, 0.2, 0.3), (0.2, 0.4, 0.9), (0.3, 0.3, 0.6)]):
        write(tmp_path, f"base.seed-{seed}", scores_of(*values), seed=seed)
    for seed, values in enumerate([(0.0, 0.1, 0.2), (0.1, 0.0, 0.1)]):
        write(tmp_path, f"base.head-mse.seed-{seed}", scores_of(*values), seed=seed, head="mse")
    write(tmp_path, "base.encoder", scores_of(0.5, 0.5, 0.5), encoder="resnet_narrow")
    write(tmp_path, "under-way", {}, state="running", seed=7)
    write(tmp_path, "broken", {}, state="failed", seed=8)
    (tmp_path / "04_scaled_training" / "broken" / "metrics.jsonl").write_text('{"step": 1}\n')
    return tmp_path


def test_unfinished_and_failed_runs_are_named_and_left_out(outputs: Path) -> None:
    (outputs / "04_scaled_training" / "old").mkdir()
    (outputs / "04_scaled_training" / "old" / "parameters.yaml").write_text("heda: mse\n")
    (outputs / "04_scaled_training" / "old" / "status.json").write_text('{"state": "finished"}')
    write(outputs, "half", {})
    (outputs / "04_scaled_training" / "half" / "status.json").write_text("")
    write(outputs, "nothing", {}, state="failed")  # it failed before it recorded anything: no run
    write(outputs, "encoder", {}, method="mae", encoder="vit_tiny")
    gathered = ablations.gather(outputs)
    assert len(gathered.runs) == 6
    why = gathered.left_out.set_index("run")["why"]
    assert set(why.index) == {"under-way", "broken", "old", "half", "encoder"}
    assert why["encoder"] == "its network cannot play"
    assert "status.json: cannot be read as JSON" in why["half"]
    assert why["under-way"] == "running" and why["broken"] == "failed" and "did you mean head" in why["old"]
    assert len(gathered.scores) == 18


def test_compared_scores_are_what_a_plain_reading_gives(outputs: Path) -> None:
    gathered = ablations.gather(outputs)
    encoders = {"encoder": ["nature", "resnet_narrow"]}
    table = ablations.compare(gathered, BASE, VARIANTS, encoders, statistic=metrics.median, **FEW)
    assert list(table["variant"]) == ["MSE", "C51", "MSE", "C51"]
    assert list(table["runs"]) == [2, 3, 0, 1]
    assert list(table["seeds"]) == ["0, 1", "0, 1, 2", "", "0"]
    assert table["score"].tolist() == pytest.approx([0.05, 0.3, np.nan, 0.5], nan_ok=True)
    assert list(table["over"]) == ["runs", "runs", "", "tasks"]
    known = table.dropna(subset="score")
    assert ((known["low"] <= known["score"]) & (known["score"] <= known["high"])).all()
    shown = ablations.shown(table, ablations.paper_table("1", "median"))
    assert list(shown.loc[shown["encoder"] == "resnet_narrow", "score, %"]) == ["missing", "50.0"]
    assert shown.loc[(shown["variant"] == "C51") & (shown["encoder"] == "resnet101"), "paper, %"].tolist() == [98.9]


def test_differences_and_their_verdicts(outputs: Path) -> None:
    gathered = ablations.gather(outputs)
    table = ablations.compare(gathered, BASE, VARIANTS, {"encoder": ["nature", "resnet_narrow"]}, **FEW)
    both = [ablations.difference(gathered, table, *pair, **FEW) for pair in (("C51", "MSE"), ("MSE", "C51"))]
    assert [list(one["verdict"]) for one in both] == [["yes", "missing"], ["no", "missing"]]
    row = both[0].iloc[0]
    assert row["low"] > 0 and row["low"] <= row["difference"] <= row["high"]
    assert row["improvement"] == pytest.approx(
        metrics.probability_of_improvement(
            np.array([[0.1, 0.2, 0.3], [0.2, 0.4, 0.9], [0.3, 0.3, 0.6]]), np.array([[0, 0.1, 0.2], [0.1, 0, 0.1]])
        )
    )
    said = ablations.verdicts(pd.concat(both))
    assert said[0].startswith("**C51 > MSE** (nature): supported here; difference +")
    assert said[1] == "**C51 > MSE** (resnet_narrow): not tried here, runs are missing."
    assert "contradicted" in said[2]


def test_overlapping_scores_cannot_be_told_apart(tmp_path: Path) -> None:
    for seed, (one, other) in enumerate([(0.1, 0.3), (0.3, 0.1), (0.2, 0.2)]):
        write(tmp_path, f"a{seed}", scores_of(one, one, one), seed=seed)
        write(tmp_path, f"b{seed}", scores_of(other, other, other), seed=seed, head="mse")
    gathered = ablations.gather(tmp_path)
    table = ablations.compare(gathered, BASE, VARIANTS, **FEW)
    assert list(ablations.difference(gathered, table, "C51", "MSE", **FEW)["verdict"]) == ["inconclusive"]


def test_missing_runs_are_commands_that_make_them(outputs: Path) -> None:
    gathered = ablations.gather(outputs)
    table = ablations.compare(gathered, BASE, VARIANTS, {"encoder": ["nature", "resnet_narrow"]}, **FEW)
    commands = ablations.missing(table, BASE, "base.yaml", VARIANTS, "encoder", [0, 1, 2])
    assert len(commands) == 1 + 3 + 2
    made = []
    for command in commands:
        words = shlex.split(command)
        assert words[:4] == ["scaled-ql", "run", "04_scaled_training", "params/04_scaled_training/base.yaml"]
        given = {name: yaml.safe_load(value) for flag, name, value in zip(*[iter(words[4:])] * 3)}
        values = parameters.check("04_scaled_training", BASE.model_dump() | given)
        made.append((values.head, values.encoder, values.seed))
    assert made[0] == ("mse", "nature", 2)
    assert set(made[1:4]) == {("mse", "resnet_narrow", seed) for seed in range(3)}
    assert set(made[4:]) == {("c51", "resnet_narrow", seed) for seed in (1, 2)}


def test_two_runs_of_one_seed_are_refused(outputs: Path) -> None:
    write(outputs, "again", scores_of(1, 1, 1), seed=1)
    with pytest.raises(ablations.GatherError, match=r"again, base\.seed-1|base\.seed-1, again"):
        ablations.compare(ablations.gather(outputs), BASE, VARIANTS, **FEW)


def test_runs_on_other_contents_of_the_dataset_are_refused(outputs: Path) -> None:
    write(outputs, "elsewhere", scores_of(1, 1, 1), seed=9, data="xyz")
    with pytest.raises(ablations.GatherError, match="xyz: elsewhere"):
        ablations.compare(ablations.gather(outputs), BASE, VARIANTS, **FEW)


def test_runs_of_another_protocol_are_another_comparison(outputs: Path) -> None:
    write(outputs, "shorter", scores_of(1, 1, 1), seed=9, eval_max_steps=5)
    write(outputs, "view", scores_of(1, 1, 1), seed=9, view="half")
    table = ablations.compare(ablations.gather(outputs), BASE, VARIANTS, **FEW)
    assert list(table["runs"]) == [2, 3]


def test_a_claim_whose_runs_were_evaluated_otherwise_is_refused_and_names_them(outputs: Path) -> None:
    write(outputs, "other-0", scores_of(1, 1, 1), encoder="impala_x1", eval_max_steps=5)
    for seed in (0, 1):
        write(outputs, f"aside-{seed}", scores_of(1, 1, 1), seed=seed, eval_epsilon=0.5)
        write(outputs, f"impala-{seed}", scores_of(0, 0, 0), seed=seed, encoder="impala_x1", head="mse")
    gathered = ablations.gather(outputs)
    table = ablations.compare(gathered, BASE, VARIANTS, {"encoder": ["nature", "impala_x1"]}, **FEW)
    differences = ablations.difference(gathered, table, "C51", "MSE", **FEW)
    assert list(differences["verdict"]) == ["yes", "refused"], "with seeds enough, others are another comparison"
    said = ablations.verdicts(differences)
    assert said[1] == (
        "**C51 > MSE** (impala_x1): no verdict, these runs were evaluated otherwise: "
        "other-0 (eval_max_steps 5, not 27000)."
    )
    assert "aside" not in said[0]


def test_sizes_are_the_papers_count_with_the_total_beside(outputs: Path) -> None:
    folder = outputs / "04_scaled_training" / "base.encoder"
    summary = json.loads((folder / "summary.json").read_text())
    del summary["paper_parameters"]  # as in runs before it was recorded
    (folder / "summary.json").write_text(json.dumps(summary))
    encoders = {"encoder": ["nature", "resnet_narrow", "impala_x1"]}
    table = ablations.compare(ablations.gather(outputs), BASE, {"C51": {}}, encoders, **FEW)
    shown = ablations.shown(table)
    assert list(shown["parameters, millions"]) == ["30.7", "", ""]
    assert list(shown["in all, millions"]) == ["72.6", "72.6", ""]


def cut_short(outputs: Path, run: str, game: str, percent: float) -> None:
    """As a run whose episodes in a game were truncated says it."""
    file = outputs / "04_scaled_training" / run / "summary.json"
    summary = json.loads(file.read_text())
    summary["games"][game]["truncated_percent"] = percent
    file.write_text(json.dumps(summary))


def test_a_game_of_mostly_truncated_episodes_counts_in_no_score(outputs: Path) -> None:
    short = {"eval_max_steps": 600}
    for seed, values in enumerate([(0.1, 0.2, 0.9), (0.3, 0.4, 0.9)]):
        write(outputs, f"short.c51.seed-{seed}", scores_of(*values), seed=seed, **short)
        write(outputs, f"short.mse.seed-{seed}", scores_of(0.0, 0.1, 0.9), seed=seed, head="mse", **short)
    cut_short(outputs, "short.mse.seed-1", "Pong", 60.0)
    cut_short(outputs, "short.c51.seed-0", "Freeway", 50.0)
    base = BASE.model_copy(update=short)
    gathered = ablations.gather(outputs)
    table = ablations.compare(gathered, base, VARIANTS, statistic=metrics.mean, **FEW).set_index("variant")
    assert table["score"].to_dict() == pytest.approx({"MSE": 0.05, "C51": 0.25}), "of Breakout and Freeway"
    assert table["truncated"].to_dict() == pytest.approx({"MSE": 0.1, "C51": 0.5 / 6})
    shown = ablations.shown(table.reset_index())
    assert list(shown["truncated, %"]) == ["10", "8"] and list(shown["without, as cut short"]) == ["Pong", "Pong"]
    (row,) = ablations.difference(gathered, table.reset_index(), "C51", "MSE", statistic=metrics.mean, **FEW).to_dict(
        "records"
    )
    assert row["difference"] == pytest.approx(0.2)
    raw = ablations.per_game(gathered, table.reset_index())
    assert raw["MSE, truncated %"].to_dict() == {"Breakout": 0, "Freeway": 0, "Pong": 30}


def test_nothing_follows_where_every_game_was_cut_short(outputs: Path) -> None:
    for seed in range(2):
        for head in ("c51", "mse"):
            name = f"short.{head}.seed-{seed}"
            write(outputs, name, scores_of(0.1, 0.2, 0.9), seed=seed, head=head, eval_max_steps=600)
            for game in GAMES:
                cut_short(outputs, name, game, 100.0)
    gathered, base = ablations.gather(outputs), BASE.model_copy(update={"eval_max_steps": 600})
    compared = ablations.compare(gathered, base, VARIANTS, **FEW)
    shown = ablations.shown(compared)
    assert list(shown["score, %"]) == ["none", "none"] and list(shown["of"]) == ["2 runs", "2 runs"]
    found = ablations.difference(gathered, compared, "C51", "MSE", **FEW)
    assert list(found["verdict"]) == ["no score"]
    runs = ", ".join(f"short.{head}.seed-{seed}" for head in ("c51", "mse") for seed in range(2))
    assert ablations.verdicts(found) == [f"**C51 > MSE**: no verdict, most episodes were cut short in {runs}."]
    plots.ablation(compared)
    plt.close("all")


def test_a_game_without_reference_scores_is_left_out_of_normalised_scores(tmp_path: Path) -> None:
    write(tmp_path, "a", scores_of(0.1, 0.2, 0.3) | {"Adventure": 5.0})
    gathered = ablations.gather(tmp_path)
    assert list(ablations.score_matrix(gathered, ["a"]).columns) == list(GAMES)
    table = ablations.compare(gathered, BASE, {"C51": {}}, **FEW)
    assert list(ablations.per_game(gathered, table).index) == ["Adventure", *GAMES]


def test_nothing_to_gather(tmp_path: Path) -> None:
    gathered = ablations.gather(tmp_path)
    assert len(gathered.runs) == len(gathered.scores) == len(gathered.left_out) == 0
    table = ablations.compare(gathered, BASE, VARIANTS, {"encoder": ["nature"]}, **FEW)
    assert table["score"].isna().all()
    assert list(ablations.shown(table)["score, %"]) == ["missing", "missing"]
    assert ablations.per_game(gathered, table).empty
    assert list(ablations.difference(gathered, table, "C51", "MSE", **FEW)["verdict"]) == ["missing"]


def test_the_most_frequent_action_is_counted_over_runs_and_games(outputs):
    for run, counts in (("base.seed-0", "9,1"), ("base.seed-1", "2,8")):
        folder = outputs / "04_scaled_training" / run / "evaluation" / "step-5"
        folder.mkdir(parents=True)
        (folder / "Pong.csv").write_text(f"episode_return,action_NOOP,action_UP\n1.0,{counts}\n")
    compared = ablations.compare(ablations.gather(outputs), BASE, VARIANTS, **FEW).set_index("variant")
    assert compared.loc["C51", "top_action"] == pytest.approx(0.85)
    assert list(ablations.shown(compared.reset_index())["most frequent action, %"]) == ["", "85"]


def test_a_run_with_a_loss_of_its_own_is_no_run_of_its_parameters(outputs):
    file = outputs / "04_scaled_training" / "base.seed-1" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"as_parameters_say": False}))
    gathered = ablations.gather(outputs)
    assert "base.seed-1" not in gathered.runs.index and len(gathered.runs) == 5
    assert "a loss that its parameters do not name" in gathered.left_out.set_index("run").loc["base.seed-1", "why"]


@pytest.mark.parametrize(("batch", "report"), [("transformer", "default"), ("transformer_small", "ablations_small")])
def test_a_batch_trains_what_the_tables_of_transformers_compare(batch: str, report: str) -> None:
    home = runs.workspace() / "params"
    p = parameters.check("05_ablations", parameters.load(home / "05_ablations" / f"{report}.yaml"))
    steps = batches.load_batch(home / "batches" / f"{batch}.yaml", {})
    (trained,) = [step.cells for step in steps if step.notebook == "04_scaled_training"]

    def relevant(run: parameters.Parameters) -> dict:
        return {name: value for name, value in run.model_dump().items() if name not in parameters.INCIDENTAL}

    known, base = [relevant(run) for run in trained], ablations.base(p.forty_games)
    compared = ablations.transformer_q_learning(p.vit, p.resnet) | ablations.imitation_by_transformers(p.transformer)
    for label, changes in compared.items():
        wanted = parameters.check("04_scaled_training", base.model_dump() | changes)
        assert relevant(wanted) in known, label
