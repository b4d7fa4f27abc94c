"""The loop that the supervised stages share: steps, checkpoints and metrics, and nothing of losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from torch import nn

from tercet.algo.schedules import learning_rate
from tercet.config.training import TrainingConfig
from tercet.data.batches import steps_per_epoch
from tercet.errors import Interrupted, TercetError
from tercet.runtime.machine import release_free_memory
from tercet.runtime.optim import Optimizer
from tercet.runtime.stage import StageRun


def train(
    run: StageRun,
    module: nn.Module,
    config: TrainingConfig,
    records: int,
    compute: Callable[[int], dict[str, float]],
    evaluate: Callable[[], dict[str, float]],
    *,
    also_before: bool = False,
) -> dict[str, float]:
    """Take the optimizer steps of a supervised stage on so many records, resuming exactly where a checkpoint left off; returns the
    figures on held-out records after the last one.

    `compute(step)` accumulates the gradients of step (counted from 0) and returns its metrics, "loss" and "tokens" among them;
    `evaluate()` returns figures on held-out records; `also_before`: the first step's row has them from before it, named ..._before.
    """
    optimizer = Optimizer(module, weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm, world=run.world)
    per_epoch = steps_per_epoch(records, config.batch_size)
    total_steps = config.epochs * per_epoch
    checkpoint = run.resume()
    start = 0
    if checkpoint is not None:
        optimizer.load_weights(checkpoint.tensors["model"])
        optimizer.load_state(checkpoint.tensors["optimizer"])
        start = checkpoint.step
    eval_every = config.eval_every or per_epoch
    skipped = checkpoint.values["skipped"] if checkpoint else 0
    release_free_memory()
    before = {f"{name}_before": value for name, value in evaluate().items()} if also_before and start == 0 else {}
    figures: dict[str, float] | None = None
    module.train()
    with run.progress(total_steps, start) as bar:
        for step in range(start, total_steps):
            began = time.perf_counter()
            metrics = compute(step)
            rate = learning_rate(step, total_steps, config.learning_rate, config.schedule, config.warmup_steps, min_ratio=0.1)
            norm = optimizer.step(rate)
            skipped += not math.isfinite(norm)
            _stop_if_broken(run.name, skipped, metrics["loss"])
            seconds = time.perf_counter() - began
            row = {
                "step": step + 1,
                "epoch": (step + 1) / per_epoch,
                **metrics,
                "learning_rate": rate,
                "grad_norm": norm,
                **(before if step == 0 else {}),
            }
            if skipped:
                row["skipped"] = skipped
            if (step + 1) % eval_every == 0 or step + 1 == total_steps:
                module.eval()
                figures = evaluate()
                row |= figures
                module.train()
            run.log(row, {"seconds": seconds, "tokens_per_s": metrics["tokens"] / seconds})
            bar.advance(
                **{name: value for name, value in row.items() if name in ("loss", "accuracy", "eval_loss", "eval_accuracy")}
            )
            last, stopping = step + 1 == total_steps, run.world.any(run.interrupt.requested)
            if run.due(step + 1) or stopping or last:
                run.save(step + 1, {"skipped": skipped}, {"model": optimizer.weights(), "optimizer": optimizer.state()})
            if stopping and not last:
                raise Interrupted
    module.eval()
    return evaluate() if figures is None else figures  # None: the stage was resumed after its last step


def _stop_if_broken(stage: str, skipped: int, loss: float) -> None:
    """A step whose gradient is not finite is skipped and counted; a run of them means that training has broken down."""
    if skipped >= 10:
        section = "reward" if stage == "judge" else stage
        raise TercetError(
            f"{stage}: {skipped} steps had a gradient that is not finite (last loss {loss}) and were skipped; the last checkpoint is kept. "
            f"Lower {section}.learning_rate or set machine.dtype: float32"
        )
