"""The page in headless Chromium: type, stream, stop, compare two models, and watch a run that is training.

Skipped where playwright (pip install playwright) or a Chromium is missing; with REQUIRE_BROWSER=1 that is a failure.
SCREENSHOTS=DIR keeps images of both tabs, light and dark, wide and narrow.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.saved_runs import QWEN3, TOKENS, make_run, write_training
from torchxihe.__main__ import run

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
TROUBLE: list[str] = []
"""What the page has logged, and its uncaught errors."""


def missing(why: str) -> None:
    if os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import Error, sync_playwright
    except ModuleNotFoundError:
        missing("no playwright here")
    with sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        program = next((found for name in names if (found := shutil.which(name))), None)
        try:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except Error as error:
            missing(f"no Chromium here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and its export, a run that is done, and the config of one that can be trained."""
    root = tmp_path_factory.mktemp("browser")
    config, _ = make_run(root / "runs", QWEN3, TOKENS)
    run(["export", str(config.run_dir), "--out", str(root / "exported" / "small")])
    toml = write_training(root, steps=100_000, metrics="sample_every = 20")
    toml.write_text(toml.read_text().replace(f'dir = "{root}"', f'dir = "{root}/runs"'))
    run(["prepare", str(toml)])
    run(["train", str(toml), "--training.steps=6", "--run.name=done"])
    return root


@pytest.fixture(scope="module")
def address(given: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "torchxihe", "serve", "runs", "exported", "--port", "0"]
    process = subprocess.Popen(command, cwd=given, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    yield re.findall(r"http://\S+", process.stdout.readline())[0]
    process.terminate()
    process.wait(20)


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    TROUBLE.clear()
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    page.on("console", lambda message: TROUBLE.append(message.text))
    page.on("pageerror", lambda error: TROUBLE.append(str(error)))
    page.goto(address)
    yield page
    page.close()
    assert not TROUBLE


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def text_of(page: Any, column: int = 0) -> str:
    return page.locator(".output").nth(column).inner_text()


def test_type_stream_and_stop(page: Any) -> None:
    """Seen to fail with a Stop that does nothing."""
    page.click("text=Talk")
    page.select_option(".column select >> nth=0", "runs/small/checkpoints/step-00000007")
    page.fill("#temperature", "3")
    page.fill("#max_tokens", "4000")
    page.type("#prompt", "import ")
    page.press("#prompt", "Control+Enter")
    wait_for(lambda: len(text_of(page)) > 60, "text")
    first = text_of(page)
    assert first.startswith("import ") and page.is_enabled("#stop")
    wait_for(lambda: len(text_of(page)) > len(first) + 60, "more text: it streams")
    page.click("#stop")
    page.locator(".status", has_text="stopped").wait_for()
    stopped = text_of(page)
    time.sleep(0.7)
    assert text_of(page) == stopped and stopped.startswith(first) and page.is_disabled("#stop")
    chances = page.locator(".output span[style]").evaluate_all(
        "all => all.map(span => [span.style.cssText, span.title])"
    )
    assert len(chances) > 20 and all(re.fullmatch(r"--p: [\d.e-]+;", style) for style, _ in chances)
    assert all(re.fullmatch(r"[\d.e-]+ %", title) for _, title in chances)


def test_compare_two_models(page: Any) -> None:
    """The export of a model says what the model says; colors can be switched off."""
    page.click("text=Talk")
    page.check("#compare")
    page.select_option(".column select >> nth=0", "runs/small/checkpoints/step-00000007")
    page.select_option(".column select >> nth=1", "exported/small")
    page.fill("#max_tokens", "40")
    page.fill("#prompt", "<b>def</b> f(")
    page.click("#go")
    for column in (0, 1):
        page.locator(".status").nth(column).filter(has_text=re.compile(r"^\d+ tokens in")).wait_for()
    assert text_of(page, 0) == text_of(page, 1) and len(text_of(page)) > 30
    assert text_of(page).startswith("<b>def</b> f(") and not page.locator(".output b").count()
    color = "span => getComputedStyle(span).backgroundColor"
    span = page.locator(".output span[style]").last
    assert "0)" not in span.evaluate(color)
    page.uncheck("#colored")
    assert span.evaluate(color) == "rgba(0, 0, 0, 0)"


def test_a_mistake_is_shown(page: Any) -> None:
    page.click("text=Talk")
    page.fill("#top_p", "0")
    page.evaluate("document.querySelector('#ask').noValidate = true")
    page.click("#go")
    page.locator(".status.error", has_text="top_p").first.wait_for()
    TROUBLE[:] = [line for line in TROUBLE if "400 (Bad Request)" not in line]


def test_watch_a_run_that_trains(page: Any, given: Path) -> None:
    """Step and curves change while it trains, two runs are overlaid, and its report opens."""
    command = [sys.executable, "-m", "torchxihe", "train", "train.toml"]
    log = (given / "train.log").open("w")
    process = subprocess.Popen(command, cwd=given, env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        item = page.locator("#runs li", has_text="train")
        item.locator(".state.training").wait_for()
        item.get_by_role("checkbox").check()
        line = page.locator('.panel path[data-name^="train"]').first
        line.wait_for(state="attached")
        before, facts = line.get_attribute("d"), item.locator(".facts").inner_text()
        wait_for(lambda: line.get_attribute("d") != before, "a longer curve")
        wait_for(lambda: item.locator(".facts").inner_text() != facts, "a later step")
        page.locator("#samples h3", has_text="train, step").first.wait_for()
        names = page.locator(".panel figcaption").all_inner_texts()
        assert "Training loss by source nats/token" in names and "Validation loss by source and set nats/token" in names
        page.locator(".plot").first.hover()
        page.locator(".tip", has_text=re.compile(r"step \d+\s*train: \d")).wait_for()
        with page.expect_popup() as opened:
            item.get_by_role("link", name="report").click()
        opened.value.locator("h2", has_text="Setup").wait_for()
        assert opened.value.locator(".panel").count() == 8
        opened.value.locator(".plot").first.hover()
        opened.value.locator(".tip").wait_for()
    finally:
        process.terminate()
        assert process.wait(60) == 0, (given / "train.log").read_text()
        log.close()
    item.locator(".state.stopped").wait_for()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(browser: Any, address: str, scheme: str, width: int) -> None:
    """In both tabs and the report."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    page.goto(address)
    item = page.locator("#runs li", has_text="done")
    item.get_by_role("checkbox").check()
    page.locator(".panel").first.wait_for()
    link = item.get_by_role("link", name="report").get_attribute("href")
    for tab in ("", "#talk", link):
        page.goto(f"{address}{tab}")
        page.locator(":is(.panel, #ask):visible").first.wait_for()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        if folder := os.environ.get("SCREENSHOTS"):
            name = tab.strip("#").partition("?")[0] or "watch"
            page.screenshot(path=f"{folder}/{name}-{scheme}-{width}.png", full_page=True)
    page.close()
