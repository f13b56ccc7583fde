"""The index of reports."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner
from test_report import executed

from scaled_ql import runs, site
from scaled_ql.command import main


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Two finished runs with reports and one that is not finished."""
    for run, state in (("first", "finished"), ("second", "finished"), ("half", "failed")):
        folder = tmp_path / "outputs" / "04_scaled_training" / run
        folder.mkdir(parents=True)
        (folder / "parameters.yaml").write_text(f"run: {run}\nseed: 3\n")
        (folder / "status.json").write_text(json.dumps({"state": state}))
        (folder / "summary.json").write_text(json.dumps({"verdict": "- **Pong: 3** is < 4 <script>"}))
        nbformat.write(executed(), folder / "run.ipynb")
        runs.render(folder / "run.ipynb")
    return tmp_path / "outputs"


def test_an_index_has_title_picture_verdict_and_link_of_every_report(outputs: Path) -> None:
    done = CliRunner().invoke(main, ["site", str(outputs)])
    assert done.exit_code == 0, done.output
    page = (outputs / "site" / "index.html").read_text()
    links = re.findall(r'<h2><a href="([^"]+)">([^<]+)</a>', page)
    assert links == [(f"04_scaled_training.{run}.html", f"04 · A title: {run}") for run in ("first", "second")]
    assert all((outputs / "site" / link).exists() for link, _ in links)
    assert page.count("<li><strong>Pong: 3</strong> is &lt; 4 &lt;script&gt;</li>") == page.count("seed 3") == 2
    assert page.count('<img src="data:image/jpeg;base64,') == 2
    assert not re.search(r'(src|href)="(http|/)', page), "it needs no network"


def test_links_between_reports_lead_to_the_same_reports_in_the_site(outputs: Path, tmp_path: Path) -> None:
    links = [f'<a href="../../04_scaled_training/{run}/run.html">' for run in ("second", "half")]
    report = outputs / "04_scaled_training" / "first" / "run.html"
    report.write_text(report.read_text().replace("</main>", "".join(links) + "</main>"))
    assert (report.parent / "../../04_scaled_training/second/run.html").exists()
    site.build(outputs, tmp_path / "site")
    page = (tmp_path / "site" / "04_scaled_training.first.html").read_text()
    assert '<a href="04_scaled_training.second.html"><a title="this report is not here"></main>' in page


def test_a_folder_of_reports_gets_an_index_of_its_own(outputs: Path, tmp_path: Path) -> None:
    site.build(outputs, tmp_path / "gallery")
    (tmp_path / "gallery" / "old.html").write_text("<h1>An older report</h1>")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "gallery").glob("[0o]*.html")}
    page = site.build(tmp_path / "gallery", tmp_path / "gallery").read_text()
    assert page.count("<article>") == 3 and "old" in page
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_no_reports(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["site", str(tmp_path)])
    assert done.exit_code == 1 and "neither finished runs nor reports are in it" in done.output


def test_the_gallerys_index_has_all_its_reports() -> None:
    gallery = runs.workspace() / "outputs" / "gallery"
    linked = set(re.findall(r'<h2><a href="([^"]+)"', (gallery / "index.html").read_text()))
    assert linked == {file.name for file in gallery.glob("*.html")} - {"index.html"}
