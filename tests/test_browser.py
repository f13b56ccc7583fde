"""JupyterLab and reports in Chromium, used as a person uses them: dragged, clicked, played, read on a phone."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from running import TINY, metrics, opening, run
from written import write_run

from scaled_ql import parameters, runs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    reason = "NO BROWSER TEST WAS RUN: there is no Chromium. apt-get install chromium"
    pytest.skip(reason, allow_module_level=True)

MINUTE = 60_000  # milliseconds
expect.set_options(timeout=MINUTE)
GALLERY = runs.workspace() / "outputs" / "gallery"
REPORTS = sorted(file for file in GALLERY.glob("*.html") if file.name != "index.html")


class Lab(NamedTuple):
    """A JupyterLab whose folder has notebooks; the outputs folder of their runs; what makes a process its user's."""

    address: str
    token: str
    folder: Path
    outputs: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """With settings of its own, not those of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("lab")
    home, notebooks = folder / "home", folder / "notebooks"
    notebooks.mkdir()
    kinds = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR", "LAB_SETTINGS_DIR", "LAB_WORKSPACES_DIR")
    own = {f"JUPYTER{'' if kind.startswith('LAB') else '_'}{kind}": str(home / kind) for kind in kinds}
    own["IPYTHONDIR"] = str(home)
    settings = home / "LAB_SETTINGS_DIR" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.root_dir={notebooks}"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
    try:
        where = home / "RUNTIME_DIR" / f"jpserver-{server.pid}.json"
        while not where.exists():
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        time.sleep(0.2)  # it is being written
        said = json.loads(where.read_text())
        yield Lab(said["url"], said["token"], notebooks, folder / "outputs", own)
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has none
        yield browser
        browser.close()


class Opened(NamedTuple):
    """A page, and what must not happen on it."""

    page: Page
    errors: list[str]


def open_page(browser: Browser, **options: object) -> Opened:
    page, errors = browser.new_page(**options), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(MINUTE)
    return Opened(page, errors)


def open_notebook(browser: Browser, lab: Lab, book: nbformat.NotebookNode, name: str) -> Opened:
    """Open a notebook in JupyterLab, and run all of its cells by the menu."""
    nbformat.write(book, lab.folder / f"{name}.ipynb")
    page, errors = open_page(browser, viewport={"width": 1300, "height": 1000})
    page.goto(f"{lab.address}lab/tree/{name}.ipynb?token={lab.token}&reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    return Opened(page, errors)


def cell_with(page: Page, source: str) -> Locator:
    """The first code cell in which a text stands, once it is executed."""
    cell = page.locator(".jp-CodeCell", has_text=source).first
    done = cell.locator(".jp-InputPrompt", has_text=re.compile(r"\[\d+\]:"))
    raised = page.locator(".jp-OutputArea-output", has_text="Traceback (most recent call last)")
    expect(done.or_(raised).first).to_be_attached(timeout=3 * MINUTE)
    assert not raised.count(), raised.first.text_content()
    cell.scroll_into_view_if_needed()
    return cell


def step_of(cell: Locator) -> int:
    return int(cell.get_by_role("slider").last.get_attribute("aria-valuetext") or "")


def expect_shown(cell: Locator) -> None:
    """Wait until the kernel has shown the step that the slider is at, and has nothing older to do."""
    expect(cell.get_by_role("status")).to_contain_text(f"step {step_of(cell)} of ")


def wait_until(page: Page, happened: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < 180, "it did not happen"
        page.wait_for_timeout(50)  # and events are heard


def drag(page: Page, handle: Locator, share: float) -> None:
    """Drag the handle of a slider to a share of its length."""
    at = handle.bounding_box()
    whole = handle.locator("xpath=ancestor::*[contains(@class, 'noUi-target')]").bounding_box()
    assert at and whole
    page.mouse.move(at["x"] + at["width"] / 2, at["y"] + at["height"] / 2)
    page.mouse.down()
    page.mouse.move(whole["x"] + share * whole["width"], at["y"] + at["height"] / 2, steps=5)
    page.mouse.up()


def another_picture(page: Page, picture: Locator, act: Callable[[], None]) -> float:
    """Milliseconds from an act until its picture is there."""
    before, began = picture.get_attribute("src"), time.perf_counter()
    act()
    page.wait_for_function(
        "([image, before]) => image.src != before && image.complete", arg=[picture.element_handle(), before], polling=5
    )
    return 1_000 * (time.perf_counter() - began)


def play_a_while(page: Page, cell: Locator) -> None:
    """Press play, wait until some steps have passed, and pause."""
    button, began = cell.locator(".widget-play button").first, step_of(cell)
    button.click()
    wait_until(page, lambda: step_of(cell) >= began + 5)
    button.click()
    page.wait_for_timeout(300)
    stopped = step_of(cell)
    expect_shown(cell)
    assert step_of(cell) == stopped, "it is not playing any more"


def test_the_lab_wants_its_token(lab: Lab) -> None:
    assert lab.address.startswith(("http://localhost:", "http://127.0.0.1:"))
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{lab.address}api/contents")


def test_the_episode_browser_is_dragged_clicked_and_played(lab: Lab, chromium: Browser, recording: Path) -> None:
    values = {"outputs": str(lab.outputs), "dataset": str(recording)}
    book = opening("03_data_exploration", "explore.episode_browser(", values)
    page, errors = open_notebook(chromium, lab, book, "data")
    cell = cell_with(page, "explore.episode_browser(")
    picture, episode, step = cell.locator("img.widget-image"), *cell.get_by_role("slider").all()
    last = int(float(step.get_attribute("aria-valuemax") or 0))
    another_picture(page, picture, lambda: drag(page, step, 0.5))
    assert abs(step_of(cell) - last / 2) < 0.1 * last
    expect_shown(cell)
    another_picture(page, picture, lambda: step.press("ArrowLeft"))
    play_a_while(page, cell)
    another_picture(page, picture, lambda: episode.press("ArrowRight"))
    wait_until(page, lambda: step_of(cell) == 0)
    expect_shown(cell)
    another_picture(page, picture, lambda: cell.get_by_role("button", name="next reward").click())
    wait_until(page, lambda: step_of(cell) > 0)
    expect_shown(cell)
    another_picture(page, picture, lambda: cell.get_by_label("game").select_option("Freeway"))
    expect(cell.get_by_role("status")).to_contain_text("Freeway, episode 0, truncated, step 0 of 149")
    page.close()
    assert not errors


def test_the_widgets_of_07_are_dragged_clicked_and_played(
    lab: Lab, chromium: Browser, recording: Path, record_property: Callable[[str, object], None]
) -> None:
    transformer = {"method": "dt", "transformer": "tiny", "subtract_mean_frames": False}
    for name, own in {"noise": {"num_atoms": 51, "dataset": str(recording)}, "other": transformer}.items():
        more = own | {"eval_max_steps": 150}
        write_run(lab.outputs / "04_scaled_training" / name, ["Breakout", "Freeway"], **more)
    values = {"agent": "04_scaled_training/noise", "other": "04_scaled_training/other", "map_states": 40}
    values |= {"run": "browsed", "outputs": str(lab.outputs)}
    book = opening("07_agents", "this_run.finish(", values)
    book.cells.append(nbformat.v4.new_code_cell("explore.watch_runs(runs.outputs_folder(p), seconds=1)"))
    page, errors = open_notebook(chromium, lab, book, "agents")
    cell_with(page, "this_run.finish(")
    assert "data:image/png" in (lab.outputs / "07_agents" / "browsed" / "run.html").read_text()
    browse_an_agent(page, record_property)
    browse_two_agents(page)
    click_on_the_map(page)
    play_along(page)
    watch_a_run_of_another_program(page, lab.outputs / "04_scaled_training" / "noise")
    page.close()
    assert not errors


def browse_an_agent(page: Page, record_property: Callable[[str, object], None]) -> None:
    cell = cell_with(page, "explore.agent_browser(agent, data")
    picture, words, step = cell.locator("img.widget-image"), cell.get_by_role("status"), cell.get_by_role("slider")
    expect(words).to_contain_text("step 0 of 149")
    step.click()
    times = [another_picture(page, picture, lambda: page.keyboard.press("ArrowRight")) for _ in range(25)]
    expect(words).to_contain_text("step 25 of 149")
    text = f"{statistics.median(times):.0f} ms (median), {max(times):.0f} ms (longest) from the key to the picture"
    record_property("a step of the agent browser", text)
    another_picture(page, picture, lambda: drag(page, step, 0.5))
    assert abs(step_of(cell) - 75) < 10
    expect_shown(cell)
    another_picture(page, picture, lambda: cell.get_by_role("button", name="where it looks").click())
    cell.get_by_role("button", name="where it looks").click()
    another_picture(page, picture, lambda: cell.get_by_label("played by").select_option("recording"))
    expect(words).to_contain_text("recording, run 1, episode 0, step 0 of 149")
    play_a_while(page, cell)
    another_picture(page, picture, lambda: cell.get_by_role("button", name="next reward").click())
    expect(words).to_contain_text("Reward 1,")
    another_picture(page, picture, lambda: cell.get_by_label("game").select_option("Freeway"))
    expect(words).to_contain_text("Freeway, recording, run 1, episode 0, step 0 of 149")


def browse_two_agents(page: Page) -> None:
    cell = cell_with(page, "explore.agent_browser(*pair")
    picture, cases = cell.locator("img.widget-image"), cell.get_by_label("disagree")
    words = cases.locator("option").last.text_content() or ""
    (step,) = re.findall(r"step\s(\d+):", words)  # with a space that does not break
    another_picture(page, picture, lambda: cases.select_option(index=cases.locator("option").count() - 1))
    expect(cell.get_by_role("status")).to_contain_text(f"step {step} of 149")
    expect(cell.get_by_role("status")).to_contain_text("asking for a return of")


def click_on_the_map(page: Page) -> None:
    cell = cell_with(page, "explore.state_map_browser(")
    words, chart = cell.get_by_role("status"), cell.locator(".widget-html img")
    before, box = words.inner_text(), chart.bounding_box()
    assert box
    for share in (0.2, 0.8):  # one of two places at the map's ends is far from the state in its middle
        chart.click(position={"x": share * box["width"], "y": 0.5 * box["height"]})
    expect(words).not_to_have_text(before)


def play_along(page: Page) -> None:
    cell = cell_with(page, "explore.play_along(agent, max_steps=protocol[")
    words, view = cell.get_by_role("status"), cell.locator("img.widget-image")
    expect(words).to_contain_text("Step 0,")
    another_picture(page, view, lambda: cell.get_by_role("button", name=re.compile("^FIRE")).click())
    expect(words).to_contain_text("Step 1,")
    keys = cell.get_by_label("keys")
    keys.click()
    another_picture(page, view, lambda: keys.press("ArrowLeft"))
    expect(words).to_contain_text("Step 2,")
    cell.get_by_role("button", name="agent", exact=True).click()
    another_picture(page, view, lambda: cell.get_by_role("button", name="one step").click())
    expect(words).to_contain_text("Step 3,")
    button = cell.locator(".widget-play button").first
    button.click()
    expect(words).to_contain_text(re.compile(r"Step (\d{2,}),"))
    button.click()
    cell.get_by_role("button", name="begin again").click()
    expect(words).to_contain_text("Step 0,")


def watch_a_run_of_another_program(page: Page, folder: Path) -> None:
    cell = cell_with(page, "explore.watch_runs(")
    expect(cell.get_by_role("row", name="browsed")).to_contain_text("finished")
    runs.write_json(folder / "status.json", {"state": "interrupted", "done": 7, "total": 9, "updated": time.time()})
    expect(cell.get_by_role("row", name="noise")).to_contain_text("7 of 9")


def test_training_is_interrupted_and_resumed(lab: Lab, chromium: Browser, recording: Path) -> None:
    values = parameters.load(runs.workspace() / TINY["04_scaled_training"])
    values |= {"dataset": str(recording), "outputs": str(lab.outputs), "num_steps": 60, "log_every": 1, "run": "again"}
    values |= {"encoder": "nature_narrow"}
    page, errors = open_notebook(chromium, lab, opening("04_scaled_training", "trainer.steps(", values), "training")
    folder = lab.outputs / "04_scaled_training" / "again"
    log = folder / "metrics.jsonl"
    wait_until(page, lambda: log.exists() and log.read_bytes().count(b"\n") > 2)
    page.get_by_role("button", name=re.compile("^Interrupt")).click()
    cell = page.locator(".jp-CodeCell", has_text="trainer.steps(")
    expect(cell.locator(".jp-OutputArea-output").last).to_contain_text("KeyboardInterrupt")
    wait_until(page, lambda: runs.read_json(folder / "status.json")["state"] == "interrupted")
    done = len(metrics(folder))
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    expect(cell.locator(".jp-OutputArea")).to_contain_text("60/60", timeout=3 * MINUTE)
    cell_with(page, "trainer.steps(")
    assert cell.locator(".jp-RenderedImage img").count() == 1
    assert 3 <= done < 60, "it was interrupted in the middle"
    assert [row["step"] for row in metrics(folder)] == list(range(1, 61))
    page.close()
    assert not errors


def test_a_run_opens_trusted_with_its_films_and_figures(lab: Lab, chromium: Browser, recording: Path) -> None:
    values = {"run": "seen", "dataset": str(recording), "encoder": "nature_narrow", "num_steps": 4, "log_every": 2}
    values |= {"checkpoint_every": 4, "eval_episodes": 1, "eval_max_steps": 40, "video_steps": 20}
    words = [word for name, value in values.items() for word in ("-p", name, json.dumps(value))]
    done = run("04_scaled_training", lab.folder / "runs", TINY["04_scaled_training"], *words, **lab.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    book = nbformat.read(lab.folder / "runs" / "04_scaled_training" / "seen" / "run.ipynb", as_version=4)
    book.metadata["from"] = "elsewhere"
    nbformat.write(book, lab.folder / "foreign.ipynb")
    page, errors = open_page(chromium, viewport={"width": 1300, "height": 1000})
    for path, films in (("foreign.ipynb", 0), ("runs/04_scaled_training/seen/run.ipynb", 2)):
        page.goto(f"{lab.address}lab/tree/{path}?token={lab.token}&reset")
        page.get_by_text(re.compile(r"Python 3 \(ipykernel\) \| ")).wait_for()
        page.locator(".jp-RenderedImage img").first.wait_for(state="attached")
        page.get_by_role("heading", name="Films").or_(page.locator("video")).first.scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        assert page.locator("video source[src]").count() == films, path  # JupyterLab takes an untrusted one's away
    film = page.locator("video").first
    film.evaluate("film => { film.muted = true; return film.play() }")
    wait_until(page, lambda: film.evaluate("film => film.currentTime") > 0)
    page.close()
    assert not errors


@pytest.fixture
def offline(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Makes pages without a network; nothing may have been asked of one, and no error raised."""
    asked, errors, contexts = [], [], []

    def make(**options: object) -> Page:
        contexts.append(chromium.new_context(offline=True, **options))
        page = contexts[-1].new_page()
        page.on("request", lambda request: asked.append(request.url[:100]))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        return page

    yield make
    for context in contexts:
        context.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == errors == []


# Of a page: how far it is wider than the window; pictures that are; tables that are, but cannot be scrolled.
WIDE = """() => {
  const scrolls = table => {
    let box = table;
    while ((box = box.parentElement) && box.scrollWidth <= box.clientWidth);
    if (!box || box == document.documentElement) return false;
    box.scrollLeft = 30;
    return box.scrollLeft > 0;
  };
  const wide = kind => [...document.querySelectorAll(kind)].filter(
    element => element.checkVisibility() && element.getBoundingClientRect().right > innerWidth);
  return {
    page: document.documentElement.scrollWidth - innerWidth,
    pictures: wide('img, video').map(picture => picture.alt),
    tables: wide('table').filter(table => !scrolls(table)).map(table => table.innerText.slice(0, 80)),
  };
}"""


@pytest.mark.parametrize("width", [1200, 400])
def test_reports_fit_the_window_and_ask_for_nothing(offline: Callable[..., Page], width: int) -> None:
    page = offline(viewport={"width": width, "height": 900})
    for file in [*REPORTS, GALLERY / "index.html"]:
        page.goto(file.as_uri())
        assert page.evaluate(WIDE) == {"page": 0, "pictures": [], "tables": []}, file.name


# Of a page: the lowest contrast between a text and what is behind it (WCAG 2.2, contrast ratio), and that text.
CONTRAST = """() => {
  const numbers = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = color => numbers(color).slice(0, 3).map(x => x / 255).map(
    x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4
  ).reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if ((numbers(color)[3] ?? 1) > 0) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let worst = [Infinity, ''];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, text = texts.currentNode.data.trim();
    if (!text || element.closest('script, style, svg') || !element.checkVisibility()) continue;
    const [low, high] = [getComputedStyle(element).color, behind(element)].map(luminance).sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < worst[0]) worst = [ratio, text.slice(0, 80)];
  }
  return worst;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_reports_are_readable_in_the_light_and_in_the_dark(offline: Callable[..., Page], scheme: str) -> None:
    page = offline(color_scheme=scheme, viewport={"width": 1200, "height": 900})
    for file in [*REPORTS, GALLERY / "index.html"]:
        page.goto(file.as_uri())
        for switch in page.get_by_label("show all code").all():
            switch.evaluate("box => box.click()")  # among contents, which are folded
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", back))) < 200) == (scheme == "dark"), file.name
        ratio, text = page.evaluate(CONTRAST)
        assert ratio > 4.5, f"{file.name}: {text!r} has a contrast of {ratio:.1f}"


# Whether each kind of result that a report begins with is in sight before anything is scrolled; 100 pixels are enough.
IN_SIGHT = """() => {
  const shown = element => {
    const box = element.getBoundingClientRect(), part = Math.min(box.height, 100);
    const frame = element.closest('.jp-OutputArea-output')?.getBoundingClientRect() ?? box;
    return box.height > 0 && box.top >= 0 && box.top + part <= Math.min(innerHeight, frame.bottom + 1);
  };
  const kinds = {verdict: '.jp-RenderedMarkdown, .jp-RenderedText', table: 'tbody tr', picture: 'img'};
  return Object.fromEntries(Object.entries(kinds).map(([name, kind]) => {
    const found = [...document.querySelectorAll('.celltag_top')].flatMap(cell => [...cell.querySelectorAll(kind)]);
    return [name, found.length ? found.some(shown) : null];
  }));
}"""


def test_from_the_index_to_verdict_score_and_picture_without_scrolling(offline: Callable[..., Page]) -> None:
    page = offline(viewport={"width": 1200, "height": 900})
    for file in REPORTS:
        page.goto((GALLERY / "index.html").as_uri())
        page.locator(f'h2 a[href="{file.name}"]').click()
        expect(page.locator("h1").first).to_be_in_viewport()
        about = json.loads(page.locator("#report").text_content() or "")
        seen = page.evaluate(IN_SIGHT)
        assert seen["picture"] and seen["table"] is not False, file.name
        assert bool(seen["verdict"]) == bool(about["verdict"]), file.name
