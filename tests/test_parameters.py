"""Parameters: every file valid, every mistake named, notebook cells and schemas agree."""

import ast
from pathlib import Path

import nbformat
import pytest
import yaml

from scaled_ql import batches, parameters
from scaled_ql.games import HELD_OUT_GAMES, TRAINING_GAMES
from scaled_ql.parameters import NOTEBOOKS, ParameterError, check, from_notebook
from scaled_ql.replay import load_view

PARAMS = Path(__file__).resolve().parents[1] / "params"
FILES = sorted(file for file in PARAMS.glob("*/*.yaml") if file.parent.name not in ("batches", "views"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_file_in_params_is_valid_and_says_how_to_use_it(file: Path) -> None:
    values = parameters.load(file)
    checked = check(file.parent.name, values, str(file))
    assert checked.run == file.stem
    defaults = NOTEBOOKS[file.parent.name]().model_dump()
    assert "adam_epsilon" not in defaults or "adam_epsilon" in values, (
        "what no paper says and everything hangs on is said in every file"
    )
    others = values.keys() - {"adam_epsilon"}
    assert all(values[name] != defaults[name] for name in others), "a file holds only what differs from the defaults"
    assert file.read_text().startswith(f"# scaled-ql run {file.parent.name} params/")


@pytest.mark.parametrize("file", sorted((PARAMS / "views").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_view_is_valid_and_says_how_to_use_it(file: Path) -> None:
    view = load_view(file)
    assert set(view.games) <= {*TRAINING_GAMES, *HELD_OUT_GAMES} and view.games
    assert file.read_text().startswith(f"# -p view {file.stem}  ")


@pytest.mark.parametrize("file", sorted((PARAMS / "batches").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_batch_is_valid(file: Path) -> None:
    steps = batches.load_batch(file, {})
    assert [step.notebook for step in steps] == sorted(step.notebook for step in steps)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_the_parameters_cell_repeats_the_schema(notebook: str, workspace: Path) -> None:
    content = nbformat.read(workspace / "notebooks" / f"{notebook}.ipynb", as_version=4)
    (cell,) = [cell for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
    namespace: dict = {}
    exec(cell.source, namespace)
    schema = NOTEBOOKS[notebook]
    assert {name: namespace[name] for name in schema.model_fields} == schema().model_dump()
    lines = [line for line in cell.source.splitlines() if line]
    assert len(lines) == len(schema.model_fields)
    assert all(line.count("=") == 1 and "  # " in line for line in lines), "one `name: type = value  # meaning` a line"


def test_papermill_sees_every_parameter(workspace: Path) -> None:
    import papermill

    for notebook, schema in NOTEBOOKS.items():
        assert set(papermill.inspect_notebook(workspace / "notebooks" / f"{notebook}.ipynb")) == set(
            schema.model_fields
        )


def test_all_mistakes_are_reported_at_once_with_the_nearest_name() -> None:
    wrong = {
        "lerning_rate": 1e-3, "seed": "0", "num_steps": True, "encoder": "resnet18", "discount": 1.5,
        "learning_rate": "1e-4",
    }  # fmt: skip
    with pytest.raises(ParameterError) as error:
        check("04_scaled_training", wrong, "mine.yaml")
    message = str(error.value)
    assert message.startswith("mine.yaml")
    assert "lerning_rate: no such parameter; did you mean learning_rate?" in message
    for part in ("seed: ", "num_steps: ", "encoder: ", "discount: ", "write 1.0e-4"):
        assert part in message


def test_unknown_notebook() -> None:
    with pytest.raises(ParameterError, match="01_data_collection"):
        check("07_nothing", {})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"v_min": 3.0, "v_max": 3.0}, "must be below"),
        ({"run": "../up"}, "run: "),
        ({"eval_every": 62_500}, r"eval_every \(62500\) must be a multiple of log_every \(1000\)"),
    ],
)
def test_values_that_do_not_fit_together(values: dict, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        check("04_scaled_training", values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"freeze": True, "initial": "scratch"}, "freeze: nothing is transferred to a network from scratch"),
        ({"dataset": ""}, "dataset: missing; offline fine-tuning needs a replay"),
        ({"setting": "online", "dataset": "a/b/replay"}, "dataset: without effect in setting 'online'"),
        ({"setting": "online", "num_steps": 5, "alpha": 0.1}, "alpha, num_steps: without effect in setting 'online'"),
        ({"num_transitions": 5, "update_period": 1}, "num_transitions, update_period: without effect in setting"),
        ({"parts": "head"}, "parts: Input should be"),
        ({"v_min": 3.0, "v_max": 3.0}, "must be below"),
        ({"eval_every": 1_500}, r"eval_every \(1500\) must be a multiple of log_every"),
    ],
)
def test_transfer_takes_one_setting_at_a_time(values: dict, words: str) -> None:
    with pytest.raises(ParameterError, match=words):
        check("06_transfer", values)


def test_transfers_defaults_are_the_papers() -> None:
    """Appendix B.4; online Dopamine's C51 for what it does not say."""
    p = check("06_transfer", {})
    assert (p.learning_rate, p.batch_size, p.num_steps, p.n_step, p.alpha) == (5e-5, 32, 300_000, 3, "paper")
    assert p.updates == 300_000
    online = check("06_transfer", {"setting": "online", "eval_every": 1_500})
    assert (online.num_transitions, online.min_history, online.update_period) == (750_000, 20_000, 4)
    assert (online.updates, online.epsilon_decay, online.final_epsilon) == (182_500, 250_000, 0.01)
    assert online.variant == {"mode": None, "difficulty": None}
    assert check("06_transfer", {"mode": 0, "difficulty": 1}).variant == {"mode": 0, "difficulty": 1}


def test_a_transformers_parameters_belong_to_its_methods() -> None:
    with pytest.raises(ParameterError, match=r"transformer, sequence_length: without effect in method 'cql'"):
        check("04_scaled_training", {"transformer": "tiny", "sequence_length": 8})
    with pytest.raises(ParameterError, match=r"target_return: without effect in method 'bc_transformer'"):
        check("04_scaled_training", {"method": "bc_transformer", "target_return": 5})
    with pytest.raises(ParameterError, match=r"return_low \(5\) must be below return_high \(5\)"):
        check("04_scaled_training", {"method": "dt", "return_low": 5, "return_high": 5})
    for value in ("notebook", "paper", "data", 90, -3.5):
        assert check("04_scaled_training", {"method": "dt", "target_return": value}).target_return == value
    for value in ("best", True, float("nan"), None):
        with pytest.raises(ParameterError, match="target_return: expected notebook, paper, data or a number, got"):
            check("04_scaled_training", {"method": "dt", "target_return": value})


def test_a_control_without_rewards_knows_no_experts() -> None:
    with pytest.raises(ParameterError, match="target_return: data has real returns, rewards are zero; choose notebook"):
        check("04_scaled_training", {"method": "dt", "target_return": "data", "rewards": "zero"})


def test_what_needs_attention_is_refused_without() -> None:
    assert check("04_scaled_training", {"encoder": "vit_tiny", "attention_temperature": 0.1}).attention_entropy == 0.7
    with pytest.raises(
        ParameterError, match=r"attention_temperature: 'resnet101' has no attention; choose vit_narrow, "
    ):
        check("04_scaled_training", {"attention_temperature": 0.1})
    with pytest.raises(ParameterError, match="attention_temperature: without effect in method 'bc'"):
        check("04_scaled_training", {"method": "bc", "encoder": "vit_tiny", "attention_temperature": 0.1})


def test_heads_are_the_papers_or_shared() -> None:
    assert check("04_scaled_training", {}).heads == "per_game"
    with pytest.raises(ParameterError, match="heads: Input should be 'per_game' or 'shared', got 'one'"):
        check("04_scaled_training", {"heads": "one"})


def test_any_number_of_steps_works() -> None:
    check("04_scaled_training", {"num_steps": 600})
    check("04_scaled_training", {"num_steps": 10_501, "checkpoint_every": 1_500, "log_every": 400})


def test_table_b1_is_the_default() -> None:
    p = check("04_scaled_training", {})
    assert (p.v_min, p.v_max, p.num_atoms, p.n_step, p.discount) == (-20, 20, 51, 3, 0.99)
    assert (p.games_per_batch, p.transitions_per_game, p.target_update_period) == (128, 4, 2_000)
    assert (p.learning_rate, p.alpha) == (2e-4, "paper")


@pytest.mark.parametrize("value", [-1.0, "papers", True, float("nan"), None])
def test_alpha_is_a_number_or_the_papers(value: object) -> None:
    assert [check("04_scaled_training", {"alpha": number}).alpha for number in (0, 0.0, 0.3)] == [0, 0.0, 0.3]
    with pytest.raises(ParameterError, match="alpha: expected a number >= 0 or the word paper, got"):
        check("04_scaled_training", {"alpha": value})


@pytest.mark.parametrize("name", ["forty_games", "forty_games_suboptimal", "six_games", "six_games_long"])
def test_the_papers_sizes_have_its_protocol(name: str) -> None:
    """Table B.1: iterations of 62,500 steps, each measured over 125,000 agent steps of whole episodes."""
    p = check("04_scaled_training", parameters.load(PARAMS / "04_scaled_training" / f"{name}.yaml"))
    assert (p.eval_every, p.eval_min_steps, p.eval_max_steps) == (62_500, 125_000, 27_000)
    assert (p.eval_epsilon, p.eval_sticky_actions) == (0.001, 0.0)
    assert p.num_steps % p.eval_every == 0, "the last iteration is whole"


def notebook_namespace(*cells: str) -> dict:
    """What a kernel holds after executing cells."""
    namespace: dict = {"In": [""]}
    for cell in cells:
        namespace["In"].append(cell)
        exec(cell, namespace)
    return namespace


def test_a_misspelt_parameter_in_a_cell_is_an_error_until_corrected() -> None:
    cell = 'run: str = "a"  # name\nseeed: int = 2  # typo'
    namespace = notebook_namespace(cell)
    with pytest.raises(ParameterError, match="did you mean seed"):
        from_notebook("01_data_collection", namespace)
    namespace["In"].append(cell.replace("seeed", "seed"))
    exec(cell.replace("seeed", "seed"), namespace)
    assert from_notebook("01_data_collection", namespace).seed == 2


def test_a_cell_injected_by_papermill_counts_even_where_all_its_names_are_unknown() -> None:
    namespace = notebook_namespace('run: str = "a"  # name', "# Parameters\nseeed = 3")
    with pytest.raises(ParameterError, match="seeed"):
        from_notebook("01_data_collection", namespace)


def test_running_all_cells_again_is_no_error() -> None:
    namespace = notebook_namespace('run: str = "a"  # name', "import math\ntotal = 3", "rows = [1, 2]")
    assert from_notebook("01_data_collection", namespace).run == "a"


def test_yaml_is_read_safely(tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text("run: !!python/object/apply:os.system ['true']")
    with pytest.raises(ParameterError, match=r"evil\.yaml"):
        parameters.load(file)
    file.write_text("- a list")
    with pytest.raises(ParameterError, match="mapping"):
        parameters.load(file)
    with pytest.raises(ParameterError, match="absent"):
        parameters.load(tmp_path / "absent.yaml")


def test_what_is_written_counts_and_hints_say_how_to_write_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 010\nscale_rewards: no\nlearning_rate: 1e-4\n")
    values = check("04_scaled_training", parameters.load(file))
    assert (values.seed, values.scale_rewards, values.learning_rate) == (10, "no", 1e-4)
    file.write_text("seed: 1\nrun: a\nseed: 2\n")
    with pytest.raises(ParameterError, match=r"mine\.yaml: .*'seed' is given twice"):
        parameters.load(file)
    with pytest.raises(ParameterError) as error:
        check("04_scaled_training", {"run": 10, "double_q": "yes", "scale_rewards": False, "num_steps": "5"})
    for part in ("run: ", "needs quotes", "double_q: ", "(write true)", "scale_rewards: ", "without quotes"):
        assert part in str(error.value)


def test_a_batch_with_a_mistake_is_refused_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "batch.yaml"
    file.write_text(yaml.safe_dump({"steps": [{"notebook": "01_data_collection", "paramters": "tiny.yaml"}]}))
    with pytest.raises(ParameterError, match="paramters"):
        batches.load_batch(file, {})


def test_the_parameters_cells_hold_plain_scalars_and_lists(workspace: Path) -> None:
    for notebook in NOTEBOOKS:
        content = nbformat.read(workspace / "notebooks" / f"{notebook}.ipynb", as_version=4)
        (cell,) = [cell for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
        for node in ast.parse(cell.source).body:
            assert isinstance(node, ast.AnnAssign)
            ast.literal_eval(node.value)


def test_what_a_kind_of_player_does_not_use_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"encoder: no such parameter(.|\n)*batch_size: no such parameter"):
        check("01_data_collection", {"encoder": "impala_x1", "batch_size": 64})
    with pytest.raises(ParameterError, match=r"processes: no such parameter"):
        check("02_online_agents", {"processes": 3})
    assert check("01_data_collection", {}).last_epsilon == 0.1
    assert check("01_data_collection", {"player": "two_minds"}).last_epsilon == 0.2
    assert check("01_data_collection", {"player": "two_minds", "final_epsilon": 0.0}).last_epsilon == 0.0


def test_the_study_over_seeds_trains_the_quickstarts_agent():
    folder = Path(__file__).parents[1] / "params" / "04_scaled_training"
    ours, study = (
        parameters.check("04_scaled_training", parameters.load(folder / f"{name}.yaml")).model_dump()
        for name in ("quickstart", "five_seeds")
    )
    assert {name for name in ours if ours[name] != study[name]} == {"run", "eval_episodes"}
