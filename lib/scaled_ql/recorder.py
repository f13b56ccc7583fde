"""Recording of a kernel's cells and outputs as a notebook, so that a run keeps its own, whatever program executes it.

A kernel knows neither its notebook's file nor its outputs: JupyterLab, VS Code and papermill keep them. So the outputs
are captured where the kernel publishes them, and the text between cells is taken from their document.
"""

import ast
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, output_from_msg


class Recorder:
    """The cells that a kernel has executed since the recorder's creation, in order of (last) execution, with outputs.

    Attributes:
        cells: code cells of a notebook.
    """

    def __init__(self, kernel: Any, earlier: list[str]):
        """Begin with the cell that is running.

        Args:
            kernel: ipykernel's kernel.
            earlier: sources of the earlier cells to include.
        """
        self._session = kernel.session
        self._publish: Callable = self._session.send
        self._running: dict[str, NotebookNode] = {}  # by the message that requested it
        self._displays: dict[str, list[NotebookNode]] = {}
        self._clear: set[str] = set()  # messages whose cell is cleared by its next output
        self.cells = [new_code_cell(source) for source in earlier]
        request = kernel.get_parent()
        self._execute(request, request["content"]["code"], kernel.execution_count)
        self._session.send = self._send

    def close(self) -> None:
        """Stop recording."""
        self._session.send = self._publish

    def _send(
        self, stream: Any, message: Any, content: Any = None, parent: Any = None, *rest: Any, **named: Any
    ) -> Any:
        """Replacement of the session's `send`, which takes a message, or a type and its content."""
        if isinstance(message, dict):
            kind, said, request = message["header"]["msg_type"], message["content"], message["parent_header"]
        else:
            kind, said, request = message, content, parent
        if request:
            self._record(kind, said, request)
        return self._publish(stream, message, content, parent, *rest, **named)

    def _record(self, kind: str, content: dict[str, Any], request: dict[str, Any]) -> None:
        number = request.get("header", request)["msg_id"]
        if kind == "execute_input":
            self._execute(request, content["code"], content["execution_count"])
        elif kind == "update_display_data":
            for output in self._displays.get(content.get("transient", {}).get("display_id"), []):
                output.update(data=content["data"], metadata=content["metadata"])
        elif number in self._running and kind == "clear_output":
            self._clear.add(number)
            if not content.get("wait"):
                self._clear_if_asked(number)
        elif number in self._running and kind in ("stream", "display_data", "execute_result", "error"):
            self._clear_if_asked(number)
            self._add(self._running[number].outputs, kind, content)

    def _clear_if_asked(self, number: str) -> None:
        if number in self._clear:
            self._clear.discard(number)
            self._running[number].outputs.clear()

    def _add(self, outputs: list[NotebookNode], kind: str, content: dict[str, Any]) -> None:
        last = outputs[-1] if outputs else {}
        if kind == "stream" and last.get("output_type") == kind and last.get("name") == content["name"]:
            last["text"] = _overwritten(last["text"] + content["text"])
            return
        outputs.append(output_from_msg({"header": {"msg_type": kind}, "content": content}))
        if name := content.get("transient", {}).get("display_id"):
            self._displays.setdefault(name, []).append(outputs[-1])

    def _execute(self, request: dict[str, Any], source: str, number: int) -> None:
        own = request.get("metadata", {}).get("cellId", "")
        cell = new_code_cell(source, execution_count=number, **({"id": own} if own else {}))
        self.cells = [other for other in self.cells if other.source != source and other.id != own] + [cell]
        self._running[request["header"]["msg_id"]] = cell


def _overwritten(text: str) -> str:
    """Drop text that a terminal would overwrite: a progress bar writes thousands of lines over one another."""
    return re.sub(r"[^\r\n]*\r(?=[^\r\n])", "", text.replace("\r\n", "\n"))


def document(notebook: str, original: Path, namespace: dict[str, Any]) -> Path:
    """The file whose cells are being executed, if the executing program names it; else the original.

    Args:
        notebook: name without ``.ipynb``.
        original: the committed notebook.
        namespace: the notebook's ``globals()``; VS Code leaves a name there, Jupyter's server in the environment.
    """
    for name in (namespace.get("__vsc_ipynb_file__"), os.environ.get("JPY_SESSION_NAME")):
        file = Path(name) if name else original
        try:
            # An inherited name may be that of a notebook that started this process.
            if file != original and f'"{notebook}"' in file.read_text(encoding="utf-8").replace('\\"', '"'):
                return file.absolute()
        except (OSError, ValueError):
            continue
    return original


def merge(content: NotebookNode, executed: list[NotebookNode], names: Callable[[str], set[str]]) -> NotebookNode:
    """Merge executed cells into a document: in their places, or after the cell executed before them.

    Args:
        content: the saved document, perhaps from before cells were changed or papermill added one.
        executed: code cells with their outputs.
        names: parameters that a cell's source assigns; none if it is not a parameters cell.

    Returns:
        a notebook. Cells that were not executed have no outputs.
    """
    cells = [NotebookNode(cell | {"outputs": [], "execution_count": None}) if _is_code(cell) else cell
             for cell in content.cells]  # fmt: skip
    left, place = [cell for cell in cells if _is_code(cell)], 0
    for cell in executed:
        same = (
            lambda other, cell=cell: other.get("id") == cell.id,
            lambda other, cell=cell: other.source == cell.source,
            lambda other, cell=cell: names(other.source) and names(other.source) <= names(cell.source),
        )
        found = next((other for is_same in same for other in left if is_same(other)), None)
        if found is None:
            cells.insert(place, cell)
            place += 1
        else:
            left = [other for other in left if other is not found]
            place = next(i for i, other in enumerate(cells) if other is found) + 1
            found.update(source=cell.source, outputs=cell.outputs, execution_count=cell.execution_count)
    metadata = {name: content.metadata[name] for name in ("kernelspec", "language_info") if name in content.metadata}
    return new_notebook(cells=cells, metadata=metadata)


def _is_code(cell: NotebookNode) -> bool:
    return cell.cell_type == "code"


def sign(file: Path) -> bool:
    """Mark a notebook executed here as trusted by Jupyter: untrusted, JupyterLab shows neither films nor widgets.

    Returns:
        whether it was signed. An unwritable home does not make a run fail.
    """
    from nbformat.sign import NotebookNotary

    try:
        notary = NotebookNotary()
        try:
            notary.sign(nbformat.read(file, as_version=4))
        finally:
            notary.store.close()
    except Exception:  # SQLite, traitlets and the system raise different errors
        return False
    return True


def run_of(cells: list[dict[str, Any]]) -> str:
    """The run that a notebook's cells name, in the last plain assignment to `run`; "" if none does."""
    found = ""
    for cell in cells:
        try:
            body = ast.parse(cell["source"]).body if cell["cell_type"] == "code" else []
        except (SyntaxError, ValueError):  # a magic
            continue
        for statement in body:
            targets = getattr(statement, "targets", [getattr(statement, "target", None)])
            value = getattr(statement, "value", None)
            if any(isinstance(target, ast.Name) and target.id == "run" for target in targets) and isinstance(
                value, ast.Constant
            ):
                found = str(value.value)
    return found


def refuse_foreign_save(model: dict[str, Any], path: str, contents_manager: Any, **_: Any) -> None:
    """Keep Jupyter's server from saving one run's notebook over another's.

    Args:
        model: content to save.
        path: path below the server's folder.
        contents_manager: contents manager of the server.

    Raises:
        HTTPError: 403, with the remedy.
    """
    file = Path(contents_manager.root_dir, path.lstrip("/"))
    if model["type"] != "notebook" or file.name != "run.ipynb" or not (file.parent / "parameters.yaml").exists():
        return
    there, now = file.parent.name, run_of(model["content"].get("cells", []))
    if now not in ("", there):
        from tornado.web import HTTPError

        reason = f"not saved over the notebook of the run {there}. Run it: {now} keeps its own in its folder"
        raise HTTPError(403, reason, reason=reason)


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "scaled_ql.recorder"}]


def _load_jupyter_server_extension(server: Any) -> None:
    server.contents_manager.register_pre_save_hook(refuse_foreign_save)
