"""report.html in a real headless Chromium: it renders, its filters work, it asks for nothing and nothing overflows."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
from hf_attn_plugins.eval.records import Generation, RunFolder
from hf_attn_plugins.eval.report import command as report_command

from . import fabricated

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no headless browser: install the Debian packages chromium and chromium-driver",
)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
STAR = fabricated.ATTENTIONS[3]


class Page:
    """One tab: opens a file in a colour scheme at a width, and keeps what it asked for and what it complained of."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, path: Path, *, width: int = 1280, scheme: str = "light", media: str = "screen") -> Page:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.log()
        self.driver.get(path.as_uri())
        return self

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def set(self, name: str, value: object) -> None:
        """Give a filter a value as its user would: the value, then the event."""
        self.run(
            "const box = document.querySelector(`.filters [name=${arguments[0]}]`);"
            "if (box.type === 'checkbox') box.checked = arguments[1]; else box.value = arguments[1];"
            "box.dispatchEvent(new Event('input', {bubbles: true}))",
            name,
            value,
        )

    def log(self) -> tuple[list[str], list[str]]:
        """(addresses asked for, errors on the console) since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        # Chromium's own start page asks for things too, until the first file is opened.
        asked = [one["request"]["url"] for one in sent if not one["documentURL"].startswith("chrome")]
        return asked, [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.add_experimental_option("perfLoggingPrefs", {"enableNetwork": True, "enablePage": False})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


def report(folder: Path) -> Path:
    report_command.finish(folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fabricated.full(tmp_path_factory.mktemp("runs") / "full", lengths=[1024, 2048], count=6)


@pytest.fixture(scope="module")
def path(run):
    return report(run)


@pytest.fixture
def page(browser, path):
    return Page(browser).open(path)


def test_it_renders_and_nothing_leaves_it(browser, path):
    page = Page(browser)
    for scheme in ("light", "dark"):
        page.open(path, scheme=scheme)
        assert page.texts("h1") == ["full"] and len(page.texts("section > h2")) == 9
        sizes = "return [...document.querySelectorAll('.plot')].map((e) => [e.clientWidth, e.clientHeight])"
        assert all(200 < width < 570 and 100 < height < 400 for width, height in page.run(sizes))
        page.set("text", "magic")
        asked, errors = page.log()
        assert asked and all(url == path.as_uri() or url.startswith("data:") for url in asked), asked
        assert errors == []


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (768, "light"), (1280, "light")])
def test_nothing_overflows(browser, path, width, scheme):
    page = Page(browser).open(path, width=width, scheme=scheme)
    page.run("for (const part of document.querySelectorAll('details')) part.open = true")
    assert page.run("return document.documentElement.scrollWidth") <= width
    outside = """return [...document.querySelectorAll('main *, header *')]
        .filter((e) => !e.closest('.wide, pre') && e.getBoundingClientRect().right > arguments[0] + 1)
        .map((e) => e.outerHTML.slice(0, 80))"""
    assert page.run(outside, width) == []


CONTRAST = """
const light = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = light(getComputedStyle(document.body).backgroundColor);
return Object.fromEntries(arguments[0].map(([selector, property]) => {
  const ink = light(getComputedStyle(document.querySelector(selector))[property]);
  return [selector, (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)];
}));
"""


def test_the_headline_is_seen_whole(browser, tmp_path):
    """At 1280 no column is cut, and on a phone no cell is a tower of words, however many plans ran."""
    from hf_attn_plugins.eval.records import Sample

    plans = [f"star: blocks {n}, block_size 128, anchor_size 64, query_size 128, halo_size 384" for n in (7, 15, 31)]
    samples = [Sample(f"ruler/vt/64/{n:04}", "vt", "ruler", 64, 60, None, ["a"], "a") for n in range(3)]
    answers = [
        Generation(one.sample, label, prediction="a", score=1.0, plan=plan if label != "sdpa" else None)
        for one, plan in zip(samples, plans, strict=True)
        for label in ("sdpa", "tiled_attention", STAR)
    ]
    folder = fabricated.write(tmp_path / "run", samples, answers, ["sdpa", "tiled_attention", STAR])
    page = Page(browser).open(report(folder))
    assert len(page.texts(".ran dd > div")) == 6
    assert page.run("const box = document.querySelector('.wide'); return box.scrollWidth <= box.clientWidth")
    page.open(folder / "report.html", width=390)
    heights = "return [...document.querySelectorAll('.turned tr')].map((row) => row.getBoundingClientRect().height)"
    assert max(page.run(heights)) < 120


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out(browser, path, scheme):
    page = Page(browser).open(path, scheme=scheme)
    paper = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    words = [
        (name, "color") for name in ("h1", "p.note", "nav a", "thead th", "tbody td", ".badge.exact", "figcaption")
    ]
    for name, contrast in page.run(CONTRAST, [*words, (".plot text.tick", "fill")]).items():
        assert contrast >= 4.5, f"{name} has contrast {contrast:.1f} in {scheme}"
    lines = [(f".plot .c{number} .line", "stroke") for number in range(5)]
    for name, contrast in page.run(CONTRAST, lines).items():
        assert contrast >= 3, f"{name} has contrast {contrast:.1f} in {scheme}"


def test_series_differ_in_marker_as_well_as_in_colour(page):
    swatches = "[...document.querySelectorAll('#scores .legend li svg')]"
    shapes = page.run(f"return {swatches}.map((e) => e.lastElementChild.getAttribute('d'))")
    assert len(shapes) == len(set(shapes)) == len(fabricated.ATTENTIONS)


def test_print_is_light_and_without_controls(browser, path):
    page = Page(browser).open(path, scheme="dark", media="print")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("return document.querySelector('.filters').offsetParent") is None
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")


def test_a_print_of_at_most_five_pages_has_its_tables_open(browser, tmp_path):
    whole = report(fabricated.full(tmp_path / "whole"))  # 22 charts, 105 rows
    page = Page(browser).open(whole, media="print")
    page.run(
        "addEventListener('beforeprint', () => (window.open_ = document.querySelectorAll('.folded[open]').length))"
    )
    page.run("addEventListener('afterprint', () => (window.after = document.querySelectorAll('.folded[open]').length))")
    for width, height in ((8.5, 11), (8.27, 11.69)):
        options = {"printBackground": True, "paperWidth": width, "paperHeight": height}
        pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", options)["data"])
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 5
    assert page.run("return [window.open_, window.after]") == [4, 0]


def test_the_verdicts_come_first(page):
    verdicts = page.texts(".verdicts .verdict")
    assert len(verdicts) == len(fabricated.ATTENTIONS) - 1
    assert verdicts[0].startswith("same predictions, ") and verdicts[0].endswith(": safe to switch.")
    assert verdicts[2].startswith("perplexity +") and "not at these lengths" in verdicts[2]
    place = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
    assert page.run(place, ".verdicts") < page.run(place, "nav") < page.run(place, "#overview")


def test_a_phone_compares_attentions_side_by_side(browser, path):
    page = Page(browser).open(path, width=390)
    shown = "return [...document.querySelectorAll(arguments[0])].map((e) => e.offsetParent !== null)"
    assert page.run(shown, ".turned") == [True] and page.run(shown, ".headline") == [False]
    heads = page.texts(".turned thead th")
    assert heads[:4] == ["", "sdpa", "tiled", "cqs"]
    cells = """return [...document.querySelectorAll('.turned tbody tr')]
        .map((row) => [...row.children].map((cell) => cell.textContent))"""
    rows = {found[0]: found for found in page.run(cells)}
    assert rows["score, %"][1] != "" and all(len(found) == len(heads) for found in rows.values())
    top = "return document.querySelector('.turned tbody tr:nth-child(2) td:nth-child(%d)').getBoundingClientRect().top"
    assert page.run(top % 2) == page.run(top % 3), "one measure of two attentions stands on one line"
    page.open(path, width=1280)
    assert page.run(shown, ".turned") == [False] and page.run(shown, ".headline") == [True]


def test_two_or_four_charts_stand_in_two_columns(browser, tmp_path):
    folder = fabricated.full(tmp_path / "four", tasks=["vt"], lengths=[1024, 2048], count=3)
    page = Page(browser).open(report(folder))
    tops = """return [...document.querySelectorAll('.charts')].map((group) => [group.children.length,
        new Set([...group.children].map((e) => Math.round(e.getBoundingClientRect().left))).size])"""
    for charts, columns in page.run(tops):
        assert columns == {1: 1, 2: 2, 4: 2}.get(charts, min(3, charts)), (charts, columns)


def test_no_line_of_a_prompt_is_cut_in_half(page):
    box = "const box = document.querySelector('article .prompt'); return [box.clientHeight, box.scrollTop, 20]"
    height, top, line = page.run(box)
    assert top > 0 and height % line == 0 and top % line == 0


def generations(run: Path) -> dict[str, dict[str, Generation]]:
    found: dict[str, dict[str, Generation]] = {}
    for one in RunFolder(run).predictions().values():
        if isinstance(one, Generation):
            found.setdefault(one.sample, {})[one.attn] = one
    return found


def total(page: Page) -> int:
    text = page.texts("#samples .found")[0]
    return 0 if text.startswith("No sample") else int(text.split(" of ")[1].split(" ")[0].replace(",", ""))


def test_filters_agree_with_the_predictions(page, run):
    answers = generations(run)
    assert total(page) == len(answers) == 48
    page.set("task", "vt")
    page.set("length", "2048")
    assert total(page) == 6 and set(page.texts("article .task")) == {"vt"}
    assert {text.split(" ")[0] for text in page.texts("article .place")} == {"2,048"}
    page.run("document.querySelector('.filters [type=reset]').click()")
    page.run("return new Promise((done) => setTimeout(done))")
    page.set("differs", True)
    apart = lambda one, base: one.token_ids != base.token_ids  # noqa: E731
    assert total(page) == sum(any(apart(one, a["sdpa"]) for one in a.values()) for a in answers.values()) > 0
    page.set("attention", str(fabricated.ATTENTIONS.index(STAR)))
    assert total(page) == sum(apart(a[STAR], a["sdpa"]) for a in answers.values()) > 0
    assert set(page.texts("article .name")) == {"sdpa", "star block 512"} and len(page.texts("article .apart")) > 0
    page.set("differs", False)
    page.set("outcome", "worse")
    assert total(page) == sum(a[STAR].score < a["sdpa"].score for a in answers.values())
    page.set("attention", "1")
    assert total(page) == 0 and page.texts("#samples .found")[0] == "No sample fits these filters."


def test_search_finds_one_reference_and_marks_it(page, run):
    sample = RunFolder(run).samples()["ruler/niah_single_1/1024/0003"]
    page.set("text", f"  {sample.references[0].upper()} ")
    assert total(page) == 1 and page.texts("article .references li") == sample.references
    assert set(page.texts("article .answer:first-child mark")) <= set(sample.references)
    assert page.texts("article .prompt")[0].endswith(sample.prompt_tail)


def test_the_keyboard_is_enough(page, browser):
    from selenium.webdriver.common.keys import Keys

    page.run("document.querySelector('.filters').scrollIntoView(); document.querySelector('.filters input').focus()")
    for keys in ("magic", Keys.ENTER):
        browser.switch_to.active_element.send_keys(keys)
    assert total(page) == 48, "Enter does not leave the page"
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert page.run("return document.activeElement.name") == "task"
    browser.switch_to.active_element.send_keys("v")  # the only task that begins so
    assert total(page) == 12 and set(page.texts("article .task")) == {"vt"}
    page.run("document.querySelector('figure summary').focus()")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert page.run("return document.querySelector('figure details').open")


def test_two_thousand_samples_are_leafed_through(browser, tmp_path):
    labels = ("sdpa", "tiled_attention")
    folder = fabricated.full(
        tmp_path / "many", tasks=["vt", "cwe"], lengths=[1024], count=1000, labels=labels, speed=False, agreement=False
    )
    page = Page(browser).open(report(folder))
    assert total(page) == 2000 and len(page.texts("article")) == 20
    assert page.run("return document.querySelectorAll('*').length") < 3000
    previous, following = (f"document.querySelector('.pager [data-step=\"{step}\"]')" for step in (-1, 1))
    assert page.run(f"return {previous}.disabled && !{following}.disabled")
    page.run(f"{following}.click()")
    assert page.texts("#samples .found")[0] == "21 – 40 of 2,000"
    page.set("text", "wandering-12")  # 12 and 120 - 129, of two tasks
    assert page.texts("#samples .found")[0] == "1 – 20 of 22 (1,978 hidden)"
    page.run(f"{following}.click()")
    assert page.texts("#samples .found")[0] == "21 – 22 of 22 (1,978 hidden)" and page.run(
        f"return {following}.disabled"
    )


def test_predictions_stay_text(browser, tmp_path):
    from hf_attn_plugins.eval.records import Sample

    sample = Sample("ruler/vt/64/0000", "<b>vt</b>", "ruler", 64, 60, None, [fabricated.HOSTILE], fabricated.HOSTILE)
    answer = Generation(sample.sample, "sdpa", prediction=fabricated.HOSTILE, score=1.0)
    failed = Generation(sample.sample, "star", error=f"ValueError: {fabricated.HOSTILE}")
    page = Page(browser).open(report(fabricated.write(tmp_path / "run", [sample], [answer, failed], ["sdpa", "star"])))
    assert browser.title == "run" and page.log()[1] == []
    assert page.texts("article .answer p") == [fabricated.HOSTILE, f"ValueError: {fabricated.HOSTILE}"]
    assert page.texts("article .task") == ["<b>vt</b>"]


def test_the_page_of_look_fits_and_asks_for_nothing(browser, tmp_path):
    """`hf-attn look` shares the report's style: wide, on a phone, dark, printed."""
    import torch

    from hf_attn_plugins.commands import look_page
    from hf_attn_plugins.hf.look.by_token import Changes
    from hf_attn_plugins.hf.look.reach import WINDOWS, HeadReach
    from hf_attn_plugins.star.plan import Plan

    heads = [HeadReach(i, j, (0.5,) * len(WINDOWS), 0.2, 0.1 * j, not j) for i in range(30) for j in range(8)]
    first = torch.arange(400)
    found = Changes(torch.rand(400, dtype=torch.float64), first, first * (first % 9 > 0), "star: blocks 4", 0.5)
    path = tmp_path / "look.html"
    text = look_page.page(
        {"model": "tiny", "tokens": "400"}, [" word"] * 400, heads, Plan(400, 64, 16, 10, 32), {"star": found}, {}
    )
    path.write_text(text, encoding="utf-8")
    page = Page(browser)
    for width, scheme, media in (
        (1280, "light", "screen"),
        (390, "light", "screen"),
        (1280, "dark", "screen"),
        (800, "light", "print"),
    ):
        page.open(path, width=width, scheme=scheme, media=media)
        assert page.texts("section > h2") == ["In short", "Where heads look", "Where predictions change"]
        assert page.run("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.run("return document.querySelectorAll('.grids td').length") == 240 * len(
            page.texts(".grids figcaption")
        )
        asked, complaints = page.log()
        assert asked == [path.as_uri()] and not complaints
