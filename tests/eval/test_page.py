"""report.html as a text: one file, nothing outside it, nothing in a prediction can break it; charts as XML."""

from __future__ import annotations

import html.parser
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hf_attn_plugins.eval.records import Generation, Loss, Sample
from hf_attn_plugins.eval.report import command as report_command
from hf_attn_plugins.eval.report.page.page import embedded

from . import fabricated

VOID = {"meta", "link", "input", "wbr", "br"}
SECTIONS = ["overview", "scores", "trade", "depth", "position", "speed", "tables", "samples", "run"]


class Reader(html.parser.HTMLParser):
    """Checks that elements are closed in order, and keeps ids, sections, addresses and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.sections: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.sections += [found["id"]] if tag == "section" else []
        self.addresses += [found[name] for name in ("href", "src", "action", "data", "poster") if found.get(name)]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def page(folder) -> tuple[str, Reader]:
    report_command.finish(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Reader(text)


def test_a_full_run_shows_every_section_and_asks_for_nothing(tmp_path):
    text, found = page(fabricated.full(tmp_path / "run"))
    assert found.sections == SECTIONS
    assert len(set(found.ids)) == len(found.ids), "ids are unique"
    assert all(address.startswith(("#", "data:")) for address in found.addresses), found.addresses
    assert not re.findall(r"@import|url\(|https?://(?!www\.w3\.org)|fetch\(|XMLHttpRequest|import\(", text)
    assert "default-src 'none'" in text
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.name.startswith("report")) == [
        "report.html",
        "report.md",
    ]


def test_the_page_is_the_same_every_time(tmp_path):
    folder = fabricated.full(tmp_path / "run", count=3)
    assert page(folder)[0] == page(folder)[0]


def test_charts_are_drawn_inside_their_frame_with_words_for_those_who_do_not_see_them(tmp_path):
    text, _ = page(fabricated.full(tmp_path / "run"))
    plots = re.findall(r'<svg class="plot".*?</svg>', text, re.DOTALL)
    assert len(plots) == 5 + 3 + 5 + 6 + 3  # scores, trade-offs, depths, positions, speeds
    for plot in plots:
        root = ElementTree.fromstring(plot)
        width, height = map(float, root.get("viewBox").split()[2:])
        assert root.find("title").text and len(root.find("desc").text) > 30
        for mark in root.iter("path"):
            if mark.get("class") == "mark":
                x, y = map(float, re.match(r"translate\(([\d.]+) ([\d.]+)\)", mark.get("transform")).groups())
                assert 0 <= x <= width and 0 <= y <= height
        assert not re.search(r"nan|inf|None", plot)
    assert text.count("<figure>") == len(plots) == text.count("<summary>Data</summary>")


def test_texts_of_one_length_keep_charts_of_their_own(tmp_path):
    labels, samples = (
        ("sdpa", "star_attention"),
        [Sample(f"text/{name}/64/0000", name, "text", 64, 64) for name in "ab"],
    )
    found = [
        Loss(one.sample, label, None, 64.0, 64, [{"begin": 0, "end": 64, "nll_sum": 64.0, "count": 64}])
        for one in samples
        for label in labels
    ]
    text, _ = page(fabricated.write(tmp_path / "run", samples, found, labels))
    assert re.findall("<figcaption>(.*?)</figcaption>", text) == [
        "Perplexity, a, 64 tokens",
        "Perplexity, b, 64 tokens",
    ]


def test_predictions_cannot_break_out_of_the_page(tmp_path):
    sample = Sample("ruler/vt/64/0000", "<b>vt</b>", "ruler", 64, 60, None, [fabricated.HOSTILE], fabricated.HOSTILE)
    answers = [
        Generation(sample.sample, label, prediction=fabricated.HOSTILE, score=1.0) for label in ("sdpa", "<i>star")
    ]
    failed = Generation(sample.sample, "star:{{data}}", error=f"ValueError: {fabricated.HOSTILE}")
    folder = fabricated.write(tmp_path / "run", [sample], [*answers, failed], ["sdpa", "<i>star", "star:{{data}}"])
    text, found = page(folder)
    assert len(found.scripts) == 2
    data = json.loads(found.scripts[0])
    assert data["samples"][0]["prompt"] == fabricated.HOSTILE
    assert data["samples"][0]["answers"][0][1] == fabricated.HOSTILE
    assert "<b>vt" not in text and "<i>star" not in text and "star:{{data}}" in text


def test_embedded_json_round_trips_and_holds_no_markup():
    value = {"text": fabricated.HOSTILE, "number": 1.5, "none": None}
    text = embedded(value)
    assert json.loads(text) == value and "<" not in text and "\u2028" not in text


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (dict(tasks=["vt"], lengths=[1024], speed=False, agreement=False), {"depth", "position"}),
        (dict(tasks=["niah_single_1"], lengths=[1024], count=1), set()),
        (dict(tasks=[], lengths=[1024]), {"scores", "trade", "depth", "samples"}),
        (dict(tasks=[], lengths=[1024], agreement=False), {"scores", "trade", "depth", "position", "samples"}),
        (dict(labels=["sdpa"], count=2), set()),
    ],
    ids=["one task", "one sample", "no answers", "speed only", "baseline only"],
)
def test_a_run_shows_what_it_has(tmp_path, options, missing):
    _, found = page(fabricated.full(tmp_path / "run", **options))
    assert [name for name in SECTIONS if name not in missing] == found.sections


def test_a_run_of_errors_only_says_so(tmp_path):
    sample = Sample("ruler/vt/64/0000", "vt", "ruler", 64, 60)
    failed = [Generation(sample.sample, label, error="RuntimeError: no memory") for label in ("sdpa", "star")]
    text, found = page(fabricated.write(tmp_path / "run", [sample], failed, ["sdpa", "star"]))
    assert found.sections == ["overview", "tables", "errors", "samples", "run"]
    assert "ruler/vt/64/0000, star: RuntimeError: no memory" in text and "failed in 1 sample" in text
    assert "RuntimeError: no memory" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_what_ran_is_a_list_and_no_column(tmp_path):
    sample = Sample("ruler/vt/64/0000", "vt", "ruler", 64, 60)
    plans = {"sdpa": None, "star": "star: blocks 7, block_size 8, anchor_size 4"}
    answers = [Generation(sample.sample, label, prediction="a", score=1.0, plan=plan) for label, plan in plans.items()]
    text, _ = page(fabricated.write(tmp_path / "run", [sample], answers, list(plans)))
    (listed,) = re.findall(r'<dl class="facts ran">(.*?)</dl>', text, re.DOTALL)
    assert listed.count("<dt>") == 1 and "block_size 8, anchor_size 4" in listed
    assert 'data-head="what ran"' not in text
    markdown = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "What ran:\n\n- star: star: blocks 7, block_size 8, anchor_size 4\n" in markdown


def test_no_axis_has_a_score_above_all():
    from hf_attn_plugins.eval.report.charts.speed_sections import _trade_axes

    for means in ((1.0, 1.0), (0.0, 0.0), (0.5, 0.5), (0.97, 1.0)):
        _, score = _trade_axes([{"mean": mean, "low": None, "high": None, "n": 1} for mean in means], [1.2])
        assert 0 <= score.low < score.high <= 100 and score.low <= 100 * means[0] <= score.high


def test_the_verdicts_stand_before_everything_else(tmp_path):
    text, _ = page(fabricated.full(tmp_path / "run", count=3))
    body = text[text.index("<main>") :]
    assert body.index('class="verdicts"') < body.index("<nav") < body.index('id="overview"')
    first = re.search(r'<span class="verdict">(.*?)</span>', text)[1]
    assert first.startswith("same predictions, ") and first.endswith(": safe to switch.")


def test_panels_that_are_read_together_share_their_scales(tmp_path):
    text, _ = page(fabricated.full(tmp_path / "run"))
    for section in ("trade", "position", "speed", "scores"):
        part = text[text.index(f'<section id="{section}"') :].split("</section>")[0]
        scales: dict[str, set[tuple[str, ...]]] = {}
        for plot in re.findall(r'<svg class="plot".*?</svg>', part, re.DOTALL):
            (unit, *_) = re.findall(r'<text class="name"[^>]*>(.*?)</text>', plot)
            scales.setdefault(unit, set()).add(tuple(re.findall(r'<text class="tick end"[^>]*>(.*?)</text>', plot)))
        assert scales and all(len(found) == 1 for found in scales.values()), (section, scales)


def test_a_colour_means_an_attention_and_nothing_else():
    style = (report_command.page.HERE / "page.css").read_text(encoding="utf-8")
    named = dict(re.findall(r"(--c\d): (#[0-9a-f]{6})", style.split("@media")[0]))
    others = re.findall(r"(--(?!c\d)[a-z-]+): (#[0-9a-f]{6})", style)
    assert len(named) == 7 and not set(named.values()) & {value for _, value in others}
    greys = [value for _, value in others if max(channels(value)) - min(channels(value)) > 24]
    assert greys == [], "everything that is no attention is ink on paper"


def channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def test_blocks_are_drawn_where_they_begin(tmp_path):
    folder = fabricated.full(tmp_path / "run", tasks=["vt"], lengths=[2048], count=1)
    plan = "star: blocks 4, block_size 512, anchor_size 128, query_size 64; 60% of the causal pairs"
    lines = []
    for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "agreement" and record["attn"].startswith("star_attention:block_size=512"):
            record["plan"] = plan
        lines.append(json.dumps(record))
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text, _ = page(folder)
    assert text.count('<path class="edge c3"') == 3 and "Blocks begin at 512, 1,024, 1,536." in text
    assert "the first tokens of a block" in text
    assert 'class="edge' not in page(fabricated.full(tmp_path / "other", count=1))[0].split("<main>")[1]


def test_few_samples_are_counts_in_every_chart(tmp_path):
    text, _ = page(fabricated.full(tmp_path / "run", count=2, tasks=["niah_single_1"], lengths=[1024]))
    scores = text[text.index('<section id="scores"') :].split("</section>")[0]
    assert 'class="bar"' not in scores and re.search(r"\((0|1|2) of 2\)", scores)
    depth = text[text.index('<section id="depth"') :].split("</section>")[0]
    assert re.search(r">[01]/1<", depth)
