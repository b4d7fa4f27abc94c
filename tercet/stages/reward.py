"""Stage 2: the reward model, trained on comparisons with the ranking loss, then normalised on samples of the SFT policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tercet.algo.losses import counted_prompts, normalisation, ranking_loss
from tercet.algo.statistics import by_group, cluster_interval, of_a_share
from tercet.config.training import RewardConfig
from tercet.data.batches import TokenStore, batch_indices, in_parts, microbatches, microbatches_grouped
from tercet.data.template import Template, tokenise
from tercet.models.roles import ScoreModel
from tercet.runtime.stage import StageRun
from tercet.scoring.model import scores_of
from tercet.stages.supervised import train
from tercet.types import Comparison, Sequences, TercetError

AT_ONCE = 1_000  # comparisons in one table of held-out pairs


@dataclass
class RankedStore:
    """Tokenised comparisons: comparison g owns the rows starts[g] .. starts[g + 1] of `store`; ranks are aligned with rows."""

    store: TokenStore
    starts: NDArray[np.int64]
    ranks: Tensor
    margins: Tensor
    truncated: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rows(self, comparisons: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor]:
        """The rows of those comparisons, and for each row its comparison's place among them."""
        spans = [np.arange(self.starts[g], self.starts[g + 1]) for g in comparisons]
        groups = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
        return np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64), torch.from_numpy(groups)


def train_reward_model(
    run: StageRun,
    config: RewardConfig,
    reward_model: ScoreModel,
    template: Template,
    train_records: Sequence[Comparison],
    held_out: Sequence[Comparison],
    *,
    seed: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Train `reward_model` in place. Returns figures for the summary and a record of each held-out comparison's scores."""
    data = tokenise_comparisons(train_records, template, config.max_length)
    eval_data = tokenise_comparisons(held_out, template, config.max_length)
    require_preference(train_records)
    lengths = data.store.lengths

    def compute(step: int) -> dict[str, float]:
        chosen = batch_indices(len(data), config.batch_size, seed, step).numpy()
        rows, groups = data.rows(chosen)
        count = max(1, counted_prompts(data.ranks[rows], groups))
        own = chosen[run.world.own_rows(len(chosen))]
        sums = torch.zeros(3, dtype=torch.float64)
        for part in microbatches_grouped([lengths[data.rows([g])[0]] for g in own], run.machine.microbatch_tokens):
            loss, correct, pairs = _losses(reward_model, data, own[part])
            (loss / count).backward()
            sums += torch.stack([loss.detach().cpu().double(), correct, pairs])
        loss_sum, correct_sum, pair_sum = run.world.all_sum(sums).tolist()
        accuracy = correct_sum / pair_sum if pair_sum else 0.5
        return {"loss": loss_sum / count, "accuracy": accuracy, "tokens": int(lengths[rows].sum())}

    scores = torch.zeros(len(eval_data.store), dtype=torch.float64)  # of the held-out responses, by the last evaluation

    def evaluate() -> dict[str, float]:
        scores.copy_(score_responses(run, reward_model, eval_data))
        return _evaluation(eval_data, scores)

    last = train(run, reward_model, config, len(data), compute, evaluate)
    pairs = score_pairs(eval_data, scores)
    preferring = sum(record.prefers for record in train_records)
    figures = {"reward.comparisons": preferring, "reward.truncated": data.truncated / len(data.store)}
    figures |= {f"reward.{name}": value for name, value in last.items()}
    if pairs:
        low, high = accuracy_interval(pairs, seed)
        figures |= {"reward.eval_pairs": len(pairs), "reward.eval_accuracy_low": low, "reward.eval_accuracy_high": high}
    return figures, pairs


def require_preference(records: Iterable[Comparison]) -> None:
    """TercetError if every comparison is a tie."""
    if not any(record.prefers for record in records):
        raise TercetError(
            "data.comparisons: every comparison is a tie, so there is nothing to learn: give some with a preference"
        )


def tokenise_comparisons(records: Sequence[Comparison], template: Template, max_length: int) -> RankedStore:
    """Each response of each comparison as a token row."""
    texts = [(record.prompt, response, record.origin) for record in records for response in record.responses]
    store, truncated = tokenise(template, texts, "reward", max_length)
    starts = np.cumsum([0, *(len(record.responses) for record in records)], dtype=np.int64)
    ranks = torch.tensor([rank for record in records for rank in record.ranks], dtype=torch.float64)
    margins = torch.tensor([record.margin for record in records], dtype=torch.float32)
    return RankedStore(store, starts, ranks, margins, truncated)


def _losses(model: ScoreModel, data: RankedStore, comparisons: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """The summed ranking loss of those comparisons, pairs in the right order, pairs that are no ties."""
    rows, groups = data.rows(comparisons)
    scores = model(data.store.sequences(rows).to(model.device))
    margins = data.margins[torch.from_numpy(comparisons)].to(model.device)
    order = data.ranks[rows].unique(return_inverse=True)[1]  # integers: not every device has float64
    ranks, groups = order.to(model.device), groups.to(model.device)
    loss, _, stats = ranking_loss(scores, ranks, groups, margins=margins)
    return loss, stats["correct"].cpu().double(), stats["pairs"].cpu().double()


@torch.no_grad()
def score_responses(run: StageRun, model: ScoreModel, data: RankedStore) -> Tensor:
    """The score of every response, (N,) float64, on every rank."""
    scores = torch.zeros(len(data.store), dtype=torch.float64)
    own = np.arange(len(data.store))[run.world.own_rows(len(data.store))]
    for part in microbatches(data.store.lengths[own], run.machine.microbatch_tokens):
        scores[own[part]] = model(data.store.sequences(own[part]).to(model.device)).cpu().double()
    return run.world.all_sum(scores)


def _evaluation(data: RankedStore, scores: Tensor) -> dict[str, float]:
    """Ranking loss and accuracy by those scores; nothing where nothing is held out, or ties alone."""
    sums = torch.zeros(4, dtype=torch.float64)
    by_size = np.argsort(np.diff(data.starts), kind="stable")  # a table is as wide as the largest of its comparisons
    for part in in_parts(by_size, AT_ONCE):
        rows, groups = data.rows(part)
        loss, count, stats = ranking_loss(scores[rows], data.ranks[rows], groups, margins=data.margins[part])
        sums += torch.stack([loss, count, stats["correct"], stats["pairs"]])
    loss_sum, counted, correct, pairs = sums.tolist()
    return {"eval_loss": loss_sum / counted, "eval_accuracy": correct / pairs} if pairs else {}


def score_pairs(data: RankedStore, scores: Tensor) -> list[dict[str, Any]]:
    """Every pair that is no tie: scores (N,) and lengths of the better and the worse response, and whether the order is right."""
    tokens, pairs = data.store.lengths - data.store.prompt_lens, []
    for comparison in range(len(data)):
        rows = range(data.starts[comparison], data.starts[comparison + 1])
        for better in rows:
            for worse in rows:
                if data.ranks[better] < data.ranks[worse]:
                    difference = (scores[better] - scores[worse]).item()
                    pairs.append(
                        {
                            "comparison": comparison,
                            "better": scores[better].item(),
                            "worse": scores[worse].item(),
                            "better_tokens": int(tokens[better]),
                            "worse_tokens": int(tokens[worse]),
                            "correct": 0.5 if difference == 0 else float(difference > 0),
                        }
                    )
    return pairs


def accuracy_interval(pairs: Sequence[Mapping[str, Any]], seed: int) -> tuple[float, float]:
    """95 % bootstrap interval of the accuracy; what belongs to one comparison, such as the pairs of a ranking, is drawn together."""
    correct = torch.tensor([pair["correct"] for pair in pairs], dtype=torch.float64)
    sums, counts = by_group(correct, torch.tensor([pair["comparison"] for pair in pairs]))
    return of_a_share(cluster_interval(sums, counts, seed), float(correct.mean()), len(counts))


@torch.no_grad()
def normalise(reward_model: ScoreModel, samples: Sequences, max_tokens: int) -> dict[str, float]:
    """Give the scores of the SFT policy's samples mean 0 and standard deviation 1 (Ziegler 2019)."""
    try:
        gain, bias = normalisation(scores_of(reward_model, samples, max_tokens).cpu().double())
    except ValueError as error:
        raise TercetError(
            f"the reward model cannot be normalised on {len(samples)} samples of the SFT policy ({error}): train it longer, or set "
            "reward.normalise_samples: 0"
        ) from None
    reward_model.normalise(gain, bias)
    return {"reward.normalisation_gain": gain, "reward.normalisation_bias": bias}
