from tercet.report.load import RunData
from tercet.report.samples import differences, shelves


def rows(count: int) -> list[dict[str, object]]:
    """Prompt i gains i - 10."""
    return [{"prompt": f"p{i}", "sft": "a", "ppo": "b", "sft_score": 0.0, "ppo_score": float(i - 10)} for i in range(count)]


def test_best_middle_and_worst_without_overlap() -> None:
    said, found = shelves(RunData(samples=rows(100)[::-1]))
    best, middle, worst, others = ([sample.prompt for sample in shelf.samples] for shelf in found)
    assert best == [f"p{i}" for i in range(99, 79, -1)]
    assert middle == [f"p{i}" for i in range(59, 39, -1)]
    assert worst == [f"p{i}" for i in range(20)]
    assert sorted(best + middle + worst + others) == sorted(f"p{i}" for i in range(100)) and others[0] == "p79"
    assert "All of them are here" in said and found[3].open == 0
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
    assert (sample.group, sample.gain, sample.outcome) == ("new", "\u22120.5", "loss")
    assert sample.order == {"gain": "-0.5", "sft": "1", "ppo": "0.5", "kl": "2.5"}
    assert [(r.policy, r.cut) for r in sample.responses] == [("Base", False), ("SFT", True), ("PPO", False)]
    assert sample.responses[2].figures == [("score", "0.5"), ("KL", "2.50")]


def test_a_large_evaluation_is_thinned_evenly_and_by_size() -> None:
    said, found = shelves(RunData(samples=rows(5000)))
    assert sum(len(shelf.samples) for shelf in found) == 400 and "400 of them are here" in said
    others = [int(sample.prompt[1:]) for sample in found[3].samples]
    assert others == sorted(others, reverse=True) and max(others) > 4900 and min(others) < 100
    long = [row | {"sft": "x " * 750, "ppo": "y " * 750} for row in rows(1000)]
    _, found = shelves(RunData(samples=long))
    assert 60 < sum(len(shelf.samples) for shelf in found) < 200


def test_words_that_only_one_answer_has_are_marked() -> None:
    left, right = differences("Rain is water, friend.", "Rain is cold water from clouds, friend!")
    assert left == [("Rain is ", False), ("water", False), (", friend", False), (".", True)]
    assert right == [
        ("Rain is ", False),
        ("cold ", True),
        ("water ", False),
        ("from clouds", True),
        (", friend", False),
        ("!", True),
    ]
    assert "".join(text for text, _ in right) == "Rain is cold water from clouds, friend!"


def test_answers_with_nothing_in_common_are_not_marked() -> None:
    assert differences("one two three four", "five six seven eight") == (
        [("one two three four", False)],
        [("five six seven eight", False)],
    )
    assert differences("", "something") == ([("", False)], [("something", False)])
    assert differences("", "") == ([("", False)], [("", False)])
    assert differences("same words", "same words") == ([("same words", False)], [("same words", False)])
