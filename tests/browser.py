"""A Chromium for tests of pages, and what is measured in it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_CONTRASTS = """(selector) => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = parse(colour).slice(0, 3).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    const [, , , alpha = 1] = parse(colour);
    return alpha === 0 ? ground(element.parentElement) : colour;
  };
  return [...document.querySelectorAll(selector)]
    .map((element) => {
      const style = getComputedStyle(element);
      const colour = element instanceof SVGElement ? style.stroke : style.color;
      const [low, high] = [light(colour), light(ground(element))].sort((a, b) => a - b);
      return [element.id || element.textContent, (high + 0.05) / (low + 0.05)];
    });
}"""


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """A Chromium of its own, through playwright."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=60_000)  # of two cores that others use too, one draws
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=EXECUTABLE, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def contrasts(page: Any, selector: str) -> list[tuple[str, float]]:
    """Each element that a CSS selector finds, by its text, and the contrast of its text, or line, with its ground."""
    return [(text, ratio) for text, ratio in page.evaluate(_CONTRASTS, selector)]
