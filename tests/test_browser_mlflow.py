"""MLflow's own pages, in a browser, of a real store behind `fmnist ui`: our runs by name, their curves, their differences, their papers."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from browser import chromium, open_page, served, shoot
from conftest import FAST_LABEL, SLOW_LABEL
from playwright.sync_api import Browser, Locator, Page, expect

from fmnist import tracking

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(560),
]  # recording takes a while on a busy machine

ACCURACY = "last/val_accuracy"
PREPARE = """
localStorage['mlflow.assistant.fab.autoOpenedOnFirstLoad_v1'] = 'true'  // MLflow's assistant would cover a quarter of the page
localStorage['mlflow.assistant.panelOpen_v1'] = 'false'
window.alerts = []  // a toast goes after seconds
addEventListener('DOMContentLoaded', () => new MutationObserver(() => {
  for (const alert of document.querySelectorAll(':is([class*=notice-error], [class*=alert-error]):not([data-noted])')) {
    alert.dataset.noted = ''
    window.alerts.push(alert.innerText)
  }
}).observe(document.body, {childList: true, subtree: true}))
"""


@pytest.fixture(scope="module")
def link(recorded: Path) -> Iterator[str]:
    with served(recorded) as link:
        yield link


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with open_page(browser, PREPARE) as page:
        yield page
        assert page.evaluate("window.alerts") == []


@pytest.fixture(scope="module")
def runs(recorded: Path) -> pd.DataFrame:
    """The store's runs, and those of groups, by name: run_id, accuracy as MLflow writes it, status."""
    client = tracking.connect(recorded).client
    found = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()]
    )
    rows = [
        (run.info.run_name, run.info.run_id, run.data.metrics.get(ACCURACY), run.data.tags["kind"])
        for run in found
    ]
    return pd.DataFrame(rows, columns=["name", "run_id", "accuracy", "kind"]).set_index("name")


def names(page: Page) -> list[str]:
    """The names in the list of runs, from the top."""
    rows = page.locator(".ag-pinned-left-cols-container .ag-row")
    shown = rows.evaluate_all(
        "rows => rows.map(row => [Number(row.getAttribute('row-index')), row.querySelector('a')?.innerText])"
    )
    return [name for _, name in sorted(shown)]


def row(page: Page, name: str) -> Locator:
    """A run's row in the list of runs: the part with its name."""
    return page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True))


def test_the_list_shows_groups_that_open_to_their_members(
    page: Page, link: str, runs: pd.DataFrame
) -> None:
    page.goto(link)
    expect(page.get_by_text("12 matching runs")).to_be_visible()
    groups = [f"{SLOW_LABEL} (3 seeds)", f"{FAST_LABEL} (3 seeds)"]
    for group in groups:
        expect(row(page, group)).to_be_visible()
    assert set(names(page)) == {
        *runs.index[runs["kind"] == "group"],
        "baseline epochs=1 batch_size=2000 eval_every=10",
    }
    for group, label in zip(groups, (SLOW_LABEL, FAST_LABEL), strict=True):
        row(page, group).get_by_role("button").first.click()
        expect(row(page, f"{label} s0")).to_be_visible()
        place = names(page).index(group)
        assert sorted(names(page)[place + 1 : place + 4]) == [
            f"{label} s{seed}" for seed in range(3)
        ]
    shoot(page, "mlflow-list")


def test_results_and_settings_are_columns_that_sort(
    page: Page, link: str, runs: pd.DataFrame
) -> None:
    page.goto(link)
    for column in (
        f"metrics.`{ACCURACY}`",
        f"metrics.`{ACCURACY}_std`",
        "params.`optimizer.lr`",
        "tags.`outcome`",
    ):
        expect(
            page.locator(f"[role=columnheader][col-id='{column}']")
        ).to_be_visible()  # of the view that the link names
    page.get_by_test_id(f"sort-header-{ACCURACY}").click()
    best = runs["accuracy"].dropna().sort_values(ascending=False)
    top = page.locator(".ag-pinned-left-cols-container [row-index='0']")
    expect(top).to_contain_text(best.index[0])
    assert names(page)[: len(best)] == best.index.tolist()
    cells = page.locator(f"[role=gridcell][col-id='metrics.`{ACCURACY}`']")
    shown = cells.evaluate_all(
        "cells => cells.map(cell => [Number(cell.parentElement.getAttribute('row-index')), cell.innerText])"
    )
    assert [float(text) for _, text in sorted(shown)[: len(best)]] == best.tolist()
    shoot(page, "mlflow-columns")


def test_the_chart_page_draws_curves(page: Page, link: str) -> None:
    page.goto(f"{link}&compareRunsMode=CHART")
    for group in (f"{SLOW_LABEL} (3 seeds)", f"{FAST_LABEL} (3 seeds)"):
        row(page, group).get_by_role("button").last.click()  # members have curves that groups don't
    page.get_by_placeholder("Search metric charts").fill("^(val/accuracy|train/loss)$")
    cards = page.get_by_test_id("experiment-view-compare-runs-card")
    expect(cards).to_have_count(2)
    for metric, lines in (
        ("train/loss", 7),
        ("val/accuracy", 9),
    ):  # 7 runs, and 2 groups that hold means
        card = cards.filter(has_text=metric)
        card.scroll_into_view_if_needed()
        drawn = card.locator(
            "path.js-line[style*='stroke-opacity: 1;']"
        )  # a paler one lies below each
        expect(drawn).to_have_count(lines)
        assert all(
            "L" in path
            for path in drawn.evaluate_all("lines => lines.map(line => line.getAttribute('d'))")
        )
        expect(card).to_contain_text(f"{SLOW_LABEL} s0")
    shoot(page, "mlflow-charts")


def test_the_compare_page_shows_what_differs(page: Page, link: str, runs: pd.DataFrame) -> None:
    compared = [f"{SLOW_LABEL} s0", f"{FAST_LABEL} s0"]
    ids = runs.loc[compared, "run_id"].tolist()
    page.goto(
        f'{link.partition("#")[0]}#/compare-runs?runs={json.dumps(ids)}&experiments=["1"]&workflowType=machine_learning'
    )
    for name in compared:
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    for line in ("data.holdout 10000 10000", "optimizer.lr 0.001 0.05"):
        expect(page.get_by_role("row", name=line)).to_be_visible()
    page.get_by_text("Show diff only").first.click()
    expect(page.get_by_role("row", name=re.compile("^data.holdout"))).to_be_hidden()
    expect(page.get_by_role("row", name="optimizer.lr 0.001 0.05")).to_be_visible()
    top = (
        page.get_by_role("link", name=ACCURACY, exact=True)
        .locator("..")
        .evaluate("cell => cell.style.top")
    )  # a table of loose cells
    accuracies = [str(round(value, 3)) for value in runs.loc[compared, "accuracy"]]
    expect(page.locator(f"[role=rowgroup] > [style*=' top: {top};']")).to_have_text(
        [ACCURACY, *accuracies]
    )
    page.get_by_role("link", name=ACCURACY, exact=True).scroll_into_view_if_needed()
    shoot(page, "mlflow-compare")


def test_a_run_tells_its_result_and_links_data_model_and_group(
    page: Page, link: str, runs: pd.DataFrame
) -> None:
    page.goto(link.replace("/runs?", f"/runs/{runs['run_id'][f'{SLOW_LABEL} s0']}?"))
    expect(page.get_by_role("heading", name=f"{SLOW_LABEL} s0")).to_be_visible()
    expect(
        page.get_by_text(f"Validation accuracy {runs['accuracy'][f'{SLOW_LABEL} s0']:.4f}, loss")
    ).to_be_visible()
    expect(page.get_by_text("Repeat: fmnist run baseline")).to_be_attached()
    shoot(page, "mlflow-run")
    model = page.get_by_role("link", name="model", exact=True).last
    expect(model).to_have_attribute("href", re.compile("#/experiments/1/models/m-"))
    page.get_by_text(re.compile("^fashion-mnist-train-50000")).click()
    expect(page.get_by_role("dialog")).to_contain_text(
        "https://github.com/zalandoresearch/fashion-mnist"
    )
    shoot(page, "mlflow-dataset")
    page.keyboard.press("Escape")
    page.get_by_role("link", name=f"{SLOW_LABEL} (3 seeds)").click()
    expect(page.get_by_text(f"{runs['accuracy'][f'{SLOW_LABEL} (3 seeds)']:.4f} ±")).to_be_visible()
    for seed in range(3):
        expect(page.get_by_role("link", name=f"{SLOW_LABEL} s{seed}")).to_be_visible()
    shoot(page, "mlflow-group")


def test_a_run_is_renamed_and_deleted_in_the_list(
    browser: Browser, recorded: Path, runs: pd.DataFrame, tmp_path: Path
) -> None:
    home, name = tmp_path / "home", "baseline epochs=1 batch_size=2000 eval_every=10"
    shutil.copytree(recorded, home, symlinks=True)
    with served(home) as link, open_page(browser, PREPARE) as page:
        refused = list[str]()
        page.on(
            "response",
            lambda answer: refused.append(answer.url) if answer.status == 403 else None,
        )
        page.goto(link)
        row(page, name).get_by_role("checkbox").first.check()
        page.get_by_test_id("run-rename-button").click()
        page.get_by_role("dialog").get_by_role("textbox").fill("renamed here")
        page.get_by_role("dialog").get_by_role("button", name="Save").click()
        expect(row(page, "renamed here")).to_be_visible()
        row(page, "renamed here").get_by_role("checkbox").first.check()
        page.get_by_test_id("runs-delete-button").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        expect(row(page, "renamed here")).to_be_hidden()
        assert page.evaluate("window.alerts") == []
        assert refused == []
    run = tracking.connect(home).client.get_run(runs["run_id"][name])
    assert (run.info.run_name, run.info.lifecycle_stage) == ("renamed here", "deleted")


def test_what_a_page_complains_of_is_noticed(browser: Browser, link: str) -> None:
    with open_page(browser, PREPARE) as page:
        page.goto(link.replace("viewStateShareKey=results", "viewStateShareKey=nonsense"))
        page.wait_for_function("window.alerts.length")
        assert "nonsense" in page.evaluate("window.alerts")[0]
