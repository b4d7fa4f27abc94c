"""What `auto` means, one process as a world of size 1, and signals."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tercet.runtime import machine
from tercet.runtime.distributed import World
from tercet.runtime.lock import locked
from tercet.runtime.machine import free_memory, out_of_memory_explained, resolve
from tercet.runtime.stage import Interrupt
from tercet.types import TercetError


def test_what_is_given_is_taken() -> None:
    machine = resolve("cpu", "float64", 3, 77, parameters=10**9)
    assert (machine.device, machine.dtype, machine.threads, machine.microbatch_tokens) == (
        torch.device("cpu"),
        torch.float64,
        3,
        77,
    )
    assert machine.settings() == {"device": "cpu", "dtype": "float64", "threads": 3, "microbatch_tokens": 77}


@pytest.mark.parametrize(("gflops", "sizes"), [(100.0, {256, 1024, 2048}), (1.0, {256})])
def test_the_matrix_rate_is_the_best_of_products_none_of_which_takes_long(
    gflops: float, sizes: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a billion operations a second the largest would take a quarter of a minute. Smaller ones are slower here."""
    made: set[int] = set()
    now = 0.0

    class Matrix:
        def __init__(self, size: int, *shape: int, **options: Any):
            self.size = size

        def __matmul__(self, other: Any) -> None:
            nonlocal now
            made.add(self.size)
            now += 2 * self.size**3 / (1e9 * gflops) * (256 + self.size) / self.size

    monkeypatch.setattr(machine.torch, "ones", Matrix)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now)
    rate = machine.measured_rate.__wrapped__(torch.float32, "cpu")
    largest = max(sizes)
    assert made == sizes and rate == pytest.approx(1e9 * gflops * largest / (256 + largest))


def test_auto_settles_everything_and_settling_again_changes_nothing() -> None:
    for parameters in (10_000, 1_000_000, 10**9):
        chosen = resolve("cpu", "auto", "auto", "auto", parameters).settings()
        assert "auto" not in chosen.values()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        assert 1 <= chosen["threads"] <= cores and chosen["microbatch_tokens"] >= 512
        again = resolve(chosen["device"], chosen["dtype"], chosen["threads"], chosen["microbatch_tokens"], parameters)
        assert again.settings() == chosen


def test_a_tiny_model_computes_in_float32_on_one_thread() -> None:
    chosen = resolve("cpu", "auto", "auto", "auto", 50_000)
    assert (chosen.dtype, chosen.threads) == (torch.float32, 1)


@pytest.mark.parametrize("parameters", [1_000_000, 10**9])
@pytest.mark.parametrize(
    ("looks", "ranks", "wanted"),
    [([1.1, 0.9, 0.2], 1, 1), ([0.3, 1.6, 0.9], 1, 2), ([0.0] * 3, 1, 1), ([8.0] * 3, 1, 8), ([8.0] * 3, 4, 2)],
)
def test_threads_are_as_many_as_cores_have_nothing_to_do(
    parameters: int, looks: list[float], ranks: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best of three looks, shared with the other ranks of this machine."""
    seen = iter(looks)
    monkeypatch.setattr("tercet.runtime.machine._look", lambda cores, seconds: next(seen))
    monkeypatch.setattr("tercet.runtime.machine.own_cores", lambda: list(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert resolve("cpu", "float32", "auto", 512, parameters).threads == wanted


@pytest.mark.parametrize(
    ("parameters", "adapter", "wanted"),
    [(10**6, True, 4_096), (10**8 - 1, True, 2_048), (10**10, False, 2_048), (5 * 10**8, True, 1_280), (10**9, True, 768)],
)
def test_tokens_of_a_micro_batch_by_the_models_size(parameters: int, adapter: bool, wanted: int) -> None:
    assert resolve("cpu", "float32", 1, "auto", parameters, adapter=adapter).microbatch_tokens == wanted


def test_onednn_keeps_as_many_kernels_as_the_user_says_else_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    resolve("cpu", "float32", 1, 64, 1000).apply()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7" and 0 < int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", "nonsense"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(TercetError, match=r"machine\.device.*cannot be used here.*try auto"):
        resolve(device, "auto", "auto", "auto", 1)


@pytest.mark.parametrize(
    ("stage", "sampled", "error", "told"),
    [
        (
            "sft",
            None,
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            r"machine\.microbatch_tokens \(64 now; try 32\)",
        ),
        ("sft", None, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), r"try 32\);"),
        ("sft", None, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), r"try 32\);"),
        ("ppo", ("ppo.rollout_batch_size", 16), MemoryError(), r"if it was sampling, ppo\.rollout_batch_size \(16 now; try 8\)"),
    ],
)
def test_running_out_of_memory_names_what_to_lower(
    stage: str, sampled: tuple[str, int] | None, error: Exception, told: str
) -> None:
    with pytest.raises(TercetError, match=rf"stage {stage}: memory ran out.*{told}"), out_of_memory_explained(stage, 64, sampled):
        raise error


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="sizes of tensors"), out_of_memory_explained("sft", 64, None):
        raise RuntimeError("sizes of tensors must match")


def test_an_allocation_that_really_fails_is_recognised() -> None:
    with pytest.raises(TercetError, match="memory ran out"), out_of_memory_explained("sft", 64, None):
        torch.empty(2**55, dtype=torch.uint8)


def test_free_memory_is_below_what_the_machine_has() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(("threads", "tokens"), [(0, 10), (1, 0)])
def test_nothing_below_one(threads: int, tokens: int) -> None:
    with pytest.raises(TercetError, match="at least 1, or auto"):
        resolve("cpu", "float32", threads, tokens, 1)


@pytest.mark.parametrize(("emulated_too", "wanted"), [(True, "bfloat16"), (False, "float32")])
def test_a_card_that_only_emulates_bfloat16_computes_in_float32(
    emulated_too: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation or emulated_too)
    monkeypatch.setattr("tercet.runtime.machine._device", lambda name: torch.device("cuda"))
    assert resolve("auto", "auto", 1, 512, 10**9).dtype is getattr(torch, wanted)


@pytest.mark.parametrize(
    ("device", "card", "wanted"), [("auto", True, "cuda"), ("cuda", True, "cuda"), ("cpu", True, "cpu"), ("auto", False, "cpu")]
)
def test_ranks_on_cards_take_one_each_and_exchange_counts_on_the_cpu(
    device: str, card: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: card)
    monkeypatch.setattr("torch.cuda.set_device", asked.append)
    monkeypatch.setattr("torch.distributed.init_process_group", asked.append)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setattr("atexit.register", lambda function: None)
    world = World.start(device)
    assert (world.rank, world.size) == (2, 4)
    assert asked == ([2, "cpu:gloo,cuda:nccl"] if wanted == "cuda" else ["gloo"])


def test_more_ranks_than_cards_and_one_card_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> None:
        raise RuntimeError("CUDA error: invalid device ordinal\nand much more")

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", refuse)
    with pytest.raises(TercetError, match=r"no GPU number 2 \(CUDA error: invalid device ordinal\): start as many as there are"):
        World.start("auto")
    with pytest.raises(TercetError, match=r"cuda:0 is one device, but torchrun started several processes: say cuda"):
        resolve("cuda:0", "auto", "auto", "auto", 1)


class TestWorldOfOne:
    def test_it_is_its_own_first_rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        world = World.start("cpu")
        assert (world.rank, world.size, world.is_main) == (0, 1, True)

    def test_sums_and_lists_are_what_it_put_in(self) -> None:
        world, value = World(), torch.tensor([1.0, 2.0])
        assert torch.equal(world.all_sum(value), value)
        assert world.gather({"a": 1}) == [{"a": 1}]
        assert world.any(True) is True and world.any(False) is False
        world.barrier()

    def test_gradients_stay(self) -> None:
        layer = nn.Linear(2, 1)
        layer(torch.ones(1, 2)).sum().backward()
        assert layer.weight.grad is not None
        before = layer.weight.grad.clone()
        World().sum_gradients(layer.parameters())
        assert torch.equal(layer.weight.grad, before)


def test_every_row_has_exactly_one_owner() -> None:
    for size in (1, 2, 3):
        rows = [row for rank in range(size) for row in World(rank, size).own_rows(7)]
        assert sorted(rows) == list(range(7))


class TestInterrupt:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_first_signal_asks_and_the_second_stops(self, number: int) -> None:
        before = signal.getsignal(number)
        with Interrupt().listening() as interrupt:
            assert not interrupt.requested
            os.kill(os.getpid(), number)
            assert interrupt.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is before

    def test_handlers_come_back_after_an_error(self) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(ZeroDivisionError), Interrupt().listening():
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGTERM) is before

    def test_in_another_thread_it_listens_to_nothing(self) -> None:
        seen: list[bool] = []

        def work() -> None:
            with Interrupt().listening() as interrupt:
                seen.append(interrupt.requested)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert seen == [False]


class TestLock:
    def test_a_held_folder_is_refused_naming_the_holder(self, tmp_path: Path) -> None:
        with (
            locked(tmp_path / "run"),
            pytest.raises(TercetError, match=rf"in use by process {os.getpid()} on {socket.gethostname()}: wait"),
            locked(tmp_path / "run"),
        ):
            raise AssertionError("two holders")
        with locked(tmp_path / "run"):
            pass  # free again

    def test_a_folder_in_which_nothing_came_to_be_goes_again(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), locked(tmp_path / "new/run"):
            raise ZeroDivisionError
        assert not (tmp_path / "new/run").exists()
        with locked(tmp_path / "new/run") as is_main:
            assert is_main
            (tmp_path / "new/run/config.yaml").touch()
        assert (tmp_path / "new/run/config.yaml").exists()

    def test_a_lock_on_a_file_without_a_name_keeps_nobody_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Opened just before its holder removed it: the lock must be taken on the file that others will see."""
        real, path = fcntl.flock, tmp_path / "run/.lock"
        calls = []

        def flock(file: Any, operation: int) -> None:
            calls.append(operation)
            if len(calls) == 1:
                path.unlink()
            real(file, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        with locked(tmp_path / "run"):
            assert len(calls) == 2 and path.exists()
            with pytest.raises(TercetError, match="in use"), locked(tmp_path / "run"):
                raise AssertionError("two holders")

    def test_other_ranks_share_the_first_ones(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "1")
        with locked(tmp_path / "run") as alone:  # a variable that a cluster left there, of one process
            monkeypatch.setenv("WORLD_SIZE", "2")
            with locked(tmp_path / "run") as is_main:
                assert alone and not is_main

    def test_a_file_system_without_locks_is_not_in_use(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def flock(file: Any, operation: int) -> None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

        monkeypatch.setattr(fcntl, "flock", flock)
        with (
            pytest.raises(TercetError, match=r"cannot be locked on this file system.*choose an output"),
            locked(tmp_path / "run"),
        ):
            pass

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(TercetError, match="cannot be written"), locked(tmp_path / "file/run"):
            pass


def test_each_vector_function_is_called_on_one_thread_before_it_is_called_on_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one thread's part of its first result may have half the digits, once in a while (tercet/runtime/machine.py)."""
    called: list[tuple[str, int, torch.dtype]] = []
    for name in ("exp", "log", "tanh", "sqrt"):

        def note(x: torch.Tensor, name: str = name) -> None:
            called.append((name, x.numel(), x.dtype))

        monkeypatch.setattr(torch, name, note)
    resolve("cpu", "float32", 1, 64, 1000).apply()
    assert set(called) == {
        (name, 1, dtype) for name in ("exp", "log", "tanh", "sqrt") for dtype in (torch.float32, torch.float64)
    }


@pytest.mark.parametrize(
    ("peak", "card", "looked"),
    [(machine.WORTH_RELEASING_MB - 1.0, False, 0), (machine.WORTH_RELEASING_MB + 1.0, False, 1), (1.0, True, 1)],
)
def test_memory_is_released_where_there_is_some(peak: float, card: bool, looked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: card)
    calls: list[int] = []
    monkeypatch.setattr(machine, "peak_memory_mb", lambda: peak)
    monkeypatch.setattr(machine.gc, "collect", lambda: calls.append(1))
    machine.release_free_memory()
    assert len(calls) == looked
