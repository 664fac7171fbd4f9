"""The HTML report in a real browser: headless Chromium, opened from the disk, as a reader with a mouse, a keyboard or a screen reader has it."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import chromium, shoot
from conftest import REPOSITORY, command, make_home, stop_sidecar
from playwright.sync_api import Browser, Page

from fmnist import report as reports
from fmnist import tracking

pytestmark = pytest.mark.browser
TINY = ("-s", "train.epochs=1", "-s", "train.batch_size=500", "-s", "train.eval_every=20")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A report of three settings, with three seeds each and one."""
    home = make_home(tmp_path_factory.mktemp("browser"))
    patch = pytest.MonkeyPatch()
    patch.setenv("FMNIST_HOME", str(home))
    for arguments in (
        ("--seeds", "3"),
        ("-s", "optimizer.lr=0.01", "--seeds", "3"),
        ("-s", "optimizer.lr=0.1"),
    ):
        result = command(home, "run", "holdout", *TINY, *arguments)
        assert result.returncode == 0, result.stderr
    reports.write(tracking.connect(home), home / "reports", [])
    yield home / "reports" / "report.html"
    stop_sidecar(home)
    shutil.rmtree(home)
    patch.undo()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Browser, written: Path) -> Iterator[Page]:
    """The report, opened from its file; whatever the console says or the page asks of a network fails the test."""
    opened = browser.new_page(viewport={"width": 1360, "height": 900}, color_scheme=request.param)
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on(
        "request",
        lambda asked: (
            said.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None
        ),
    )
    opened.goto(written.as_uri())
    yield opened
    shoot(opened, f"report-{request.node.originalname.removeprefix('test_')}-{request.param}")
    opened.close()
    assert said == []


def column(page: Page, number: int) -> list[str]:
    return page.locator("section[aria-labelledby=runs] tbody tr").evaluate_all(
        f"rows => rows.map(row => row.cells[{number}].textContent)"
    )


def test_report_opens_and_passes_the_accessibility_checks(page: Page) -> None:
    assert page.locator("h1").inner_text() == "3 settings compared, 7 runs"
    page.locator("details").evaluate_all("all => all.forEach(each => { each.open = true })")
    found = Axe().run(page)
    assert len(found.response["passes"]) > 20
    assert found.violations_count == 0, found.generate_report()
    page.set_viewport_size(
        {"width": 1360, "height": page.evaluate("document.documentElement.scrollHeight")}
    )
    shoot(page, "report-whole")


def test_colours_follow_the_scheme(page: Page, request: pytest.FixtureRequest) -> None:
    brightness = (
        sum(
            map(
                int,
                re.findall(
                    r"\d+",
                    page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor"),
                )[:3],
            )
        )
        / 3
    )
    assert brightness > 240 if "light" in request.node.name else brightness < 40


def test_table_sorts_by_click_and_by_keyboard(page: Page) -> None:
    head = page.locator("section[aria-labelledby=runs] th", has_text="last val acc")
    number = head.evaluate("head => head.cellIndex")
    unsorted = column(page, number)
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, number) == sorted(unsorted) != unsorted
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, number) == sorted(unsorted, reverse=True)
    name = page.locator("section[aria-labelledby=runs] th", has_text="run").first
    name.get_by_role("button").press("Space")
    assert name.get_attribute("aria-sort") == "ascending"
    assert head.get_attribute("aria-sort") is None
    names = column(page, 0)
    assert [name[-2:] for name in names if "lr=" not in name] == ["s0", "s1", "s2"]
    name.get_by_role("button").press("Space")
    assert column(page, 0) == names[::-1]
    page.locator("#runs").scroll_into_view_if_needed()


def test_curves_show_values_under_the_pointer_and_by_keyboard(page: Page) -> None:
    drawn = json.loads(page.locator("#data").text_content())
    last = [f"{group['val/accuracy']['mean']['value'][-1]:.4f}" for group in drawn]
    first = [f"{group['val/accuracy']['mean']['value'][0]:.4f}" for group in drawn]
    cells = page.locator(".key tbody tr td:nth-child(2)")
    assert [cell.split(" ")[0] for cell in cells.all_inner_texts()] == last
    chart = page.locator("[data-metric='val/accuracy']")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 0.09 * box["width"], box["y"] + box["height"] / 2)
    tip = page.locator(".tip")
    assert all(value in tip.inner_text() for value in first)
    assert [cell.split(" ")[0] for cell in cells.all_inner_texts()] == first
    shoot(page, "report-hover")
    page.mouse.move(2, 2)
    assert tip.count() == 0
    slider = page.get_by_role("slider")
    slider.press("End")
    assert [cell.split(" ")[0] for cell in cells.all_inner_texts()] == last
    assert slider.get_attribute("aria-valuetext") == "step 100"
    slider.press("Home")
    assert slider.get_attribute("aria-valuetext") == "step 0"


def test_axis_is_switched_and_settings_are_hidden(page: Page) -> None:
    chart = page.locator("[data-metric='train/loss']")
    ends = {"step": "step 100", "epoch": "epoch 1", "examples": "examples 50,000"}
    for axis in ("step", "epoch", "examples", "seconds"):
        page.get_by_role("radio", name=axis).check()
        assert chart.locator("text").all_text_contents()[-1] == axis
        assert chart.get_attribute("aria-label").startswith(
            f"training loss, trailing mean by {axis};"
        )
        assert (
            page.get_by_role("slider")
            .get_attribute("aria-valuetext")
            .startswith(ends.get(axis, "seconds "))
        )
    lines = chart.locator("path").count()
    button = page.locator(".key button").first
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert chart.locator("path").count() == lines - 5  # a mean, a band, three runs
    button.click()
    assert (button.get_attribute("aria-pressed"), chart.locator("path").count()) == ("true", lines)


def test_everything_is_reached_by_the_keyboard(page: Page) -> None:
    seen = []
    for _ in range(400):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "document.activeElement.textContent.trim().slice(0, 40) || document.activeElement.id"
            )
        )
        if seen[-1].startswith("fmnist run"):
            break
    assert {"Verdicts", "at"} <= set(seen)  # from the first link, by the slider, to the commands
    assert any(text.startswith("fmnist run") for text in seen)


def test_paper_is_light_and_whole(browser: Browser, written: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(written.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert (
        page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert not page.locator(".controls").is_visible()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    content = page.pdf(path=REPOSITORY / "build" / "screenshots" / "report.pdf", format="A4")
    assert content.startswith(b"%PDF")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0
    page.close()


def test_narrow_screen_scrolls_tables_and_not_the_page(browser: Browser, written: Path) -> None:
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.goto(written.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    shoot(page, "report-narrow")
    page.close()
