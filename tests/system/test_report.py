"""The report of two runs in a real browser: complete, by keyboard, on a narrow screen, in both schemes, harmless."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import struct
import sys
import warnings

import numpy as np
import pytest
from browser import contrasts
from processes import events

from gluon_lm.history import RunHistory
from gluon_lm.report import main as report
from gluon_lm.reporting.curves import colour_of, dashes_of, panels_of
from gluon_lm.train import main as train

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

HOSTILE = "<script>alert(1)</script>"
NAMES = ["first", "<b>second&$1_run"]
FLAGS = "--emsize 8 --nhid 8 --batch-size 4 --bptt 5 --lr 5 --log-interval 3 --eval-every 20 --max-steps 200"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs on a text in which every other word is a script, the report, and its plots."""
    path = tmp_path_factory.mktemp("report")
    for split in ("train", "valid", "test"):
        (path / f"{split}.txt").write_text(f"the {HOSTILE} sees {HOSTILE} .\n" * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLUON_LM_CACHE", str(path / "cache"))
        patch.chdir(path)
        flags = ["--data", "train.txt", "valid.txt", "test.txt", "--epochs", "30", *FLAGS.split()]
        assert train([*flags, "--save", NAMES[0]]) == 0
        assert train([*flags, "--save", NAMES[1], "--seed", "7", "--dropout", "0.5"]) == 0
        assert report([*NAMES, "--output", "report.html", "--words", "40"]) == 0
    return path


@pytest.fixture
def open_report(browser, folder):
    """Opens the page; in the end it must have asked for nothing, complained of nothing and run nothing of a user's."""
    asked, complaints = [], []
    with contextlib.ExitStack() as windows:

        def open_report(name="report.html", **settings):
            context = browser.new_context(**settings)
            windows.callback(context.close)
            page = context.new_page()
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda said: complaints.append(said.text))
            page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
            page.goto((folder / name).as_uri())
            return page

        yield open_report
    assert {url for url in asked if not url.startswith("data:")} == {(folder / "report.html").as_uri()}
    assert complaints == []


def test_it_tells_all_of_both_runs(open_report, folder):
    page = open_report(viewport={"width": 1400, "height": 900})
    headings = page.get_by_role("heading", level=2).all_inner_texts()
    assert headings == ["Results", "Curves", "Texts", "Configuration", "Checkpoints"]
    assert page.locator("legend ~ label").all_inner_texts() == NAMES
    for name in NAMES:
        row = page.locator("#results ~ * tbody tr").filter(has=page.get_by_role("rowheader", name=name, exact=True))
        cells = row.get_by_role("cell").all_inner_texts()
        best = min(event["loss"] for event in events(folder / name, "valid"))
        (test,) = events(folder / name, "test")
        memory = max(event["peak_memory"] for event in events(folder / name, "valid"))
        assert {f"{math.exp(best):,.2f}", f"{math.exp(test['loss']):,.2f}", f"{memory / 1e6:,.0f} MB"} <= set(cells)
        assert cells[:2] == ["finished", "lstm 8x8"] and "200" in cells
    settings = page.get_by_role("region", name="What differs between the runs").get_by_role("row").all_inner_texts()
    assert [row.split() for row in settings[1:]] == [["dropout", "0.2", "0.5"], ["seed", "1111", "7"]]
    assert page.locator("blockquote").count() == 4
    assert HOSTILE in page.locator("blockquote").first.inner_text()
    for name in NAMES:
        latest = (folder / name / "latest").resolve().name.replace("-", " ")
        rows = page.get_by_role("region", name=name, exact=True).get_by_role("row").all_inner_texts()
        assert any(row.startswith(latest) and "latest" in row for row in rows)


def test_values_are_read_by_keyboard_and_pointer_and_runs_are_hidden(open_report, folder):
    page = open_report(viewport={"width": 1400, "height": 900})
    figure = page.locator("figure").filter(has=page.get_by_role("heading", name="Validation perplexity"))
    plot, reading = figure.get_by_role("group"), figure.locator("output")
    rest = reading.inner_text()
    for _ in range(60):
        page.keyboard.press("Tab")
        if plot.evaluate("element => element === document.activeElement"):
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    second = [events(folder / name, "valid")[1] for name in NAMES]
    step, values = second[0]["step"], [f"{math.exp(event['loss']):,.2f}" for event in second]
    assert reading.inner_text() == f"Step {step}: {NAMES[0]} {values[0]}, {NAMES[1]} {values[1]}"
    page.get_by_role("checkbox", name=NAMES[0]).uncheck()
    assert figure.locator('.curve[data-run="0"]').is_hidden() and figure.locator('.curve[data-run="1"]').is_visible()
    assert reading.inner_text() == rest
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 20)
    assert reading.inner_text().startswith(f"Step 200: {NAMES[1]} ")


def test_a_curve_goes_through_what_was_logged(open_report, folder):
    """The first, lowest and last point of a curve as they are drawn, against the scale's own marks."""
    page = open_report(viewport={"width": 1400, "height": 900})
    figure = page.locator("figure").filter(has=page.get_by_role("heading", name="Validation perplexity"))
    points, marks, size = figure.evaluate(
        """figure => {
          const box = figure.querySelector("svg").getBoundingClientRect();
          const path = figure.querySelector(".curve");
          const matrix = path.getScreenCTM();
          const place = (length) => path.getPointAtLength(length).matrixTransform(matrix);
          const ends = [place(0), place(path.getTotalLength())].map((p) => [p.x - box.left, box.bottom - p.y]);
          const marks = [...figure.querySelectorAll(".y.tick")].map((mark) => {
            const tick = mark.getBoundingClientRect();
            return [Number(mark.textContent.replace(",", "")), box.bottom - (tick.top + tick.bottom) / 2];
          });
          return [ends, marks, [box.width, box.height]];
        }"""
    )
    (low, low_at), (high, high_at) = marks[0], marks[-1]
    evaluated = events(folder / NAMES[0], "valid")
    for (x, y), event in zip(points, (evaluated[0], evaluated[-1])):
        height = low_at + (event["loss"] - math.log(low)) / math.log(high / low) * (high_at - low_at)
        assert (x, y) == pytest.approx((size[0] * event["step"] / 200, height), abs=1.5)  # pixels


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen_and_can_be_read(open_report, scheme):
    page = open_report(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    for details in page.locator("summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in NAMES:
        assert page.get_by_role("rowheader", name=name, exact=True).first.is_visible()
    texts = contrasts(page, "h1, h2, h3, p, a, th, td, summary, label, blockquote, output, pre, .tick, .quiet")
    assert len(texts) > 80 and [entry for entry in texts if entry[1] < 4.5] == []
    lines = contrasts(page, ".curve")
    assert len(lines) >= 10 and [entry for entry in lines if entry[1] < 3] == []
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 26)") == (scheme == "dark")


def test_without_scripts_the_curves_are_there(open_report):
    page = open_report(java_script_enabled=False)
    assert page.locator(".curve").count() >= 10 and page.locator("figure .tick").first.is_visible()


def test_the_plots_lie_beside_it(folder):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    names = "validation-perplexity training-perplexity learning-rate gradient-norm throughput memory".split()
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(f"report-{name}.png" for name in names)
    for path in folder.glob("*.png"):
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and width > height > 400
        assert content.endswith(b"IEND\xaeB`\x82")


def test_a_report_without_plots_texts_or_results(folder, tmp_path, monkeypatch, capsys):
    """Of a run that was killed before its first checkpoint, where matplotlib is missing."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = tmp_path / "young"
    shutil.copytree(folder / NAMES[0], run, symlinks=True)
    for path in (run / "checkpoints").iterdir():
        shutil.rmtree(path)
    for name in ("best", "latest", "metrics.jsonl", "status.json"):
        (run / name).unlink()
    assert report([str(run), "--words", "5"]) == 0
    assert "no plots as PNG: matplotlib is not installed; pip install 'gluon_lm[plot]'" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert "No text: " in page and "Nothing is logged yet." in page and ">stopped<" in page
    assert list(run.glob("*.png")) == []


def test_a_run_of_a_recipe_that_is_not_here_is_compared_with_the_defaults(folder, tmp_path):
    run = tmp_path / "foreign"
    shutil.copytree(folder / NAMES[0], run, symlinks=True)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("recipe: lm", "recipe: theirs", 1))
    assert report([str(run), "--words", "0"]) == 0
    page = (run / "report.html").read_text()
    assert "What differs from the defaults" in page and "recipe: theirs" in page


def test_a_folder_of_runs_is_all_of_them_and_a_link_to_one_is_not_another(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        shutil.copytree(folder / name, tmp_path / "runs" / name, symlinks=True)
    (tmp_path / "runs/latest").symlink_to(NAMES[0])
    (tmp_path / "runs/broken").mkdir()
    (tmp_path / "runs/broken/config.yaml").write_text("nhid: none\n")

    def headings(*words):
        assert report([*words, "--words", "0", "--output", "page.html"]) == 0
        return re.findall(r'<th role="rowheader" scope="row">.*?</th>', (tmp_path / "page.html").read_text())

    named = headings(*(f"runs/{name}" for name in NAMES))
    assert named == headings(*(f"runs/{name}" for name in NAMES), "runs/latest", f"runs/{NAMES[1]}/best")
    capsys.readouterr()
    assert sorted(named) == sorted(headings("runs"))
    assert "left out: " in capsys.readouterr().out
    for name in NAMES:
        shutil.rmtree(tmp_path / "runs" / name)
    assert report(["runs"]) == 2
    assert "error: runs: has no readable run; " in capsys.readouterr().err


def test_a_loss_that_has_run_away_and_a_name_without_glyphs_are_drawn(folder, tmp_path):
    run = tmp_path / "猫"
    shutil.copytree(folder / NAMES[0], run, symlinks=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["event"] in ("train", "valid") and line["step"] > 100:
            line.update(loss=705.0, perplexity=math.exp(705))
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report([str(run), "--words", "0"]) == 0
    page = (run / "report.html").read_text()
    assert "1.51e+306" in page and re.search(r"(,\d{3}){5}\.|>inf|nan", page) is None


def test_many_runs_are_told_apart():
    styles = {(colour_of(run), dashes_of(run)) for run in range(32)}
    assert len(styles) == 32
    assert all(dashes_of(run) != dashes_of(run + 1) for run in range(7))


def test_the_loss_over_a_sample_of_the_words_is_not_compared_with_the_whole(folder, tmp_path):
    shutil.copytree(folder / NAMES[0], tmp_path / "sampled")
    config = tmp_path / "sampled/config.yaml"
    config.write_text(config.read_text().replace("num_sampled: null", "num_sampled: 5"))
    runs = [RunHistory(folder / NAMES[0]), RunHistory(tmp_path / "sampled")]
    panels = {panel.title: panel for panel in panels_of(runs)}
    assert [curve.run for curve in panels["Validation perplexity"].curves] == [0, 1]
    assert [curve.run for curve in panels["Training perplexity"].curves] == [0]
    assert [curve.run for curve in panels["Training perplexity, over a sample of the words"].curves] == [1]


def test_a_checkpoint_tells_how_many_parameters_it_has(folder, tmp_path):
    with np.load(folder / NAMES[0] / "latest/parameters.npz") as arrays:
        assert RunHistory(folder / NAMES[0]).num_parameters == sum(array.size for array in arrays.values())
    shutil.copytree(folder / NAMES[0], tmp_path / "silent")
    for state in (tmp_path / "silent/checkpoints").glob("*/state.json"):
        content = json.loads(state.read_text())
        del content["num_parameters"]
        state.write_text(json.dumps(content))
    assert RunHistory(tmp_path / "silent").num_parameters is None
    output = tmp_path / "page.html"
    assert report([str(tmp_path / "silent"), "--words", "0", "--output", str(output)]) == 0


def test_texts_of_one_name_do_not_compare(folder, tmp_path):
    shutil.copytree(folder / NAMES[0], tmp_path / "other")
    for state in (tmp_path / "other/checkpoints").glob("*/state.json"):
        content = json.loads(state.read_text())
        state.write_text(json.dumps({**content, "corpus": "another text, of the same name"}))
    page = tmp_path / "page.html"
    assert report([str(folder / NAMES[0]), str(tmp_path / "other"), "--words", "0", "--output", str(page)]) == 0
    assert "are not comparable" in page.read_text()


def test_perplexities_over_different_vocabularies_or_streams_have_no_best(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    shutil.copytree(NAMES[0], tmp_path / "other")
    with open(tmp_path / "other/vocab.txt", "a") as vocabulary:
        vocabulary.write("more\n")

    def page(*runs):
        assert report([*map(str, runs), "--words", "0", "--output", str(tmp_path / "page.html")]) == 0
        return (tmp_path / "page.html").read_text()

    assert '<strong class="lead">' in (alike := page(*NAMES)) and "are not comparable" not in alike
    assert (
        '<strong class="lead">' not in (unlike := page(NAMES[0], tmp_path / "other")) and "are not comparable" in unlike
    )
    shutil.copytree(NAMES[0], tmp_path / "cut otherwise")
    config = tmp_path / "cut otherwise/config.yaml"
    config.write_text(config.read_text().replace("eval_batch_size: 10", "eval_batch_size: 1"))
    assert '<strong class="lead">' not in page(NAMES[0], config.parent)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["first", "--output", "page.txt"], "--output page.txt: must end in .html; write --output page.html"),
        (["first", "--output", "none/page.html"], "--output none/page.html: must be a file in a folder that exists"),
        (["nothing"], "nothing: there is no such run"),
        (["first", "--words", "0", "--seed", "3"], "--seed: has no effect with --words 0"),
    ],
)
def test_what_cannot_be_reported_is_refused(folder, monkeypatch, capsys, words, complaint):
    monkeypatch.chdir(folder)
    assert report(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {complaint}")
