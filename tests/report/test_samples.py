from tercet.report.load import RunData
from tercet.report.samples import shelves


def rows(count: int) -> list[dict[str, object]]:
    """Prompt i gains i - 10."""
    return [{"prompt": f"p{i}", "sft": "a", "ppo": "b", "sft_score": 0.0, "ppo_score": float(i - 10)} for i in range(count)]


def test_best_middle_and_worst_without_overlap() -> None:
    said, found = shelves(RunData(samples=rows(100)[::-1]))
    best, middle, worst = ([sample.prompt for sample in shelf.samples] for shelf in found)
    assert best == [f"p{i}" for i in range(99, 79, -1)]
    assert middle == [f"p{i}" for i in range(59, 39, -1)]
    assert worst == [f"p{i}" for i in range(20)]
    assert "100 held-out prompts" in said and "89\u202f% gained" in said and "+40" in said


def test_few_samples_and_samples_without_scores() -> None:
    _, found = shelves(RunData(samples=rows(2)))
    assert [[sample.gain for sample in shelf.samples] for shelf in found] == [["\u22129", "\u221210"]]
    said, (only,) = shelves(RunData(samples=[{"prompt": "x", "sft": "a", "ppo": "b"}] * 70))
    assert len(only.samples) == 60 and "first 60 of 70" in said and only.samples[0].gain == ""
    assert shelves(RunData()) == ("", [])


def test_what_a_card_says() -> None:
    row = {"prompt": "p", "group": "new", "base": "z", "sft": "a", "ppo": "", "sft_score": 1.0, "ppo_score": 0.5, "ppo_kl": 2.5}
    (sample,) = shelves(RunData(samples=[row | {"sft_finished": False, "ppo_finished": True}]))[1][0].samples
    assert (sample.group, sample.gain, sample.direction) == ("new", "\u22120.5", "down")
    assert [(r.policy, r.cut) for r in sample.responses] == [("Base", False), ("SFT", True), ("PPO", False)]
    assert sample.responses[2].figures == [("score", "0.5"), ("KL", "2.50")]
