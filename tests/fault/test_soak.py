"""Hundreds of PPO iterations: memory, time and open files stay where they were after the first fifty."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
import yaml
from fault.harness import Process, write_configuration

pytestmark = pytest.mark.timeout(3600)


@dataclass(frozen=True)
class Reading:
    """A process after so many PPO iterations."""

    iteration: int
    rss_mb: float
    cpu_seconds: float  # of the process itself: other work on the machine counts less (a shared core is slower), but it does
    files: int


def read(pid: int, iteration: int) -> Reading:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks, pages = int(fields[11]) + int(fields[12]), int(fields[21])
    rss_mb = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return Reading(iteration, rss_mb, ticks / os.sysconf("SC_CLK_TCK"), len(os.listdir(f"/proc/{pid}/fd")))


def soak(folder: Path, iterations: int) -> list[Reading]:
    """A run of all stages whose PPO has so many iterations, with evaluations, rollouts and checkpoints on the way."""
    config = write_configuration(folder)
    values = yaml.safe_load(config.read_text())
    values["ppo"] |= {"iterations": iterations, "evaluate_every": 25, "save_rollouts_every": 5, "learning_rate": 1e-4}
    values["checkpoint"] = {"every": 20, "keep": 2}
    config.write_text(yaml.safe_dump(values))
    process = Process("run", config, log=folder / "log")
    metrics, readings = folder / "run/ppo/metrics.jsonl", [Reading(0, 0, 0, 0)]
    while readings[-1].iteration < iterations and not process.ended_within(0.01):
        done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if done > readings[-1].iteration:
            readings.append(read(process.pid, done))
    assert process.wait() == 0, process.output()[-2000:]
    return readings[1:]


def over(readings: list[Reading], first: int, last: int) -> tuple[float, float, float]:
    """Median memory in MB, CPU seconds an iteration, and median of open files between two iterations.

    The median, because a reading may fall into the moment in which a file is written.
    """
    part = [reading for reading in readings if first <= reading.iteration <= last]
    seconds = (part[-1].cpu_seconds - part[0].cpu_seconds) / (part[-1].iteration - part[0].iteration)
    return median(reading.rss_mb for reading in part), seconds, median(reading.files for reading in part)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("iterations", "window"), [pytest.param(120, 35, marks=pytest.mark.slow), pytest.param(600, 100, marks=pytest.mark.full)]
)
def test_nothing_grows(iterations: int, window: int, tmp_path: Path) -> None:
    for attempt in ("first", "second", "third"):
        began = time.monotonic()
        folder = tmp_path / attempt
        folder.mkdir()
        readings = soak(folder, iterations)
        early, late = over(readings, 50, 50 + window), over(readings, iterations - window, iterations)
        growth = late[0] / early[0] - 1
        print(
            f"\n{iterations} iterations in {time.monotonic() - began:.0f} s: memory {early[0]:.1f} -> {late[0]:.1f} MB ({growth:+.2%}),"
        )
        print(f"CPU {early[1] * 1e3:.1f} -> {late[1] * 1e3:.1f} ms an iteration, open files {early[2]} -> {late[2]}")
        assert growth < 0.02 and late[2] <= early[2]
        assert len(list((folder / "run/ppo").rglob("step-*"))) == 0
        if late[1] < 1.15 * early[1]:
            return
    pytest.fail("an iteration's CPU seconds grew each time: a busy neighbour of the processor's would not come three times late")
