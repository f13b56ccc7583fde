"""Figures of tidy tables: what is drawn is what the table says."""

from collections.abc import Iterator
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from stacks import batch_of_stacks, windows

from scaled_ql import plots
from scaled_ql.games import TRAINING_GAMES
from scaled_ql.metrics import iqm


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def qualities(games: list[str], scores: np.ndarray, clipped: bool = False) -> pd.DataFrame:
    """One row per game and part; scores [games, parts]."""
    parts = (np.arange(scores.shape[1]) + 0.5) / scores.shape[1]
    return pd.concat(
        pd.DataFrame({"game": game, "fraction": parts, "human_normalized": row, "clipped": clipped})
        for game, row in zip(games, scores)
    )


def test_quality_over_time_draws_each_game_and_their_iqm() -> None:
    scores = np.array([[0.0, 0.1], [0.2, 0.4], [0.4, 0.8], [np.nan, 9.0]])
    axis = plots.quality_over_time(qualities(["Pong", "Breakout", "Qbert", "Alien"], scores)).axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    np.testing.assert_allclose(lines["Qbert"].get_ydata(), [0.4, 0.8])
    np.testing.assert_allclose(lines["Alien"].get_ydata(), [9.0])
    np.testing.assert_allclose(lines["IQM over 4 games"].get_ydata(), [0.2, (0.4 + 0.8) / 2])
    assert [line.get_xdata()[0] for line in axis.lines if list(line.get_xdata()) == [0.2, 0.2]] == [0.2]
    assert axis.texts[0].get_text() == "first 20%"
    assert axis.get_title() == ""
    assert axis.get_ylim()[1] > 9, "few games are all shown"


def test_a_single_game_is_its_own_middle_and_an_unknown_one_has_none() -> None:
    alone = plots.quality_over_time(qualities(["Pong"], np.array([[0.0, 0.1]]))).axes[0]
    assert [text.get_text() for text in alone.get_legend().get_texts()] == ["Pong"]
    np.testing.assert_allclose(alone.lines[1].get_ydata(), [0, 0.1])
    unknown = plots.quality_over_time(qualities(["Tetris"], np.array([[np.nan, np.nan]]))).axes[0]
    assert len(unknown.lines[0].get_ydata()) == 0


def test_forty_games_are_grey_and_one_of_them_does_not_flatten_the_rest() -> None:
    scores = np.random.default_rng(0).uniform(0, 1, (40, 20))
    scores[3] = 500
    axis = plots.quality_over_time(qualities(list(TRAINING_GAMES), scores, clipped=True)).axes[0]
    np.testing.assert_allclose(axis.lines[40].get_ydata(), [iqm(part) for part in scores.T])
    assert len({line.get_color() for line in axis.lines[:40]}) == 1
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["IQM over 40 games"]
    assert 0.9 < axis.get_ylim()[1] < 2
    assert "clipped in 40 of 40 games" in axis.get_title()


def test_returns_of_incomplete_episodes_are_crosses_outside_the_mean() -> None:
    episodes = pd.DataFrame(
        {"game": "Pong", "run": [1, 1, 2, 2], "start": [0, 5, 0, 5], "episode_return": [1.0, 90, 3, 4],
         "incomplete": [False, True, False, False]}
    )  # fmt: skip
    axis = plots.returns_over_time(episodes).axes[0]
    dots, crosses = (points.get_offsets().tolist() for points in axis.collections)
    assert dots == [[0, 1], [0, 3], [5, 4]]
    assert crosses == [[5, 90]]
    assert [line.get_ydata().tolist() for line in axis.lines] == [[1], [3, 4]], "a line for each run"
    plain = plots.returns_over_time(episodes[["game", "start", "episode_return"]]).axes[0]
    assert len(plain.collections[0].get_offsets()) == 4
    assert plain.get_legend() is None


def test_lengths_are_stacked_by_how_an_episode_begins_and_ends() -> None:
    episodes = pd.DataFrame(
        {"game": "Pong", "length": [10, 10, 10, 10, 10], "truncated": [False, False, True, True, False],
         "continued": [False, False, False, True, True]}
    )  # fmt: skip
    axis = plots.episode_lengths(episodes).axes[0]
    heights = [sum(patch.get_height() for patch in bars) for bars in axis.containers]
    assert heights == [2, 1, 2]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "ended in the game", "truncated", "beginning lost",
    ]  # fmt: skip
    plain = plots.episode_lengths(episodes[["game", "length"]]).axes[0]
    assert sum(patch.get_height() for patch in plain.patches) == 5
    assert plain.get_legend() is None


@pytest.mark.parametrize("number, columns", [(1, 1), (2, 2), (6, 3), (12, 4), (40, 4)])
def test_panels_stand_in_rows_of_at_most_four(number: int, columns: int) -> None:
    games = list(TRAINING_GAMES[:number])
    episodes = pd.DataFrame({"game": games, "start": 0, "episode_return": 1.0})
    figure = plots.returns_over_time(episodes)
    assert figure.axes[0].get_gridspec().ncols == columns
    assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == games
    assert figure.get_figwidth() < 13


def test_scores_name_every_bar_and_show_every_episode() -> None:
    table = pd.DataFrame({"random": [1.0], "dataset": [12.0], "agent": [20.0], "human": [30.0]}, index=["Breakout"])
    episodes = pd.DataFrame({"game": ["Breakout"] * 3, "episode_return": [10.0, 20.0, 30.0]})
    axis = plots.scores(table, episodes).axes[0]
    axis.figure.draw_without_rendering()
    labels = {tick.get_position()[0]: tick.get_text() for tick in axis.get_xticklabels()}
    bars = {labels[bar.get_x() + bar.get_width() / 2]: bar.get_height() for bar in axis.patches}
    assert bars == {"random": 1, "dataset": 12, "agent": 20, "human": 30}
    dots = axis.collections[0].get_offsets()
    assert {labels[x] for x in dots[:, 0]} == {"agent"} and dots[:, 1].tolist() == [10, 20, 30]


def test_a_score_curve_has_a_panel_per_game_with_the_datas_mean() -> None:
    curve = pd.DataFrame({"game": ["Pong", "Pong", "Qbert"], "step": [10, 20, 20], "agent_return": [-3.0, 2.0, 50.0]})
    curve["truncated"] = [0.75, 0.5, 0.0]
    pong, qbert = plots.score_curve(curve, pd.Series({"Pong": -20.0, "Qbert": 70.0})).axes
    assert pong.get_title() == "Pong" and qbert.get_title() == "Qbert"
    assert [line.get_xydata().tolist() for line in pong.lines[:1]] == [[[10, -3], [20, 2]]]
    assert set(pong.lines[1].get_ydata()) == {-20} and set(qbert.lines[1].get_ydata()) == {70}
    assert pong.lines[2].get_xydata().tolist() == [[10, -3]], "mostly truncated"


def test_scaling_is_by_the_papers_count_and_says_what_impala_is() -> None:
    table = pd.DataFrame(
        {"variant": "C51", "encoder": ["resnet50", "resnet34", "impala_x4", "nature"], "score": [0.6, 0.4, 0.3, 0.1],
         "low": 0.0, "high": 1.0, "paper_parameters": [61e6, 31e6, 2e6, np.nan], "num_parameters": 100e6}
    )  # fmt: skip
    axis = plots.scaling(table).axes[0]
    lines = {container.get_label(): container.lines[0].get_xydata().tolist() for container in axis.containers}
    assert lines == {"ResNet, C51": [[31, 0.4], [61, 0.6]], "IMPALA with this recipe, C51": [[2, 0.3]]}
    assert "encoder and first dense layer" in axis.get_xlabel()


def test_learning_curves_are_those_of_the_methods_metrics_and_a_single_row_is_a_point() -> None:
    row = {
        "step": 5.0,
        "nll": 1.0,
        "nll/Pong": 1.0,
        "nll/Qbert": np.nan,
        "accuracy": 0.5,
        "grad_norm": 0.1,
        "loss": 1.0,
    }
    figure = plots.learning_curves(pd.DataFrame([row]), {"nll": "likelihood", "accuracy": "right", "other": "absent"})
    assert [axis.get_title() for axis in figure.axes] == ["likelihood", "right", "gradient norm"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["Pong", "Qbert", "all"]
    assert all(line.get_marker() == "o" for axis in figure.axes for line in axis.lines)


def test_a_line_for_each_block_and_their_mean() -> None:
    rows = pd.DataFrame({"step": [1.0, 2.0], "td_loss": 1.0, "entropy": 2.0, "attention_entropy": 0.5})
    rows = rows.assign(attention_entropy_1=[0.4, 0.3], attention_entropy_2=[0.6, 0.7], attention_entropy_11=0.5)
    titles = {"td_loss": "loss", "entropy": "of returns", "attention_entropy": "attention"}
    drawn = [[list(line.get_ydata()) for line in axis.lines] for axis in plots.learning_curves(rows, titles).axes]
    assert drawn == [[[1, 1]], [[2, 2]], [[0.4, 0.3], [0.6, 0.7], [0.5, 0.5], [0.5, 0.5]]]


def test_transitions_say_action_reward_and_whether_there_is_a_bootstrap() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 84, 84, 4), np.uint8)
    batch = batch_of_stacks(
        frames[0], np.int32([1, 0, 2]), np.float32([0.5, 0, -1]), np.float32([0.97, 0, 0.97]), frames[1],
        np.int32([0, 1, 1]),
    )  # fmt: skip
    figure = plots.transitions(batch, ["Pong", "Qbert"], {"Pong": ["NOOP", "UP"], "Qbert": ["NOOP", "UP", "LEFT"]})
    above, below = ([axis.get_title() for axis in figure.axes[i : i + 3]] for i in (0, 3))
    assert above == ["Pong\nUP", "Qbert\nNOOP", "Qbert\nLEFT"]
    assert below == ["reward 0.5\ndiscount 0.970", "reward 0\nterminal: no bootstrap", "reward -1\ndiscount 0.970"]
    shown = figure.axes[1].images[0].get_array()
    np.testing.assert_array_equal(shown, frames[0, 1, :, :, -1])


def test_windows_say_what_was_done_in_each_step_and_what_is_to_come() -> None:
    batch = windows(2, 2)
    batch.action[:], batch.reward[:], batch.return_to_go[:] = [[0, 3], [1, 2]], [[0, 1], [-1, 0]], [[1, 1], [4, 5]]
    batch.terminal[0, 1] = True
    titles = [axis.get_title() for axis in plots.batch(batch, ["Pong", "Qbert"], {}).axes]
    assert titles == [
        "Pong\nbefore the episode\nreward 0, to go 1", "RIGHT\nreward 1, end, to go 1",
        "Qbert\nFIRE\nreward -1, to go 4", "UP\nreward 0, to go 5",
    ]  # fmt: skip
    batch.return_to_go[:] = np.nan  # of a method that does not ask for it
    assert plots.batch(batch, ["Pong", "Qbert"], {}).axes[1].get_title() == "RIGHT\nreward 1, end"


def test_predicted_and_target_distributions_share_a_panel() -> None:
    atoms = np.linspace(-2, 2, 5)
    figure = plots.predicted_and_target(np.full((2, 5), 0.2), np.eye(5)[[0, 3]], atoms, ["a", "b"])
    panel = figure.axes[1]
    predicted, _, target, mean = panel.lines
    np.testing.assert_allclose(predicted.get_ydata(), 0.2)
    np.testing.assert_array_equal(target.get_ydata(), [0, 0, 0, 1, 0])
    np.testing.assert_allclose(mean.get_xdata(), 1)


ATOMS = np.linspace(-3, 3, 13)
NORMAL = np.exp(-(ATOMS**2) / 2) / np.exp(-(ATOMS**2) / 2).sum()
ACTIONS = ["NOOP", "FIRE", "RIGHT", "LEFT"]


def test_a_transition_shows_both_stacks_with_their_times_and_weighs_its_rewards() -> None:
    frames = np.arange(8, dtype=np.uint8)[:, None, None] * np.ones((1, 84, 84), np.uint8)
    now, then = frames[:4].transpose(1, 2, 0), frames[4:].transpose(1, 2, 0)
    figure = plots.transition(now, then, np.array([0, 0, 1.0]), 0.5, "LEFT")
    *pictures, bars = figure.axes
    assert [axis.images[0].get_array()[0, 0] for axis in pictures] == list(range(8))
    assert [axis.get_title() for axis in pictures] == ["t-3", "t-2", "t-1", "t", "t", "t+1", "t+2", "t+3"]
    assert [bar.get_height() for bar in bars.patches] == [0, 0, 0.25]
    assert bars.lines[0].get_ydata().tolist() == [1, 0.5, 0.25]


def test_frames_have_one_scale_and_their_names() -> None:
    axes = plots.frames({"black": np.zeros((84, 84)), "grey": np.full((84, 84), 128)}).axes
    assert [axis.get_title() for axis in axes] == ["black", "grey"]
    assert {axis.images[0].get_clim() for axis in axes} == {(0, 255)}


@pytest.mark.parametrize("heads", [["Pong"], ["Alien", "Pong"], list(TRAINING_GAMES)])
def test_the_network_has_a_box_for_each_layer_and_for_the_heads(heads: list[str]) -> None:
    layers = pd.DataFrame(
        {"layer": ["observation", "encoder", "heads"], "output": ["84 × 84 × 4", "11 × 11 × 32", "18 × 51"],
         "parameters": [0, 1_000, 80 * len(heads)]}
    )  # fmt: skip
    axis = plots.network(layers, heads).axes[0]
    words = [text.get_text() for text in axis.texts if text.get_text()]
    assert len(axis.patches) == len(words) == 2 + min(len(heads), 4)
    assert "1,000" in words[1] and "84 × 84 × 4" in words[0]
    assert "18 × 51" in words[-1] and heads[-1] in words[-1]


def test_distributions_lie_over_their_atoms_with_means_and_a_gradient_below() -> None:
    shifted = np.roll(NORMAL, 2)
    above, below = plots.over_atoms(ATOMS, {"predicted": NORMAL, "target": shifted}, NORMAL - shifted).axes
    np.testing.assert_allclose(above.lines[0].get_ydata(), NORMAL)
    assert above.lines[3].get_xdata()[0] == pytest.approx(shifted @ ATOMS)
    assert "predicted, mean" in above.get_legend().get_texts()[0].get_text()
    lowered, raised = ([bar.get_height() for bar in bars] for bars in below.containers)
    np.testing.assert_allclose(np.add(lowered, raised), NORMAL - shifted)
    assert min(lowered) == 0 and max(raised) == 0
    assert len(plots.over_atoms(ATOMS, {"predicted": NORMAL}).axes) == 1


def test_a_projection_is_shown_whole_and_around_its_mean() -> None:
    moved = 1 + 0.5 * ATOMS
    wide, close = plots.projection(moved, NORMAL, ATOMS, np.roll(NORMAL, 1)).axes
    np.testing.assert_allclose(wide.containers[0].markerline.get_xdata(), moved)
    np.testing.assert_allclose(wide.containers[1].markerline.get_ydata(), np.roll(NORMAL, 1))
    assert close.get_xlim()[0] < 1 < close.get_xlim()[1]
    assert set(close.get_xticks()) <= set(ATOMS)


def test_bars_by_action_name_the_datas_action() -> None:
    axis = plots.by_action(ACTIONS, {"before": np.arange(4), "after": -np.arange(4)}, "RIGHT", "Q").axes[0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["NOOP", "FIRE", "RIGHT\n(data)", "LEFT"]
    assert [[bar.get_height() for bar in bars] for bars in axis.containers] == [[0, 1, 2, 3], [0, -1, -2, -3]]


def test_gradients_by_action_are_centred_on_zero() -> None:
    gradient = np.outer([1, 0, -1, 0], NORMAL)
    figure = plots.gradient_by_action(ATOMS, ACTIONS, {"TD error": gradient, "nothing": 0 * gradient})
    pictures = [axis.images[0] for axis in figure.axes if axis.images]
    np.testing.assert_array_equal(pictures[0].get_array(), gradient)
    assert pictures[0].get_clim() == (-NORMAL.max(), NORMAL.max())
    assert pictures[1].get_clim()[1] > 0


def test_features_are_counted_by_norm_and_by_product() -> None:
    plain = np.array([[3.0, 4.0], [0.0, 2.0]])
    unit = plain / np.linalg.norm(plain, axis=1, keepdims=True)
    norms, products = plots.features(plain, plain[::-1], unit, unit[::-1]).axes
    counts = [sum(bar.get_height() for bar in bars) for axis in (norms, products) for bars in axis.containers]
    assert counts == [2, 2, 2, 2]
    labels = [text.get_text() for text in norms.get_legend().get_texts()]
    assert labels == ["as computed: 2 to 5", "normalised: 1 to 1"]
    assert products.get_legend().get_texts()[0].get_text() == "as computed: 8 to 8"


def test_values_lie_against_returns_with_their_correlation() -> None:
    returns = np.array([0.0, 1.0, 2.0])
    first, last = plots.values_and_returns({"0 steps": np.zeros(3), "9 steps": returns / 2}, returns).axes
    assert first.get_title() == "0 steps"
    assert last.get_title() == "9 steps: correlation 1.00"
    np.testing.assert_allclose(last.collections[0].get_offsets(), np.stack([returns, returns / 2], axis=1))


def test_pulls_have_a_row_each_and_no_distribution_where_there_is_none() -> None:
    gradient = np.outer([0.1, 0, -0.1, 0, 0], NORMAL)
    shared = {"td_gradient": gradient, "cql_gradient": 0.1 * gradient, "td_push": np.ones(5), "cql_push": -np.ones(5)}
    scalar = SimpleNamespace(action=2, predicted=NORMAL, target=None, target_mean=0.5, **shared)
    whole = SimpleNamespace(action=2, predicted=NORMAL, target=np.roll(NORMAL, 1), target_mean=0.5, **shared)
    axes = plots.pulls(ATOMS, ACTIONS, {"mse": scalar, "c51": whole}).axes
    assert [axes[0].get_title(), axes[3].get_title()] == ["mse", "c51"]
    assert axes[0].get_legend().get_texts()[1].get_text() == "target, 0.500"
    np.testing.assert_allclose(axes[3].lines[2].get_ydata(), np.roll(NORMAL, 1))
    assert axes[1].get_title() == "gradient of the logits of RIGHT"
    heights = np.sum([[bar.get_height() for bar in bars] for bars in axes[1].containers], axis=0)
    np.testing.assert_allclose(heights, 1.1 * gradient[2])
    assert [[bar.get_height() for bar in bars] for bars in axes[2].containers] == [[1] * 4, [-1] * 4]
