import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tercet.report import write_report

HOSTILE = (
    '</pre></script><script>document.title="owned"</script>'
    "<img src=x onerror='document.title=\"owned\"'>{{ 7*7 }}\u202e\ud800\x00雨"
)
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Tags in order, and whether every one that opens is closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(1 for name, _ in self.tags if name == tag)


def written(folder: Path) -> tuple[str, Page]:
    path = write_report(folder)
    assert path == folder / "report.html" and not list(folder.glob(".report*"))
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_a_full_run(new_run) -> None:
    html, page = written(new_run("toy", steps=3000, iterations=2000, count=500))
    assert len(html.encode()) < 3_000_000
    assert page.count("h1") == 1 and page.count("article") == 60 and page.count("script") == 0
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert all(link and link[1:] in ids for link in links)
    for title in ("Loss", "Accuracy", "Score", "KL", "Entropy", "Length", "Ended by EOS", "Clip fraction", "Explained variance"):
        assert f"<b>{title}</b>" in html
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img")
    assert (
        html.index("Healthy: PPO wins 84.6")
        < html.index("SFT against PPO")
        < html.index("Learning curves")
        < html.index("Samples</h2>")
    )
    assert "tercet run toy/config.yaml --set output=toy-again" in html and "coef: 0.05" in html and "versions.torch" in html


def test_nothing_is_loaded_from_anywhere(new_run) -> None:
    html, page = written(new_run())
    assert "default-src 'none'" in html.replace("&#39;", "'")
    assert page.count("link") == 0 and page.count("img") == 0 and "@import" not in html and not re.search(r"url\((?!#)", html)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)


PARTS = [
    "config.yaml",
    "summary.json",
    "sft",
    "reward",
    "ppo",
    "evaluation",
    "sft/metrics.jsonl",
    "ppo/timings.jsonl",
    "evaluation/samples.jsonl",
    "evaluation/policies.json",
    "evaluation/wins.json",
]


@pytest.mark.parametrize("part", PARTS)
def test_each_part_may_be_missing(new_run, part) -> None:
    folder = new_run(steps=12, iterations=6, count=5)
    target = folder / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    html, _ = written(folder)
    assert "Healthy" in html


def test_an_empty_folder(tmp_path: Path) -> None:
    html, page = written(tmp_path)
    assert "Nothing has run yet" in html and page.count("figure") == 0


def test_values_of_the_wrong_kind_do_not_stop_the_page(new_run) -> None:
    folder = new_run(steps=12, iterations=6, count=5)
    (folder / "summary.json").write_text(
        '{"ppo.kl": "many", "win_rate": null, "seconds": NaN, "seed": [1], "gold.ppo[x]": Infinity}'
    )
    (folder / "evaluation/wins.json").write_text('{"judge": 3, "other": {"win_rate": "x"}, "third": {"win_rate": 7, "low": -1}}')
    (folder / "evaluation/policies.json").write_text('{"ppo": {"kl": [], "length": 1e300}, "3rd": {"score": 1}, "sft": null}')
    (folder / "evaluation/samples.jsonl").write_text(
        '{"ppo": 3, "ppo_score": "x"}\n{}\n{"prompt": [{"role": 1, "content": null}]}\n'
    )
    (folder / "ppo/metrics.jsonl").write_text('{"iteration": "a", "score": NaN}\n{"score": 1, "kl": -Infinity, "gold": true}\n')
    written(folder)


def test_one_point_and_broken_values(new_run) -> None:
    folder = new_run(steps=1, iterations=1, count=1)
    html, page = written(folder)
    assert page.count("figure") > 5
    with (folder / "ppo/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "policy_loss": NaN, "kl": 3.0}\n{"iteration": 3, "po')
    html, _ = written(folder)
    assert "PPO produced values that are not numbers" in html and "1 line of ppo/metrics.jsonl could not be read" in html


def hostile(folder: Path) -> Path:
    """The same hostile text wherever a run folder has text."""
    keys = ("prompt", "group", "base", "sft", "ppo")
    rows = [{key: HOSTILE for key in keys} | {"sft_score": 0.0, "ppo_score": float(i)} for i in range(3)]
    (folder / "evaluation/samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"device": HOSTILE, HOSTILE: HOSTILE, f"win_rate[{HOSTILE}]": 0.5, f"gold.{HOSTILE}[x]": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "evaluation/policies.json").write_text(json.dumps({HOSTILE: {"score": 1.0}, "ppo": {"score": 2.0}}))
    (folder / "evaluation/wins.json").write_text(json.dumps({HOSTILE: {"win_rate": 0.2, "low": 0.1, "high": 0.3, "n": 9}}))
    (folder / "config.yaml").write_text(HOSTILE.replace("\ud800", ""), encoding="utf-8")
    return folder


def test_hostile_text_is_shown_and_not_run(new_run) -> None:
    html, page = written(hostile(new_run("<b>run&amp;", steps=12, iterations=6)))
    assert page.count("script") == 0 and page.count("img") == 0
    assert "<script" not in html and "onerror='" not in html
    shown = [words for words in page.words if '<script>document.title="owned"</script>' in words and "{{ 7*7 }}" in words]
    assert len(shown) >= 3 * 4 + 1  # prompt, group and responses of each sample; the configuration
    assert any("?\u2400雨" in words for words in shown)


def test_a_failed_write_leaves_the_old_page(new_run, monkeypatch) -> None:
    folder = new_run(steps=3, iterations=3, count=3)
    before = write_report(folder).read_text(encoding="utf-8")
    (folder / "summary.json").write_text("{}")

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("tercet.report.page.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == before and not list(folder.glob(".report*"))


def test_report_loads_neither_torch_nor_other_rooms() -> None:
    code = (
        "import sys, tercet.report, tercet.report.verdict; "
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'transformers', 'yaml', 'pydantic') "
        "or (name.startswith('tercet.') and not name.startswith('tercet.report'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]"


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--hide-scrollbars"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser(new_run, tmp_path: Path) -> None:
    """In a real browser, phone width: injected script did not run, and the page does not scroll sideways."""
    report = write_report(hostile(new_run("hostile", steps=60, iterations=40)))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="{report.as_uri()}" width="390" height="800"></iframe><script>f.onload = () => {{ '
        "const d = f.contentDocument; document.title = [d.title, d.documentElement.scrollWidth, "
        "d.querySelectorAll('figure svg').length, getComputedStyle(d.body).maxWidth].join('|') }</script>"
    )
    flags = [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--virtual-time-budget=4000"]
    run = [str(BROWSER), *flags, f"--screenshot={tmp_path / 'page.png'}", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>([^<]*)</title>", dom)
    assert found, dom[:500]
    title, width, drawings, max_width = found[1].split("|")
    assert title == "hostile · Tercet" and int(width) <= 390 and int(drawings) > 10
    assert max_width == "1152px"  # the style sheet was taken: 72rem
    assert (tmp_path / "page.png").stat().st_size > 1000
