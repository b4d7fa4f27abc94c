import pytest

from tercet.algo.schedules import learning_rate, usual_rate


def rates(total: int, schedule: str, warmup: int = 0, min_ratio: float = 0.0) -> list[float]:
    return [learning_rate(step, total, 2.0, schedule, warmup, min_ratio) for step in range(total)]


def test_by_hand() -> None:
    assert rates(4, "linear") == [2.0, 1.5, 1.0, 0.5]
    assert rates(4, "constant") == [2.0] * 4
    assert rates(2, "cosine") == pytest.approx([2.0, 1.0])
    assert rates(2, "cosine", min_ratio=0.5) == pytest.approx([2.0, 1.5])
    assert rates(2, "linear", min_ratio=0.5) == [2.0, 1.0], "linear falls to 0 (row 52), whatever the floor of cosine"


def test_warm_up_rises_to_base_and_then_the_schedule_begins() -> None:
    assert rates(6, "linear", warmup=2) == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert rates(4, "constant", warmup=4) == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (7, 3), (3, 10)])
def test_no_step_is_without_learning(schedule: str, total: int, warmup: int) -> None:
    assert all(0 < rate <= 2.0 for rate in rates(total, schedule, warmup))


def test_beyond_the_end_it_stays() -> None:
    assert learning_rate(9, 4, 2.0, "linear") == 0
    assert learning_rate(9, 4, 2.0, "cosine", min_ratio=0.1) == pytest.approx(0.2)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'quadratic'"):
        learning_rate(0, 4, 2.0, "quadratic")
    with pytest.raises(ValueError, match="total_steps"):
        learning_rate(0, 0, 2.0, "linear")


def test_the_usual_rate_goes_down_with_the_size_and_up_with_the_minibatch() -> None:
    assert [usual_rate(size, 512) for size in (10**9, 4 * 10**9, 10**7)] == pytest.approx([1e-5, 5e-6, 1e-4])
    assert [usual_rate(10**9, count) for count in (128, 32, 8)] == pytest.approx([5e-6, 2.5e-6, 1.25e-6])
    assert usual_rate(0, 512) == usual_rate(10_000, 512) == 1e-3
