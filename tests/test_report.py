"""Reports: their results first, code folded, figures described, MathML in place of LaTeX."""

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter
from PIL import Image

from scaled_ql import plots, runs
from scaled_ql.report import ReportExporter, arrange

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
    source = "A *word*, a [link](#Title), a table:\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(source)])
    ours, theirs = (kind().from_notebook_node(book)[0] for kind in (ReportExporter, HTMLExporter))
    (text,) = re.findall('data-mime-type="text/markdown">(.*?)</div>', theirs, re.DOTALL)
    assert text in ours


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


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def jpeg() -> str:
    """A black picture, in base 64."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "JPEG")
    return base64.b64encode(stream.getvalue()).decode()


def executed() -> nbformat.NotebookNode:
    """A notebook like a run's, its result last."""
    text, code, output = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell, nbformat.v4.new_output
    figure = output("display_data", {"image/png": PIXEL})
    video = output("display_data", {"text/html": f'<video poster="data:image/jpeg;base64,{jpeg()}"></video>'})
    widget = output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "Slider()"})
    cells = [
        text("# 04 · A *title*\n\nWhat it does."),
        text("## First"),
        code("plots.scores(score_table, played);", outputs=[figure, widget]),
        text("## Films\n\n```\n# a comment\n```"),
        code("explore.film(file)", outputs=[video]),
        text("### Über `x`: *last*?"),
        code("verdict", outputs=[output("display_data", {"text/plain": "better"})], metadata={"tags": ["result"]}),
        code("nothing", metadata={"tags": ["result"]}),
    ]
    return nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {}})


ABOUT = {"run": "mine", "line": "seed 0 · <commit>", "changed": {"alpha": "<1>"}, "defaults": {"tau": 0.3}}


def test_a_report_begins_with_title_run_result_and_film() -> None:
    book = executed()
    before = nbformat.writes(book)
    arranged = arrange(book, ABOUT)
    assert nbformat.writes(book) == before
    title, about, result, film, rest = arranged.cells[:5]
    assert title.source == "# 04 · A *title*: mine" and rest.source == "What it does."
    assert "seed 0 · &lt;commit&gt;" in about.source and "<b>alpha</b></td><td>&lt;1&gt;" in about.source
    assert result.outputs[0].data["text/plain"] == "better" and result.metadata["transient"]["remove_source"]
    assert film.outputs[0].data["text/html"].startswith('<a class="film" href="#Films"><img src="data:image/jpeg')
    assert len(arranged.cells) == len(book.cells) + 4
    assert len({cell.id for cell in arranged.cells}) == len(arranged.cells)
    assert arranged.metadata["contents"] == [
        (2, "First", "First"),
        (2, "Films", "Films"),
        (3, "Über x: last?", "%C3%9Cber-x:-last?"),
    ]


def test_a_verdict_that_no_result_says_comes_first_and_progress_lines_stay_below() -> None:
    book, output = executed(), nbformat.v4.new_output
    lines = [output("display_data", {"text/plain": "100%"}), output("display_data", {"image/png": PIXEL})]
    book.cells[4].update(outputs=lines, metadata={"tags": ["result"]})
    for verdict, said in (("**yes**", ["**yes**"]), ("", [])):
        arranged = arrange(book, ABOUT | {"verdict": verdict})
        tops = [cell.outputs for cell in arranged.cells if "top" in cell.metadata.get("tags", ())]
        assert [
            output.data["text/markdown"] for outputs in tops for output in outputs if "text/markdown" in output.data
        ] == said
        figure = next(outputs for outputs in tops if "image/png" in str(outputs))
        assert [list(output.data) for output in figure] == [["image/png"]]
    book.cells[4].outputs = [output("stream", name="stdout", text="nothing to see")]
    assert str(arrange(book, ABOUT).cells).count("nothing to see") == 1, "in its place alone"
    book.cells[6].outputs[0].data = {"text/markdown": "**yes**, and why"}
    arranged = arrange(book, ABOUT | {"verdict": "**yes**"})
    assert arranged.cells[2].outputs[0].data["text/markdown"] == "**yes**, and why"
    assert str(arranged.cells).count("**yes**") == 2, "at the top and in its place"


def test_the_page() -> None:
    html, _ = ReportExporter(embed_images=True).from_notebook_node(executed(), {"about": ABOUT})
    page = html.split("<body", 1)[1]
    assert "<title>04 · A title: mine</title>" in html
    for _, _, anchor in arrange(executed(), {}).metadata["contents"]:
        assert f'id="{anchor}"' in page and f'href="#{anchor}"' in page
    (alt,) = re.findall('<img alt="([^"]*)" src="data:image/png', page)
    assert alt.startswith((plots.scores.__doc__ or "").split(".")[0].split("\n")[0])
    assert page.count('<details class="code">') == 4 and "Slider()" not in page
    assert page.index("better") < page.index("What it does")


def test_every_notebook_that_has_a_result_tags_it() -> None:
    for file in NOTEBOOKS:
        tagged = [c for c in nbformat.read(file, as_version=4).cells if "result" in c.metadata.get("tags", ())]
        assert tagged or file.stem == "00_walkthrough", file.stem


def test_what_a_report_says_of_its_run(tmp_path: Path) -> None:
    folder = tmp_path / "04_scaled_training" / "mine"
    folder.mkdir(parents=True)
    (folder / "parameters.yaml").write_text("run: mine\nseed: 3\nalpha: 1.0\ntau: 0.3\noutputs: /somewhere\n")
    (folder / "status.json").write_text('{"updated": 0}')
    (folder / "provenance.json").write_text('{"git_commit": "0123456789", "git_dirty": true}')
    nbformat.write(executed(), folder / "run.ipynb")
    page = runs.render(folder / "run.ipynb").read_text().split("<body", 1)[1]
    assert "<p>seed 3 · 01 January 1970 · commit 0123456, modified</p>" in page
    assert "<b>alpha</b></td><td>1.0" in page and "<td>tau</td><td>0.3" in page and "/somewhere" not in page
