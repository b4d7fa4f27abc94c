import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import Page, hostile

from tercet.report import write_report
from tercet.report.load import RunData, load_run
from tercet.report.page import render
from tercet.report.tables import command, machine_time
from tercet.report.text import duration


def written(folder: Path) -> tuple[str, Page]:
    path = write_report(folder)
    assert path == folder / "report.html" and not list(folder.glob(".report*"))
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def test_a_reward_from_python_has_no_command_line() -> None:
    assert command(RunData(config="ppo:\n  rewards:\n  - kind: stage\n")).startswith("tercet run ")
    assert command(RunData(config="ppo:\n  rewards: []\n")) == ""
    assert "given its reward function in Python" in render(RunData(config="ppo:\n  rewards: []\n"))


def test_a_full_run(new_run) -> None:
    html, page = written(new_run("toy", steps=3000, iterations=2000, count=500))
    assert len(html.encode()) < 3_000_000
    assert page.count("h1") == 1 and page.count("article") == 400 and page.count("script") == 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert all(link and link[1:] in ids for link in links)
    for title in (
        "Loss",
        "Accuracy",
        "Training reward",
        "KL",
        "Entropy",
        "Length",
        "Ended by a stop token",
        "Clip fraction",
        "Explained variance",
    ):
        assert f"<b>{title}</b>" in html
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img")
    assert (
        html.index("Healthy: PPO wins 84.6")
        < html.index("SFT against PPO")
        < html.index("Was PPO worth it?")
        < html.index("The reward model</h2>")
        < html.index("Learning curves")
        < html.index("Samples</h2>")
    )
    assert "tercet run toy/config.yaml --set output=toy-again" in html and "coef: 0.05" in html and "versions.torch" in html
    assert "<td>abababababababab</td>" in html and "/x/rewards.py" in html  # what it was made from
    assert "PPO gained as much as the best of about" in html and "at equal length <b>77" in html
    for title in ("Can its confidence be believed?", "Accuracy by margin", "Scores", "Gold score", "Second reward model’s score"):
        assert f"<b>{title}</b>" in html


def test_the_time_of_every_stage(new_run) -> None:
    """30 steps of 1.5 s each; of PPO 30 iterations of 2 s, by phase, and 10 evaluations of 1.5 s."""
    table = machine_time(load_run(new_run(steps=6, iterations=4, count=9)))
    assert table is not None
    wanted = {"Supervised fine-tuning": (45.0, 1.5), "Reward model": (45.0, 1.5), "PPO": (75.0, 2.5)}
    assert {name: cells[:3] for name, _, cells in table.rows} == {
        name: [duration(total), "30", duration(each)] for name, (total, each) in wanted.items()
    }


def test_a_loss_is_not_called_a_gain_over_fewer_samples(new_run) -> None:
    folder = new_run(steps=6, iterations=4, count=9)
    path = json.loads((folder / "evaluation/path.json").read_text())
    last = path["points"][-1]
    (folder / "evaluation/path.json").write_text(
        json.dumps(path | {"points": [*path["points"][:-1], last | {"judge_gain": -6.4}]})
    )
    html, _ = written(folder)
    assert "PPO gained nothing: \u22126.4" in html and "PPO gained as much as" not in html


def test_a_gain_that_may_be_chance_is_not_called_worth_more_than_samples(new_run) -> None:
    folder = new_run(steps=6, iterations=4, count=9)
    path = json.loads((folder / "evaluation/path.json").read_text())
    last = path["points"][-1] | {"judge_gain": 0.2, "judge_gain_low": -0.1, "judge_gain_high": 0.5}
    (folder / "evaluation/path.json").write_text(json.dumps(path | {"points": [*path["points"][:-1], last]}))
    html, _ = written(folder)
    assert "may be chance" in html and "\u22120.1 to +0.5" in html and "PPO gained as much as" not in html


def test_only_our_own_script_may_run(new_run) -> None:
    html, page = written(new_run(steps=6, iterations=4, count=9))
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(
        attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert f"script-src 'sha256-{digest}'" in str(policy) and "unsafe-eval" not in str(policy)
    assert str(policy).count("unsafe-inline") == 1  # of styles
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "innerHTML" not in script and "http" not in script


def test_the_samples_can_be_read_without_the_script(new_run) -> None:
    html, page = written(new_run(steps=6, iterations=4, count=120))
    form = next(attributes for tag, attributes in page.tags if attributes.get("id") == "filter")
    assert "hidden" in form, "what would do nothing is not shown"
    shelves = [
        html.index(title)
        for title in ("Where PPO gained most", "In the middle", "Where PPO lost most", '<h3 class="stage">Others')
    ]
    assert shelves == sorted(shelves) and page.count("article") == 120


def test_nothing_is_loaded_from_anywhere(new_run) -> None:
    html, page = written(new_run())
    assert "default-src 'none'" in html.replace("&#39;", "'")
    assert page.count("link") == 0 and page.count("img") == 0 and "@import" not in html and not re.search(r"url\((?!#)", html)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)


PARTS = [
    "reward/card.json",
    "evaluation/path.json",
    "evaluation/best_of_n.json",
    "ppo/evaluations.jsonl",
    "ppo/done.json",
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
    (folder / "reward/card.json").write_text(
        '{"accuracy": 0.7, "pairs": 3, "by_confidence": [{"mean": 1}, 3], "by_margin": 4, "longer_worse": {"accuracy": "x"}, '
        '"histograms": {"edges": [1, "x", 2], "chosen": {"counts": [1, 2]}, "sft": 7}, "by_source": [{"source": 3}], "temperature": []}'
    )
    (folder / "evaluation/path.json").write_text(
        '{"points": [{"kl": 1}, {"kl": "x", "score_gain": 1}, 7], "turns": {"gold": {"kl": 2}}}'
    )
    (folder / "evaluation/best_of_n.json").write_text(
        '{"curve": [{"n": 0, "kl": -1, "score_gain": 1}], "frontier": {}, "prompts": []}'
    )
    (folder / "ppo/evaluations.jsonl").write_text('{"iteration": 1, "score": 3, "kl": ["x"], "gold": []}\n{"gold": [1, 2]}\n')
    (folder / "ppo/done.json").write_text('{"fingerprint": {"data": {"a": 3, "b": {"c": null}}}}')
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


def test_hostile_text_is_shown_and_not_run(new_run) -> None:
    html, page = written(hostile(new_run("<b>run&amp;", steps=12, iterations=6)))
    assert page.count("script") == 1 and page.count("img") == 0
    assert html.count("<script") == 1 and "onerror='" not in html
    shown = [words for words in page.words if '<script>document.title="owned"</script>' in words and "{{ 7*7 }}" in words]
    assert len(shown) >= 3 * 4 + 1  # prompt, group and responses of each sample; the configuration
    assert any("?\u2400雨" in words for words in shown)


def test_a_judges_hostile_name_is_shown_and_not_run(new_run) -> None:
    """Such a name reaches the ids of a drawing, which the template does not escape."""
    folder = new_run(steps=12, iterations=6)
    before = written(folder)[1]
    name = 'x"><meta http-equiv="refresh" content="0;url=//evil"><h1>OWNED</h1>'
    gains = {"iteration": 1, "kl": 1.0, f"{name}_gain": 1.0, f"{name}_gain_low": 0.5, f"{name}_gain_high": 1.5}
    (folder / "evaluation/path.json").write_text(json.dumps({"points": [gains]}))
    (folder / "evaluation/best_of_n.json").unlink()
    html, page = written(folder)
    assert page.count("h1") == before.count("h1") and page.count("meta") == before.count("meta")
    assert "<h1>OWNED" not in html and '<meta http-equiv="refresh"' not in html and "OWNED" in html
    assert all(re.fullmatch(r"[\w.-]+", attributes["id"] or "") for _, attributes in page.tags if "id" in attributes)


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


def in_browser(report: Path, folder: Path, script: str) -> list[str]:
    """What the script finds out in a real browser, in a frame of phone width: it has `d`, the page's document, and gives an array."""
    frame = folder / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="{report.as_uri()}" width="390" height="800"></iframe><script>f.onload = () => {{ '
        f"const d = f.contentDocument; document.title = ((() => {{ {script} }})()).join('|') }}</script>"
    )
    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}", "--allow-file-access-from-files", "--virtual-time-budget=4000"]
    run = [str(BROWSER), *flags, f"--screenshot={folder / 'page.png'}", "--dump-dom", frame.as_uri()]
    dom = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"<title>([^<]*)</title>", dom)
    assert found and (folder / "page.png").stat().st_size > 1000, dom[:500]
    return found[1].split("|")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_in_a_browser(new_run, tmp_path: Path) -> None:
    """Injected script did not run, the page does not scroll sideways, the style sheet was taken."""
    report = write_report(hostile(new_run("hostile", steps=60, iterations=40)))
    asked = "return [d.title, d.documentElement.scrollWidth, d.querySelectorAll('figure svg').length, getComputedStyle(d.body).maxWidth]"
    title, width, drawings, max_width = in_browser(report, tmp_path, asked)
    assert title == "hostile · Tercet" and int(width) <= 390 and int(drawings) > 10
    assert max_width == "1152px"  # 72rem


FILTER = """
const form = d.getElementById("filter"), seen = () => [...d.querySelectorAll("#found article")];
const set = (name, value) => { form.elements[name].value = value; form.dispatchEvent(new Event("input", {bubbles: true})); };
const numbers = (name) => seen().map((node) => parseFloat(node.dataset[name]));
const all = [form.hidden, seen().length, d.getElementById("count").textContent, Math.max(...numbers("gain")) === numbers("gain")[0]];
d.getElementById("more").click();
all.push(seen().length, d.activeElement === seen()[10]);
set("outcome", "loss");
all.push(seen().every((node) => node.dataset.outcome === "loss"), d.getElementById("count").textContent);
set("outcome", "all"); set("from", "2"); set("to", "3");
all.push(Math.min(...numbers("ppo")) >= 2 && Math.max(...numbers("ppo")) <= 3);
set("from", ""); set("to", ""); set("sort", "ppo up");
all.push(numbers("ppo").every((value, i, row) => i === 0 || row[i - 1] <= value));
set("words", "happiness");
all.push(seen().every((node) => node.textContent.includes("happiness")) && seen().length > 0);
set("words", "nothing says this");
all.push(seen().length, d.querySelectorAll(".shelf:not([hidden])").length, d.documentElement.scrollWidth <= 390);
return all;
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_filter_in_a_browser(new_run, tmp_path: Path) -> None:
    folder = new_run("filter", steps=6, iterations=4, count=120)
    rows = [json.loads(line) for line in (folder / "evaluation/samples.jsonl").read_text().splitlines()]
    lost = sum(row["ppo_score"] < row["sft_score"] for row in rows)
    found = in_browser(write_report(folder), tmp_path, FILTER)
    assert found[:6] == ["false", "10", "120 of 120", "true", "20", "true"]
    assert found[6:8] == ["true", f"{lost} of 120"] and lost > 0
    assert found[8:11] == ["true", "true", "true"] and found[11:] == ["0", "0", "true"]
