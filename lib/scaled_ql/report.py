"""Reports: rendered notebooks that begin with their result, in one file that opens offline.

A cell tagged ``result`` is shown at the top, below the title, small enough to share the first screen with others;
`templates/report` has the page. LaTeX becomes MathML, which browsers show without a network.
"""

import copy
import html
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import pass_context
from jinja2.runtime import Context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output
from traitlets import default

from scaled_ql import plots

WIDGET = "application/vnd.jupyter.widget-view+json"


class ReportExporter(HTMLExporter):
    """nbconvert's HTML exporter, with the page of a report and equations that need neither a network nor MathJax.

    The resource ``about`` of an export is shown below the title; see `arrange`.
    """

    @default("template_name")
    def _template_name_default(self) -> str:
        return "report"

    @default("extra_template_basedirs")
    def _extra_template_basedirs_default(self) -> list[str]:
        return [str(Path(__file__).parent / "templates")]

    def from_notebook_node(
        self, nb: NotebookNode, resources: Mapping[str, Any] | None = None, **options: Any
    ) -> tuple[str, dict]:
        """Render a notebook; returns HTML and resources."""
        arranged = arrange(nb, (resources or {}).get("about", {}))
        return super().from_notebook_node(arranged, resources and dict(resources), **options)

    @pass_context
    def markdown2html(self, context: Context, source: str) -> str:
        """Render a text cell; the parent's method leaves LaTeX to MathJax."""
        cell, resources = context.get("cell", {}), context.get("resources", {})
        renderer = _Renderer(
            escape=False,
            attachments=cell.get("attachments", {}),
            embed_images=self.embed_images,
            path=resources.get("metadata", {}).get("path", ""),
            anchor_link_text=self.anchor_link_text,
            exclude_anchor_links=self.exclude_anchor_links,
        )
        return MarkdownWithMath(renderer=renderer).render(source)


class _Renderer(IPythonRenderer):
    def block_math(self, body: str) -> str:
        return _to_mathml(body, "block") or super().block_math(body)

    def inline_math(self, body: str) -> str:
        return _to_mathml(body, "inline") or super().inline_math(body)


def _to_mathml(latex: str, display: str) -> str:
    """MathML, or an empty string for unsupported LaTeX, which is then shown as written."""
    try:
        return convert(latex.strip(), display=display)
    except Exception:  # latex2mathml's errors have no common base
        return ""


def arrange(book: NotebookNode, about: Mapping[str, Any]) -> NotebookNode:
    """A notebook in the order of a report: title, what the run was, results, all the rest.

    Args:
        book: an executed notebook; not changed. Of a cell with films their posters are shown at the top, too.
        about: empty, or `run`, its name; `line`, its seed, date and commit; `verdict`, Markdown; `changed` and
            `defaults`, parameters.

    Returns:
        a notebook whose metadata has `contents`: (level, text, anchor) of its headings. Widgets are left out, since
        their state would load scripts from a network; each has a static twin. Figures have an alternative text.
    """
    book = copy.deepcopy(book)
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
            _describe_figures(cell)
    top = []
    if book.cells and book.cells[0].cell_type == "markdown" and book.cells[0].source.startswith("# "):
        title, _, rest = book.cells[0].source.partition("\n")
        name = about.get("run", "").partition(".")[0]  # a grid's run has its values behind
        title += f": {html.escape(name)}" if name else ""
        top.append(new_markdown_cell(title))
        book.metadata["title"] = re.sub(r"[*`]", "", title.removeprefix("# "))  # of the page
        book.cells[0].source = rest.strip("\n")
    if about:
        top.append(new_markdown_cell(_about(about)))
    results, films, anchor = [], [], ""
    for cell in book.cells:
        headings = _headings(cell)
        anchor = headings[-1][2] if headings else anchor
        said_more = any("data" in output for output in cell.get("outputs", ()))  # than what it printed
        if "result" in cell.metadata.get("tags", ()) and said_more:
            rich = [output for output in cell.outputs if {*output.get("data", ())} != {"text/plain"}]
            shown = copy.deepcopy(rich or cell.outputs)  # no progress line above a figure
            results.append(_without_code(shown, id=f"{cell.get('id', 'result')}-top"))
        posters = re.findall(r'poster="(data:image/[^"]+)"', str(cell.get("outputs", "")))
        if posters:
            pictures = "".join(f'<img src="{poster}" alt="a moment of play; leads to the film">' for poster in posters)
            shown = new_output("display_data", {"text/html": f'<a class="film" href="#{anchor}">{pictures}</a>'})
            films.append(_without_code([shown]))
    said = [output.get("data", {}).get("text/markdown", "") for cell in results for output in cell.outputs]
    verdict = about.get("verdict", "")
    if verdict and not any(verdict in text for text in said):
        results.append(_without_code([new_output("display_data", {"text/markdown": verdict})]))
    results.sort(key=lambda cell: "text/markdown" not in str(cell.outputs))  # verdicts first
    book.cells = [*top, *results[:1], *films, *results[1:], *book.cells]
    book.metadata["contents"] = [heading for cell in book.cells for heading in _headings(cell) if heading[0] > 1]
    book.metadata["report"] = {name: about[name] for name in ("line", "verdict") if name in about}
    book.metadata["report"]["title"] = book.metadata.get("title", "")
    return book


def _without_code(outputs: list[NotebookNode], **more: Any) -> NotebookNode:
    """A cell at a report's top."""
    return new_code_cell(outputs=outputs, metadata={"transient": {"remove_source": True}, "tags": ["top"]}, **more)


def _headings(cell: NotebookNode) -> list[tuple[int, str, str]]:
    """Level, text and nbconvert's anchor of a text cell's headings."""
    if cell.cell_type != "markdown":
        return []
    lines = re.sub(r"^```.*?^```", "", cell.source, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^(#{1,3}) (.+?)\s*$", lines, re.MULTILINE)
    return [(len(marks), re.sub(r"[*`]", "", text), _anchor(text)) for marks, text in found]


def _anchor(text: str) -> str:
    """The id that nbconvert gives a heading."""
    plain = re.sub(r"<[^>]+>", "", re.sub(r"[*`]", "", text))
    return quote(plain.replace(" ", "-"), safe="?/:@!$&'()*+,;=")


def _describe_figures(cell: NotebookNode) -> None:
    """Alternative texts: the first sentence of what is documented of the function that drew a cell's figures."""
    drawn = [name for name in re.findall(r"plots\.(\w+)\(", cell.source) if hasattr(plots, name)]
    texts = [(inspect.getdoc(getattr(plots, name)) or "").split("\n\n")[0].replace("\n", " ") for name in drawn]
    texts = [text for name, text in zip(drawn, texts) if name != "set_style"]
    for output in cell.outputs:
        if "image/png" in output.get("data", {}):
            described = output.metadata.setdefault("image/png", {})
            described.setdefault("alt", texts[-1] if texts else "figure; the text below says how to read it")


def _about(about: Mapping[str, Any]) -> str:
    def rows(parameters: Mapping[str, Any], mark: str) -> str:
        cells = ((html.escape(name), html.escape(str(value))) for name, value in parameters.items())
        return "".join(f"<tr><td>{mark}{name}{mark and '</b>'}</td><td>{value}</td></tr>" for name, value in cells)

    table = rows(about["changed"], "<b>") + rows(about["defaults"], "")
    summary = (
        f"parameters: {len(about['changed'])} that are not the defaults, in bold, then {len(about['defaults'])} others"
    )
    return (
        f"{html.escape(about['line'])}\n\n"
        f'<details class="about"><summary>{summary}</summary><table>{table}</table></details>'
    )
