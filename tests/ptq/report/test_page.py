"""The page of a sweep, in a real browser where there is one: no errors, figures drawn, sorting works, names are only names."""

import csv
import dataclasses
import html
import json
import os
import pathlib
import re
import shutil
import subprocess
import time

import pytest

from ptq.report.page.build import build_page
from ptq.report.page.content import PageInput, PointOfPage, SearchOfPage, gather

CHROMIUM = os.environ.get("PTQ_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium, then make test-page")
EVIL = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">'\"&{{ 7 * 7 }}<b>$x_{</b>"


def run_folder(folder: pathlib.Path, number: int, linears: int = 8) -> pathlib.Path:
    """What a finished run leaves, as far as the page reads it."""
    folder.mkdir(parents=True)
    metrics = {
        "model": EVIL, "evaluation_source": "docs/test", "baseline_perplexity": 6.0, "windows": 8, "tokens": 800, "confidence": 0.95,
        "identity": f"{number:064x}", "weight_fingerprint": "ab" * 32, "evaluation_fingerprint": "cd" * 32,
        "token_statistics": {"kl": {"median": 0.001 * number, "p90": 0.01, "p95": 0.02, "p99": 0.05, "p99_9": 0.2, "max": 1.5}},
        "seconds": {"load": 0.5, "quantize": 1.0 + number, EVIL: 0.1},
        "size": {"before_bytes": 2_000_000, "after_bytes": 600_000 + number, "parameters": 1_000_000},
        "made": {"date": "2026-11-26T08:00:00+00:00", "command": "python main.py", "threads": 2},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "environment.json").write_text(
        json.dumps({"ptq": "0.1.0", "packages": {"torch": "2.0"}, "git": {"commit": "f" * 40}})
    )
    with (folder / "layers.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "output_error"])
        writer.writerows(
            [f"model.layers.{i // 4}.{EVIL if i % 4 == 3 else f'proj{i % 4}'}", 0.01 * (i + number)]
            for i in range(linears)
        )
        writer.writerow(["model.layers.0.unreached", ""])
    ranges = {"low": [-1.0] * 16, "high": [2.0] * 16}
    links = [{"name": EVIL, "step": 1, "before": ranges, "after": ranges}]
    (folder / "channels.json").write_text(json.dumps({"links": links}))
    return folder


def page_of(tmp_path: pathlib.Path, count: int = 6, linears: int = 8, **changes) -> PageInput:
    """A sweep of `count` points: the last one failed."""
    points = []
    for n in range(1, count + 1):
        options = {
            "steps.smooth.alpha": str(round(0.1 + 0.8 * (n * 7 % 10) / 10, 2)),
            "data.name": EVIL if n % 2 else "plain",
        }
        done = n < count
        figures = {
            "quantized_perplexity": 6 + (n * 5 % 7) / 10, "difference": (n * 5 % 7) / 10, "difference_low": (n * 5 % 7) / 10 - 0.1,
            "difference_high": (n * 5 % 7) / 10 + 0.1, "kl_mean": 0.01 * n, "kl_p99": 0.1, "top1_agreement": 0.9, "bits_per_weight": 4.2,
            "bytes": 600_000.0 + n, "model_bits": 4.8 + n / 10, "seconds": 3.0,
        }  # fmt: skip
        folder = run_folder(tmp_path / str(n), n, linears) if done else ""
        values = {
            "point": n,
            "status": "done" if done else "failed",
            **options,
            "folder": str(folder),
            "line": "" if done else EVIL,
        }
        points.append(
            PointOfPage({**values, **(figures if done else dict.fromkeys(figures))}, options, f"python main.py {EVIL}")
        )
    return PageInput(
        EVIL, str(tmp_path), f"python main.py -m {EVIL}", ["steps.smooth.alpha", "data.name"], points, **changes
    )


DRIVER = """<script>
addEventListener("DOMContentLoaded", async () => {
  const root = document.documentElement, said = {}, wait = (ms) => new Promise((done) => setTimeout(done, ms));
  const order = () => [...document.querySelectorAll("tr[data-point]")].map((row) => Number(row.dataset.point));
  while (!root.dataset.ready) await wait(50);
  said.width = innerWidth;
  said.beyond = root.scrollWidth - root.clientWidth;
  const heading = document.querySelector('[data-name="kl_mean"] button');
  heading.click(); said.up = order();
  heading.click(); said.down = order();
  const filter = document.getElementById("filter");
  filter.value = "plain"; filter.dispatchEvent(new Event("input")); said.filtered = order();
  document.querySelector('tr[data-point="4"] button').click();
  said.details = document.querySelector(".detail").textContent;
  said.focus = document.activeElement.closest("tr").dataset.point;
  said.reachable = [...document.querySelectorAll("button, input, select")].filter((node) => !node.closest(".plot")).every((node) => node.tabIndex === 0);
  said.hover = {};
  for (const [name, curve] of [["perplexity", 1], ["option-0", 1], ["errors", 0], ["percentiles", 0], ["bytes", 0], ["seconds", 0]]) {
    const plot = document.querySelector(`[data-figure="${name}"]`);
    Plotly.Fx.hover(plot, name === "errors" ? { xval: 0, yval: 0 } : [{ curveNumber: curve, pointNumber: 0 }]);
    await wait(100);
    said.hover[name] = plot.querySelector(".hoverlayer").textContent;
  }
  const before = root.dataset.theme;
  document.getElementById("theme").click(); said.themes = [before, root.dataset.theme].sort();
  said.address = location.hash;
  root.dataset.said = JSON.stringify(said);
});
</script></body>"""
"""Uses the page as somebody at it would, and leaves what it has seen in the page."""


def used(path: pathlib.Path, page: PageInput, width: int) -> tuple[dict, list[str]]:
    """What `DRIVER` says of the page in a window of so many pixels, and what the console said."""
    path.write_text(build_page(page).replace("</body>", DRIVER))
    dom, console = shown(path, width=width)
    return json.loads(html.unescape(re.search(r'data-said="([^"]*)"', dom)[1])), console


def shown(path: pathlib.Path, fragment: str = "", width: int = 1200) -> tuple[str, list[str]]:
    """Opens a page in headless Chromium without a network. Returns its elements after the scripts have run, and what the console said."""
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--proxy-server=127.0.0.1:9",
        f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom", f"file://{path}{fragment}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return re.sub(r"<script.*?</script>", "", done.stdout, flags=re.S), console


def order(dom: str) -> list[int]:
    return [int(n) for n in re.findall(r'<tr data-point="(\d+)"', dom)]


@browser
def test_the_page_draws_every_figure_and_says_nothing_in_the_console(tmp_path):
    path = tmp_path / "page.html"
    page = page_of(tmp_path)
    searched = SearchOfPage(f"5 points {EVIL}", ["quantized_perplexity", "model_bits"], page.points[:2])
    path.write_text(build_page(dataclasses.replace(page, search=searched)))
    dom, console = shown(path)
    assert console == []
    front = re.search(r'<table id="best">(.*?)</table>', dom, re.S)[1]
    assert front.count("<tr>") == 3 and "4.9" in front and html.escape(EVIL, quote=False) in front
    assert 'data-ready="1"' in dom
    figures = re.findall(r'data-figure="([^"]+)"', dom)
    assert set(figures) == {
        "perplexity", "kl", "option-0", "option-1", "errors", "percentiles", "ranges", "bytes", "seconds",
    }  # fmt: skip
    assert dom.count("main-svg") >= 2 * len(figures)
    assert 'class="none"' not in dom
    perplexities = {n: 6 + (n * 5 % 7) / 10 for n in range(1, 6)}
    assert order(dom) == [*sorted(perplexities, key=lambda n: (perplexities[n], n)), 6]
    # Names are shown as they are, and have done nothing.
    title = re.search(r"<title>(.*?)</title>", dom, re.S)[1]
    assert html.unescape(title).startswith(EVIL)
    assert "49" not in re.search(r"<h1>(.*?)</h1>", dom, re.S)[1]
    assert not re.search(r"<img[^>]+src=\"?x", dom)


@browser
def test_the_table_sorts_filters_and_remembers_it_in_the_address(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(build_page(page_of(tmp_path)))
    dom, console = shown(path, "#sort=-kl_mean&filter=plain&theme=dark")
    assert console == []
    assert order(dom) == [4, 2, 6]
    assert re.search(r'data-name="kl_mean" aria-sort="descending"', dom)
    assert 'data-theme="dark"' in dom
    assert "3 of 6 points" in dom


@browser
def test_headings_filter_rows_theme_and_figures_answer_to_whoever_uses_them(tmp_path):
    said, console = used(tmp_path / "page.html", page_of(tmp_path), 1200)
    assert console == []
    assert (said["up"], said["down"], said["filtered"]) == ([1, 2, 3, 4, 5, 6], [5, 4, 3, 2, 1, 6], [4, 2, 6])
    assert EVIL in said["details"] and f"{4:064x}" in said["details"] and "torch 2.0" in said["details"]
    assert said["focus"] == "4" and said["reachable"]
    assert "perplexity 6.5" in said["hover"]["perplexity"] and "difference" in said["hover"]["option-0"]
    assert "error 0.03" in said["hover"]["errors"] and "of tokens below" in said["hover"]["percentiles"]
    assert "MB" in said["hover"]["bytes"] and " s" in said["hover"]["seconds"]
    assert said["themes"] == ["dark", "light"]
    assert all(word in said["address"] for word in ("sort=-kl_mean", "filter=plain", "theme="))


@browser
def test_a_narrow_window_scrolls_within_the_table_and_not_the_page(tmp_path):
    said, console = used(tmp_path / "page.html", page_of(tmp_path), 500)
    assert console == []
    assert said["width"] <= 560 and said["beyond"] <= 0


@browser
def test_a_sweep_without_a_finished_point_has_a_page_too(tmp_path):
    point = PointOfPage({"point": 1, "status": "waiting", "line": "", "folder": ""}, {"a": "1"}, "")
    path = tmp_path / "page.html"
    path.write_text(build_page(PageInput("x", "x", "x", ["a"], [point], refresh=3600)))
    dom, console = shown(path)
    assert console == []
    assert order(dom) == [1] and "No point is done yet." in dom
    assert '<meta http-equiv="refresh" content="3600">' in dom


def test_two_hundred_points_make_a_page_of_less_than_ten_megabytes_in_less_than_fifteen_seconds(tmp_path):
    page = page_of(tmp_path, count=200, linears=210)
    begun = time.monotonic()
    text = build_page(page)
    assert time.monotonic() - begun < 15
    assert len(text.encode()) < 10e6


def test_nothing_that_a_name_holds_ends_the_data_or_asks_the_network(tmp_path):
    text = build_page(page_of(tmp_path))
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert json.loads(data)["points"][0]["options"]["data.name"] == EVIL
    assert "<" not in data and EVIL not in text.replace(data, "")
    ours = text.replace(re.search(r"<script>(/\*\*.*?)</script>", text, re.S)[1], "") if "/**" in text else text
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", ours)


def test_a_run_whose_files_are_gone_leaves_gaps(tmp_path):
    page = page_of(tmp_path)
    shutil.rmtree(tmp_path / "1")
    (tmp_path / "2" / "metrics.json").write_text("{")
    (tmp_path / "3" / "layers.csv").write_text("other\n1\n")
    (tmp_path / "4" / "channels.json").write_text(
        '{"links": [{"name": "x", "step": 1, "before": {"low": [NaN], "high": [Infinity]}}]}'
    )
    (tmp_path / "5" / "layers.csv").write_text("name,output_error\nmodel.layers.0.q,inf\n")
    data = re.search(r'id="data">(.*?)</script>', build_page(page), re.S)[1]
    assert json.loads(data)["points"][4]["errors"] == [[0, "q", None]]
    points = gather(page)["points"]
    assert (points[0]["metrics"], points[0]["errors"], points[1]["metrics"], points[2]["errors"]) == ({}, [], {}, [])
    assert len(points[3]["errors"]) == 8
