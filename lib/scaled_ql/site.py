"""An index of reports, as static files that any host serves."""

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import jinja2
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image

from scaled_ql import run_table, runs

THUMBNAIL = 480  # pixels
LINK = re.compile(r'href="\.\./\.\./([^/"]+)/([^/"]+?)(?:/run)?\.html"')  # of `explore.table`, from report to report


def build(source: Path, destination: Path) -> Path:
    """Copy reports to a folder, and write its `index.html`.

    Args:
        source: an outputs folder, whose finished runs' reports become ``<notebook>.<run>.html``, links between them
            included; or a folder of reports, which keep their names.
        destination: folder to write to, which may be the folder of reports. Reports in it already are indexed, too.

    Returns:
        the index.

    Raises:
        RunError: there are no reports.
    """
    reports = {
        file: f"{file.parent.parent.name}.{file.parent.name}.html" for file in sorted(source.glob("*/*/run.html"))
    }
    reports = {file: name for file, name in reports.items() if run_table.state(file.parent) == "finished"}
    reports |= {file: file.name for file in sorted(source.glob("*.html")) if file.name != "index.html"}
    if not reports:
        raise runs.RunError(f"{source}: neither finished runs nor reports are in it. Give an outputs folder.")
    destination.mkdir(parents=True, exist_ok=True)
    names = {*reports.values(), *(file.name for file in destination.glob("*.html"))}
    for file, name in reports.items():
        page = file.read_text(encoding="utf-8")
        linked = LINK.sub(lambda found: _link(*found.groups(), names), page)
        if file != destination / name or linked != page:
            (destination / name).write_text(linked, encoding="utf-8")
    entries = [describe(file) for file in sorted(destination.glob("*.html")) if file.name != "index.html"]
    entries.sort(key=lambda entry: entry["title"])
    folder = Path(__file__).parent / "templates"
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder, encoding="utf-8"), autoescape=True)
    index = destination / "index.html"
    page = environment.get_template("site.html.j2").render(reports=entries)
    index.write_text(page, encoding="utf-8")
    return index


def _link(notebook: str, run: str, names: set[str]) -> str:
    """The attribute of a link to a run's report: its name in the site, or none where the site does not have it."""
    name = f"{run}.html" if notebook == "gallery" else f"{notebook}.{run}.html"
    return f'href="{name}"' if name in names else 'title="this report is not here"'


def describe(file: Path) -> dict[str, str]:
    """A report's entry: file, title, line, verdict (HTML), picture (data URL or "") and alt."""
    page = file.read_text(encoding="utf-8")
    found = re.search(r'<script id="report" type="application/json">(.*?)</script>', page, re.DOTALL)
    about: dict[str, Any] = json.loads(found[1]) if found else {}
    heading = re.search(r"<title>(.*?)</title>", page, re.DOTALL)
    title = about.get("title") or (html.unescape(heading[1]).strip() if heading else file.stem)
    picture = re.search(r'<img [^>]*src="(data:image/(?:png|jpeg);base64,[^"]+)"', page)
    alt = re.search(r'alt="([^"]*)"', picture[0]) if picture else None
    return {
        "file": file.name,
        "title": title,
        "line": about.get("line", ""),
        "verdict": MarkdownWithMath(renderer=IPythonRenderer(escape=True)).render(about.get("verdict", "")),
        "picture": _smaller(picture[1]) if picture else "",
        "alt": html.unescape(alt[1]) if alt else "",
    }


def _smaller(url: str) -> str:
    """A thumbnail of a picture, both data URLs."""
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
