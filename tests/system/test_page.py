"""The page in a real browser: by keyboard, on a small screen, in both schemes, and when something goes wrong."""

from __future__ import annotations

import contextlib
import re

import pytest
from browser import EXECUTABLE, contrasts
from loopback import Server as OtherServer
from processes import wait_until
from serving import PATIENCE, Server, train_tiny_run

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    run = train_tiny_run(tmp_path_factory.mktemp("page"))
    with Server(run, "--slots", 4, "--max-words", 10**7, "--max-prompt", 500, "--root-path", "/expose/ID") as server:
        yield server


@pytest.fixture
def open_page(browser, server):
    """Opens the page in a window of its own; in the end nothing may have been asked of others or complained about."""
    asked, complaints = [], []
    with contextlib.ExitStack() as windows:

        def open_page(path="/", **settings):
            context = browser.new_context(**settings)
            windows.callback(context.close)
            context.set_default_timeout(1000 * PATIENCE)
            page = context.new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
            page.goto(server.url + path)
            return page

        yield open_page
    assert [url for url in asked if not url.startswith((server.url, "data:"))] == []
    assert [said for said in complaints if "Failed to load resource" not in said] == []


def words_of(page):
    return page.get_by_label("Generated text").inner_text().split()


def wait_for_status(page, pattern):
    playwright.expect(page.get_by_role("status")).to_have_text(re.compile(pattern), timeout=1000 * PATIENCE)
    return page.get_by_role("status").inner_text()


@pytest.mark.parametrize("path", ["/", "/expose/ID", "/expose/ID/"])
def test_a_text_is_written_by_keyboard_alone(server, open_page, path):
    page = open_page(path)
    for label, value in [
        ("Prompt", "the cat"),
        ("Words", "12"),
        ("Temperature", "0.5"),
        ("Top k", "4"),
        ("Top p", "0.9"),
    ]:
        page.keyboard.press("Tab")
        playwright.expect(page.get_by_label(label, exact=True)).to_be_focused()
        page.keyboard.press("Control+A")
        page.keyboard.type(value)
    page.keyboard.press("Tab")
    page.keyboard.type("11")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    playwright.expect(page.get_by_label("Never write <unk>")).to_be_checked()
    for _ in range(2):
        page.keyboard.press("Tab")
    playwright.expect(page.get_by_role("button", name="Generate")).to_be_focused()
    page.keyboard.press("Enter")
    assert wait_for_status(page, "^Done") == "Done: 12 words, seed 11."
    knobs = {"prompt": "the cat", "words": 12, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "seed": 11}
    (expected,) = server.ask_json("/v1/generate", {**knobs, "suppress_unk": True}).json["texts"]
    assert words_of(page) == ["the", "cat", *[word for word in expected["words"] if word != "<eos>"]]


def test_text_appears_while_it_is_written_and_stops_when_told(server, open_page):
    page = open_page()
    page.get_by_label("Words").fill(str(10**7))
    for stop in (lambda: page.keyboard.press("Escape"), page.get_by_role("button", name="Stop").click):
        page.get_by_label("Prompt").press("Control+Enter")
        wait_until(lambda: len(words_of(page)) > 3)
        count = len(words_of(page))
        wait_until(lambda count=count: len(words_of(page)) > count)
        playwright.expect(page.get_by_role("button", name="Generate")).to_be_disabled()
        stop()
        wait_for_status(page, r"^Stopped after \d+ words, seed \d+\.$")
        wait_until(lambda: server.figure("gluon_lm_live_texts") == 0)
        playwright.expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def test_a_refusal_says_why_and_the_next_text_clears_it(open_page):
    page = open_page()
    page.get_by_label("Top p").fill("0")
    page.get_by_role("button", name="Generate").click()
    alert = page.get_by_role("alert")
    playwright.expect(alert).to_have_text("Not generated: top_p: Input should be greater than 0.")
    page.get_by_label("Top p").fill("")
    page.get_by_role("button", name="Generate").click()
    wait_for_status(page, "^Done: 100 words")
    playwright.expect(alert).to_be_hidden()


def test_a_server_that_is_gone_is_told(open_page):
    page = open_page()
    page.context.set_offline(True)
    page.get_by_role("button", name="Generate").click()
    playwright.expect(page.get_by_role("alert")).to_have_text("The server cannot be reached.")
    page.context.set_offline(False)
    page.get_by_role("button", name="Generate").click()
    wait_for_status(page, "^Done: 100 words")


def test_without_scripts_the_form_still_works(open_page):
    page = open_page(java_script_enabled=False)
    page.get_by_label("Words").fill("25")
    page.get_by_label("Stop at the end of a line").uncheck()
    page.get_by_role("button", name="Generate").click()
    page.wait_for_url("**/expose/ID/")
    assert len(page.locator("body").inner_text().split()) == 25


def test_a_page_of_another_site_has_nothing_written(server, browser):
    page_of_other = f"""<!DOCTYPE html><form method="post" action="{server.url}/">
        <input name="words" value="9"><button>Write</button></form>"""
    written = server.figure("gluon_lm_words_total")
    with contextlib.closing(OtherServer()) as other, contextlib.closing(browser.new_context()) as window:
        other.pages["/"] = page_of_other.encode()
        page = window.new_page()
        page.goto(other.url.replace("127.0.0.1", "localhost"))  # to a browser, another site
        page.evaluate(
            "url => fetch(url, {method: 'POST', mode: 'no-cors', body: new URLSearchParams({words: 9})})", server.url
        )
        page.get_by_role("button", name="Write").click()
        playwright.expect(page.locator("body")).to_contain_text("a page of another site may not post here")
    assert server.figure("gluon_lm_words_total") == written


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_small_screen_and_can_be_read(open_page, scheme):
    page = open_page(viewport={"width": 360, "height": 640}, color_scheme=scheme, has_touch=True)
    page.get_by_label("Prompt").fill("the " + "very" * 100)
    page.get_by_label("Words").fill("40")
    page.get_by_role("button", name="Generate").tap()
    wait_for_status(page, "^Done")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.evaluate(
        "show('x'.repeat(200)); for (const button of document.querySelectorAll('button')) button.disabled = false"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    found = contrasts(page, "h1, p, a, label, input, textarea, button, #text, #text .given")
    assert len(found) > 15 and [entry for entry in found if entry[1] < 4.5] == []
    is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 26)"
    assert is_dark == (scheme == "dark")
    for box in [page.get_by_role("button", name=name).bounding_box() for name in ("Generate", "Stop")]:
        assert box["height"] >= 44 and box["x"] + box["width"] <= 360


def test_the_description_of_the_api_is_shown(open_page):
    page = open_page("/expose/ID/docs", viewport={"width": 360, "height": 640})
    playwright.expect(page.get_by_role("heading", name="POST /v1/generate")).to_be_visible()
    row = page.get_by_role("row", name=re.compile("^temperature")).first
    assert "up to 1000" in row.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
