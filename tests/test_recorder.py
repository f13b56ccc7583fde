"""A run's folder holds its own notebook whatever executed it: real kernels, papermill, and Jupyter's own server."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient import NotebookClient
from nbformat.sign import NotebookNotary
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from scaled_ql import parameters, recorder, runs

NAME = "01_data_collection"
TINY = {"games": ["Breakout"], "num_transitions": 300, "max_steps": 100, "processes": 1}


@pytest.fixture(scope="module", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory):
    """Signatures go here instead of into the home of whoever tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_DATA_DIR", str(tmp_path_factory.mktemp("jupyter")))
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that papermill alone executed, elsewhere; its own output is beside the notebooks' folders."""
    outputs = tmp_path_factory.mktemp("outputs")
    source = runs.workspace() / "notebooks" / f"{NAME}.ipynb"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        papermill.execute_notebook(
            source, outputs / "papermill.ipynb", TINY | {"run": "first", "outputs": str(outputs)}, progress_bar=False
        )
    return outputs / NAME / "first"


def read(file: Path) -> nbformat.NotebookNode:
    return nbformat.read(file, as_version=4)


def is_trusted(file: Path) -> bool:
    notary = NotebookNotary()
    try:
        return notary.check_signature(read(file))
    finally:
        notary.store.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file() and ".lock" not in file.name}


def test_papermill_alone_leaves_notebook_and_report_in_the_runs_folder(first: Path) -> None:
    book, papermills = read(first / "run.ipynb"), read(first.parents[1] / "papermill.ipynb")
    nbformat.validate(book)
    assert [cell.source.strip() for cell in book.cells] == [cell.source.strip() for cell in papermills.cells]
    assert [cell.get("outputs") for cell in book.cells] == [cell.get("outputs") for cell in papermills.cells]
    assert any("image/png" in output.get("data", {}) for cell in book.cells for output in cell.get("outputs", []))
    assert "data:image/png;base64" in (first / "run.html").read_text(encoding="utf-8")
    assert runs.read_json(first / "status.json")["state"] == "finished"


def test_an_executed_notebook_is_trusted_and_read_only(first: Path) -> None:
    assert is_trusted(first / "run.ipynb")
    assert not is_trusted(first.parents[1] / "papermill.ipynb")
    assert (first / "run.ipynb").stat().st_mode & 0o222 == 0


def test_another_run_from_a_runs_notebook_leaves_it_alone(first: Path) -> None:
    """As in JupyterLab: `run` is changed in the open notebook, all cells are executed, nothing was saved."""
    before, book = contents(first), read(first / "run.ipynb")
    (injected,) = (cell for cell in book.cells if 'run = "first"' in cell.source)
    injected.source = injected.source.replace("first", "second").replace("300", "200")
    client = NotebookClient(book, kernel_name="python3", resources={"metadata": {"path": str(first)}})
    client.execute(env={**os.environ, "JPY_SESSION_NAME": str(first / "run.ipynb")})
    assert contents(first) == before
    second = first.with_name("second")
    own = read(second / "run.ipynb")
    assert [cell.source for cell in own.cells] == [cell.source for cell in book.cells]
    assert [cell.get("outputs") for cell in own.cells] == [cell.get("outputs") for cell in book.cells]
    assert recorder.run_of(own.cells) == "second" and is_trusted(second / "run.ipynb")
    assert (second / "run.html").exists() and runs.read_json(second / "status.json")["state"] == "finished"
    (start,) = (cell for cell in own.cells if "runs.start(" in cell.source)
    assert f"This run keeps its own: {second / 'run.ipynb'}" in start.outputs[0].text


def test_a_cell_that_fails_is_in_the_runs_notebook(tmp_path: Path) -> None:
    values = TINY | {"run": "bad", "outputs": str(tmp_path), "games": ["Breakuot"]}
    source = runs.workspace() / "notebooks" / f"{NAME}.ipynb"
    with pytest.raises(papermill.PapermillExecutionError, match="Breakout"):
        papermill.execute_notebook(source, tmp_path / "out.ipynb", values, progress_bar=False)
    folder = tmp_path / NAME / "bad"
    failed = [output for cell in read(folder / "run.ipynb").cells for output in cell.get("outputs", [])]
    assert [output.ename for output in failed if output.output_type == "error"] == ["UnknownGame"]
    assert not (folder / "run.html").exists() and not runs.holds_results(folder)


CELLS = (
    "print('one'); import sys; print('two', file=sys.stderr); 3",
    "from IPython.display import *\nhandle = display({'text/plain': 'a'}, raw=True, display_id=True)\nprint('b')",
    "print('old')\nclear_output(wait=True)\nprint('new')",
    "handle.update({'text/plain': 'c'}, raw=True)",
    "display(HTML('<b>d</b>'))\n1 / 0",
)


def test_outputs_are_those_that_a_client_sees() -> None:
    begin = (
        "from scaled_ql.recorder import Recorder\nrecorded = Recorder(get_ipython().kernel, ['x = 1'])\nprint('begun')"
    )
    end = "import json\nprint(json.dumps(recorded.cells[:-1]))"
    book = new_notebook(cells=[new_code_cell(source) for source in (begin, *CELLS, end)])
    NotebookClient(book, kernel_name="python3", allow_errors=True).execute()
    *executed, last = book.cells
    recorded = json.loads(last.outputs[0].text)
    assert [cell["source"] for cell in recorded] == ["x = 1", begin, *CELLS]
    assert [cell["outputs"] for cell in recorded[1:]] == [cell.outputs for cell in executed]
    assert executed[2].outputs[0].data == {"text/plain": "c"} and executed[5].outputs[-1].ename == "ZeroDivisionError"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\rb", "b"), ("10%\r20%\ndone\n", "20%\ndone\n"), ("a\r\nb", "a\nb"), ("10%\r", "10%\r"),
        ("\ra\rb\n\rc", "b\nc"), ("a\nb", "a\nb"),
    ],
)  # fmt: skip
def test_progress_bars_take_one_line(text: str, shown: str) -> None:
    assert recorder._overwritten(text) == shown


def names(source: str) -> set[str]:
    return parameters.assigned(source, {"run", "seed"})


def merged(before: list, executed: list) -> list[str]:
    book = recorder.merge(new_notebook(cells=before), executed, names)
    nbformat.validate(book)
    return [cell.source for cell in book.cells]


def test_changed_cells_take_the_places_of_those_they_were() -> None:
    text, first, second, rest = (
        new_markdown_cell("text"), new_code_cell('run = "default"\nseed = 0'),
        new_code_cell('# Parameters\nrun = "a"'), new_code_cell("f()", outputs=[new_output("stream", text="stale")]),
    )  # fmt: skip
    before = [text, first, second, rest]
    ran = [new_code_cell(source) for source in (first.source, '# Parameters\nrun = "b"', "f()", "g()")]
    assert merged(before, ran) == ["text", first.source, '# Parameters\nrun = "b"', "f()", "g()"]
    assert merged(before, ran[1:2]) == ["text", first.source, '# Parameters\nrun = "b"', "f()"]
    edited = [new_code_cell('run = "b"\nseed = 1')]
    assert merged(before[:2], edited) == ["text", 'run = "b"\nseed = 1']
    renamed = [new_code_cell("h()", id=rest.id)]
    assert merged(before, renamed) == ["text", first.source, second.source, "h()"]
    book = recorder.merge(new_notebook(cells=before), ran[:1], names)
    assert not book.cells[3].outputs, "a cell that was not executed shows nothing"


def test_the_document_is_this_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = runs.workspace() / "notebooks" / f"{NAME}.ipynb"
    other = shutil.copy(runs.workspace() / "notebooks" / "03_data_exploration.ipynb", tmp_path / "other.ipynb")
    mine = shutil.copy(original, tmp_path / "mine.ipynb")
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert recorder.document(NAME, original, {}) == original
    for file, expected in (
        (other, original),
        (tmp_path / "absent.ipynb", original),
        (tmp_path, original),
        (mine, mine),
    ):
        monkeypatch.setenv("JPY_SESSION_NAME", str(file))
        assert recorder.document(NAME, original, {}) == expected
    assert recorder.document(NAME, original, {"__vsc_ipynb_file__": str(other)}) == mine


@pytest.fixture(scope="module")
def server(first: Path, tmp_path_factory: pytest.TempPathFactory):
    """Jupyter's server with the setting that this package installs; a function that asks it."""
    where = tmp_path_factory.mktemp("server")
    settings = where / "jupyter_server_config.d"
    settings.mkdir()
    shutil.copy(runs.workspace() / "lib" / "jupyter_server_config.json", settings / "scaled_ql.json")
    port = 8_000 + os.getpid() % 20_000
    arguments = ["--allow-root", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0",
                 "--IdentityProvider.token=", f"--ServerApp.root_dir={first.parents[1]}"]  # fmt: skip
    environment = {**os.environ, "JUPYTER_CONFIG_PATH": str(where), "JUPYTER_RUNTIME_DIR": str(where)}
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyter_server", *arguments, "--ServerApp.disable_check_xsrf=True"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def ask(path: str, content: dict | None = None) -> tuple[int, dict]:
        data = json.dumps(content).encode() if content else None
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/contents/{path}", data, method="PUT" if data else "GET"
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    began = time.monotonic()
    while True:
        try:
            ask("")
            break
        except OSError:
            assert process.poll() is None and time.monotonic() - began < 120, "the server did not start"
            time.sleep(0.2)
    yield ask
    process.terminate()
    process.wait(timeout=30)


def test_jupyters_server_trusts_the_notebook_and_never_saves_another_runs_over_it(first: Path, server) -> None:
    path = f"{NAME}/first/run.ipynb"
    status, model = server(path)
    assert status == 200
    assert all(cell["metadata"]["trusted"] for cell in model["content"]["cells"] if cell["cell_type"] == "code")
    (first / "run.ipynb").chmod(0o644)  # as to root, whom permissions do not stop
    before = contents(first)
    content = json.loads(json.dumps(model["content"]).replace('run = \\"first\\"', 'run = \\"mine\\"'))
    assert content != model["content"]
    status, answer = server(path, {"type": "notebook", "content": content})
    assert status == 403 and "not saved over the notebook of the run first" in answer["message"]
    assert contents(first) == before
    assert server(path, {"type": "notebook", "content": model["content"]})[0] == 200
    assert server(f"{NAME}/elsewhere.ipynb", {"type": "notebook", "content": content})[0] == 201
