"""Equations of a report: MathML in place of LaTeX, and nothing else changed."""

import re
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter

from scaled_ql import runs
from scaled_ql.equations import ReportExporter

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


def rendered(source: str) -> str:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(source)])
    return ReportExporter().from_notebook_node(book)[0].split("<body", 1)[1]


def test_equations_are_mathml() -> None:
    html = rendered("Here $\\gamma^n$, and\n\n$$\\sum_{i=1}^{N} p_i z_i$$\n\nand `$HOME`, and 5 $ each.")
    inline, block = re.findall("<math.*?</math>", html, re.DOTALL)
    assert 'display="inline"' in inline and "<msup><mi>γ</mi><mi>n</mi></msup>" in inline
    assert 'display="block"' in block and "<munderover>" in block
    assert "<code>$HOME</code>" in html and "5 $ each" in html


def test_what_is_no_latex_is_shown_as_it_is_written() -> None:
    assert "$\\frac{$" in rendered("A broken $\\frac{$ here")


def test_text_without_equations_is_as_nbconvert_has_it() -> None:
    source = "# Title\n\nA *word*, a [link](#Title), a table:\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(source)])
    assert ReportExporter().from_notebook_node(book)[0] == HTMLExporter().from_notebook_node(book)[0]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_every_equation_of_the_notebooks_is_understood(file: Path, tmp_path: Path) -> None:
    book = nbformat.read(file, as_version=4)
    book.cells = [cell for cell in book.cells if cell.cell_type == "markdown"]
    nbformat.write(book, tmp_path / "run.ipynb")
    html = runs.render(tmp_path / "run.ipynb").read_text().split("<body", 1)[1]
    dollars = sum(cell.source.count("$$") // 2 for cell in book.cells)
    assert html.count('display="block"') == dollars
    assert "$" not in re.sub("<(code|script).*?</\\1>", "", html, flags=re.DOTALL)
    assert not re.search(r"<m[a-z]+>[^<]*\\", html), "a command that no MathML came of"
