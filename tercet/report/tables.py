"""The figures of a run as rows of text."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from tercet.report.findings import accuracy_interval, judged_by, on_prompts
from tercet.report.load import STAGES, Record, RunData, number
from tercet.report.text import MINUS, THIN, duration, percent, plain, short, signed, tenths

# figure -> (name, note, is a share); the rows of the comparison, and the order of any table of figures
FIGURES: dict[str, tuple[str, str, bool]] = {
    "score": ("Training reward", "mean", False),
    "combined": ("What PPO maximises", "the reward after its clip and the rule for unended responses, mean", False),
    "gold": ("Gold score", "mean", False),
    "kl": ("KL to the reference", "nats per response", False),
    "finished": ("Ended by a stop token", "share", True),
    "length": ("Length", "tokens", False),
    "entropy": ("Entropy", "nats per token", False),
    "distinct1": ("Distinct words", "share", False),
    "distinct2": ("Distinct bigrams", "share", False),
    "repetition": ("Repetition", "within a response", False),
    "perplexity": ("Perplexity", "under the base model", False),
    "win_rate": ("Preferred to SFT", "ties half", True),
    "lc_win_rate": ("Preferred at equal length", "ties half", True),
}
# What is shown of each group of prompts; all their other figures are in summary.json.
GROUP_FIGURES = (
    *("win_rate", "gold.win_rate", "gold.sft", "gold.ppo", "sft.score", "ppo.score", "ppo.kl"),
    *("sft.finished", "ppo.finished", "sft.length", "ppo.length", "sft.distinct2", "ppo.distinct2"),
)
SHARES = ("win_rate", "finished", "accuracy")
PHASES = ("sync_s", "generate_s", "score_s", "update_s", "evaluate_s")  # of a line of ppo/timings.jsonl
POLICY_NAMES = {"base": "Base", "sft": "SFT", "ppo": "PPO", "best": "Best"}
_BY_CHANCE = ", an estimate: below 0 by chance"
JUDGE_NAMES = {
    "score": "training reward",
    "judge": "second reward model's score",
    "gold": "gold score",
    "bag_of_words": "words alone",
}


@dataclass(frozen=True)
class Table:
    """caption; head: the columns; rows: a name, a note under it, and the cells."""

    caption: str
    head: list[str]
    rows: list[tuple[str, str, list[str]]]


@dataclass(frozen=True)
class Bar:
    """A win rate and its 95 % interval, all in 0..100, to be drawn on a scale from 0 to 100."""

    name: str
    rate: float
    low: float
    high: float
    text: str
    note: str
    controlled: str  # the rate where both responses are equally long, "" where that is not known


def show(key: str, value: float | None) -> str:
    """A figure by its key; a dash where it is unknown."""
    if value is None:
        return "–"
    share = any(name in key for name in SHARES)
    return tenths(value) if share else short(value)


def comparison(run: RunData) -> Table | None:
    """SFT against PPO, with the base model and other policies where they were evaluated."""
    policies = sorted(run.policies, key=lambda name: (list(POLICY_NAMES).index(name) if name in POLICY_NAMES else 9, name))
    policies = policies or [name for name in ("sft", "ppo") if run.ran(name)]
    rows = []
    for key, (name, note, share) in FIGURES.items():
        values = [_of_policy(run, policy, key) for policy in policies]
        if not any(value is not None for value in values):
            continue
        if key == "combined" and values == [_of_policy(run, policy, "score") for policy in policies]:
            continue  # nothing was clipped, and no rule took anything away
        sft, ppo = _of_policy(run, "sft", key), _of_policy(run, "ppo", key)
        form = tenths if share else short
        note += _BY_CHANCE * (key == "kl" and any(value is not None and value < 0 for value in values))
        cells = ["–" if value is None else form(value) for value in values]
        change = "–" if sft is None or ppo is None else _change(ppo - sft, share)
        rows.append((name, note, [*cells, change] if {"sft", "ppo"} <= set(policies) else cells))
    if not rows:
        return None
    head = [POLICY_NAMES.get(name, plain(name, 40)) for name in policies]
    came = "; SFT is the model as it came: there were no demonstrations" if run.policies and "base" not in run.policies else ""
    way = run.value("ppo.interpolation")
    part = (
        ""
        if way is None
        else f"; PPO is {percent(way)} of the way from what it began with to what was trained (ppo.interpolation)"
    )
    return Table(f"On {on_prompts(run)}{came}{part}", head + ["Change"] * ({"sft", "ppo"} <= set(policies)), rows)


def _of_policy(run: RunData, policy: str, key: str) -> float | None:
    found = run.value(f"{policy}.{key}")
    return found if found is not None else run.value(f"{key}.{policy}")  # the gold score is "gold.ppo"


def _change(difference: float, share: bool) -> str:
    return f"{100 * difference:+.1f}{THIN}pts".replace("-", MINUS) if share else signed(difference)


def wins(run: RunData) -> list[Bar]:
    """PPO's win rate over SFT by each judge; the headline figure where no judge is named."""
    headline = {"win_rate": run.value("win_rate"), "low": run.value("win_rate_low"), "high": run.value("win_rate_high")}
    records: dict[str, Record] = run.wins or {"PPO over SFT": headline}
    bars = []
    for judge, record in records.items():
        rate = number(record.get("win_rate"))
        if rate is None:
            continue
        low, high, count = (number(record.get(key)) for key in ("low", "high", "n"))
        low, high = rate if low is None else low, rate if high is None else high
        note = f"{percent(low)} to {percent(high)}" + (f", {short(count)} prompts" if count else "")
        at, left, right = (min(100.0, max(0.0, 100 * share)) for share in (rate, low, high))
        controlled = number(record.get("lc_win_rate"))
        equal = "" if controlled is None else percent(controlled)
        bars.append(Bar(judge_name(judge), at, left, right, percent(rate), note, equal))
    return bars


def judge_name(judge: str) -> str:
    """What a judge is called in a sentence."""
    return JUDGE_NAMES.get(judge, plain(judge, 60).replace("_", " "))


def groups(run: RunData) -> Table | None:
    """Figures of groups of prompts, one column a group."""
    found = run.groups()
    if not found:
        return None
    keys = [key for key in GROUP_FIGURES if any(key in figures for figures in found.values())]
    rows = [(_title(key), "", [show(key, figures.get(key)) for figures in found.values()]) for key in keys]
    return Table("Groups of prompts, reported apart", [plain(name, 40) for name in found], rows) if rows else None


def _title(key: str) -> str:
    owner, _, name = key.partition(".")
    if name and owner in POLICY_NAMES:
        return f"{POLICY_NAMES[owner]}: {FIGURES.get(name, (plain(name, 40).replace('_', ' '),))[0]}"
    if name and owner == "gold":
        return f"Gold score, {POLICY_NAMES.get(name, plain(name, 40).replace('_', ' '))}"
    return plain(key, 60).replace("_", " ").capitalize()


def headline(run: RunData) -> list[tuple[str, str, str]]:
    """The four or five figures to know: (value, name, note)."""
    found = []
    if (rate := run.value("win_rate")) is not None:
        low, high = run.value("win_rate_low"), run.value("win_rate_high")
        note = f"{percent(low)} to {percent(high)}" if low is not None and high is not None else f"on {on_prompts(run)}"
        judge = run.summary.get("win_rate_by")
        by = judged_by(run) or (f"by {plain(judge, 60)}" if judge else "")
        found.append((percent(rate), "PPO wins over SFT", ", ".join(filter(None, (note, by)))))
    sft, ppo, spread = run.value("gold.sft"), run.value("gold.ppo"), run.value("gold.sft_std")
    if sft is not None and ppo is not None:
        note = f"{short(sft)} to {short(ppo)}" + (f"; one SD is {short(spread)}" if spread else "")
        found.append((signed(ppo - sft), "gold score over SFT", note))
    if (kl := run.value("ppo.kl")) is not None:
        found.append((short(kl), "nats from SFT", "KL per response" + _BY_CHANCE * (kl < 0)))
    if (accuracy := run.value("reward.eval_accuracy")) is not None:
        interval = accuracy_interval(run)
        note = f"{percent(interval[0])} to {percent(interval[1])}" if interval else "held-out pairs"
        found.append((percent(accuracy), "reward model accuracy", note))
    if (finished := run.value("ppo.finished")) is not None:
        before = run.value("sft.finished")
        found.append(
            (percent(finished), "end by a stop token", f"SFT {percent(before)}" if before is not None else "of PPO's responses")
        )
    if len(found) < 5 and (loss := run.value("sft.eval_loss")) is not None:
        found.append((short(loss), "SFT held-out loss", "nats per token"))
    return found


def machine_time(run: RunData) -> Table | None:
    """Seconds, rate and memory of each stage, from its timings."""
    rows = []
    for stage in STAGES:
        lines = run.timings.get(stage, [])
        seconds = [value for line in lines if (value := _seconds(line)) is not None]
        if not seconds:
            continue
        rates = sorted(value for line in lines if (value := number(line.get("tokens_per_s"))) is not None)
        memory = [value for line in lines if (value := number(line.get("peak_memory_mb"))) is not None]
        cells = [duration(sum(seconds)), short(len(lines)), duration(sum(seconds) / len(seconds))]
        cells += [short(rates[len(rates) // 2]) if rates else "–", f"{short(max(memory))}{THIN}MB" if memory else "–"]
        rows.append((TITLES[stage], "", cells))
    if not rows:
        return None
    return Table("Time and memory", ["Time", "Steps", "Per step", "Tokens/s (median)", "Peak memory"], rows)


def _seconds(line: Record) -> float | None:
    """Of a step, or of an iteration of PPO, which has them by phase; None where the line has neither."""
    phases = [value for key in PHASES if (value := number(line.get(key))) is not None]
    whole = number(line.get("seconds"))
    return whole if whole is not None or not phases else sum(phases)


TITLES = {"pretrain": "Pretraining", "sft": "Supervised fine-tuning", "reward": "Reward model", "ppo": "PPO"}


def data(run: RunData) -> Table | None:
    """The files that the run was made from, each with the beginning of its SHA-256."""
    rows: dict[str, tuple[str, str, list[str]]] = {}
    for record in run.prints.values():
        files = record.get("data")
        for key, prints in (files if isinstance(files, dict) else {}).items():
            for name, digest in (prints if isinstance(prints, dict) else {key: prints}).items():
                rows.setdefault(
                    f"{key} {name}", (plain(key, 120), plain(name, 80) if name != key else "", [plain(digest, 16)[:16]])
                )
    return Table("Data", ["SHA-256, first 16 digits"], list(rows.values())) if rows else None


def facts(run: RunData) -> list[tuple[str, str]]:
    """What the run was made with: seed, precision, versions, machine."""
    known = ("seed", "dtype", "threads", "machine", "python")
    found = [(key, value) for key, value in run.summary.items() if key in known or key.startswith("version")]
    if (seconds := run.value("seconds")) is not None:
        found.append(("time, all stages", duration(seconds)))
    return [(plain(key, 80), plain(value, 400)) for key, value in found]


def everything(run: RunData) -> list[tuple[str, str]]:
    """summary.json as it is, unrounded."""
    return [(plain(key, 120), plain(value, 400)) for key, value in run.summary.items() if key != "verdict"]


def command(run: RunData) -> str:
    """The command line that repeats the run into a fresh folder; "" where its reward function came from Python."""
    if "\n  rewards: []\n" in run.config:
        return ""
    return (
        f"tercet run {shlex.quote(plain(run.name, 200))}/config.yaml --set output={shlex.quote(plain(run.name, 200) + '-again')}"
    )
