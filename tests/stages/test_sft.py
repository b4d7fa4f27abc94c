"""Stage 1 against the loss that transformers itself computes, and what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from tercet.config.training import SFTConfig
from tercet.data.batches import batch_indices
from tercet.models.roles import Policy
from tercet.stages.sft import tokenise_demonstrations, train_sft
from tercet.types import Demonstration, TercetError

RECORDS = [
    Demonstration("what is rain", "rain is water that falls from clouds"),
    Demonstration("explain sun", "sun is warm"),
    Demonstration("define kind simply", "kind"),
    Demonstration("", "happy words explain what rain is to a child"),
    Demonstration("what is short", "short is short is short is short"),
]


@pytest.fixture
def template() -> Any:
    return tiny.template_of()


def policy() -> Policy:
    return tiny.policy_of(3, vocabulary=300, positions=64, layers=2)


def train(policy: Policy, template: Any, folder: Path, held_out: Any = (), loss_on: str = "response", **options: Any) -> Any:
    tokens = options.pop("tokens", 4096)
    config = SFTConfig.model_validate({"epochs": 1, "batch_size": 5, "learning_rate": 1e-3, "max_length": 64} | options)
    figures = train_sft(
        tiny.run_of(folder, "sft", tokens=tokens), config, policy, template, RECORDS, held_out, loss_on=loss_on, seed=0
    )
    rows = [json.loads(line) for line in (folder / "sft/metrics.jsonl").read_text().splitlines()]
    return figures, rows


def transformers_loss(policy: Policy, template: Any, records: Any, loss_on: str, max_length: int = 64) -> Tensor:
    """The loss of GPT2LMHeadModel with labels, -100 on prompts and pads; right-padded with an attention mask.

    It is computed in float32, whatever the model: hence the tolerances below.
    """
    rows = [template.encode(r.prompt, r.response, max_length=max_length).row for r in records]
    width = max(len(row.ids) for row in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        first = row.prompt_len if loss_on == "response" else 0
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, first : len(row.ids)] = ids[i, first : len(row.ids)]
        mask[i, : len(row.ids)] = 1
    return policy.model(input_ids=ids, attention_mask=mask, labels=labels).loss


@pytest.mark.parametrize("loss_on", ["response", "all"])
@pytest.mark.parametrize("max_length", [64, 12])
def test_the_loss_is_that_of_transformers(tmp_path: Path, template: Any, loss_on: str, max_length: int) -> None:
    wanted = float(transformers_loss(policy(), template, RECORDS, loss_on, max_length).detach())
    _, rows = train(policy(), template, tmp_path, loss_on=loss_on, max_length=max_length)
    assert rows[0]["loss"] == pytest.approx(wanted, rel=1e-6)


def test_the_step_is_that_of_adamw_on_the_loss_of_transformers(tmp_path: Path, template: Any) -> None:
    found, wanted = policy(), policy()
    train(found, template, tmp_path)
    optimizer = torch.optim.AdamW(wanted.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.0)
    transformers_loss(wanted, template, RECORDS, "response").backward()
    torch.nn.utils.clip_grad_norm_(wanted.parameters(), 1.0)
    optimizer.step()
    assert tiny.largest_gap(tiny.weights(found), tiny.weights(wanted)) < 1e-4


def test_loss_on_all_tokens_is_another_loss(template: Any) -> None:
    """V:ptx_and_sft: a test that could not tell them apart would prove nothing."""
    losses = [float(transformers_loss(policy(), template, RECORDS, loss_on).detach()) for loss_on in ("response", "all")]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_every_whole_response_ends_with_eos_and_no_cut_one_does(template: Any) -> None:
    """Section 3, row 22."""
    store, truncated = tokenise_demonstrations(RECORDS, template, "sft", 12)
    whole, _ = tokenise_demonstrations(RECORDS, template, "sft", 64)
    cut = [length > 12 for length in whole.lengths]
    assert truncated == sum(cut) and 0 < sum(cut) < len(RECORDS)
    sequences = store.sequences(list(range(len(RECORDS))))
    for i, was_cut in enumerate(cut):
        ids = sequences.input_ids[i, : int(sequences.lengths[i])].tolist()
        assert (template.eos_id in ids) != was_cut and bool(sequences.finished[i]) != was_cut
        if not was_cut:
            assert ids[-1] == template.eos_id and ids.count(template.eos_id) == 1


def test_a_text_record_counts_every_token_but_its_first(tmp_path: Path, template: Any) -> None:
    text = RECORDS[3]
    store, _ = tokenise_demonstrations([text], template, "sft", 64)
    assert store.prompt_lens.tolist() == [1]
    ids = template.tokenizer(text.response).input_ids
    assert store.ids.tolist() == [*ids, template.eos_id]


def test_evaluation_is_the_held_out_loss_and_trains_nothing(tmp_path: Path, template: Any) -> None:
    model = policy()
    figures, rows = train(model, template, tmp_path, held_out=RECORDS[:2], batch_size=2, epochs=2, tokens=16)
    assert len(rows) == 6 and [("eval_loss" in row) for row in rows] == [False, False, True] * 2
    wanted = float(transformers_loss(model, template, RECORDS[:2], "response").detach())
    assert figures["sft.eval_loss"] == pytest.approx(wanted, rel=1e-6)
    assert figures["sft.eval_loss"] == rows[-1]["eval_loss"]
    assert figures["sft.records"] == 5 and figures["sft.truncated"] == 0
    without, _ = train(policy(), template, tmp_path / "without")
    assert "sft.eval_loss" not in without


def test_each_record_comes_once_an_epoch(tmp_path: Path) -> None:
    for epoch in range(3):
        rows = [int(i) for step in range(3) for i in batch_indices(5, 2, 0, 3 * epoch + step)]
        assert sorted(rows) == list(range(5))


def test_a_prompt_that_fills_the_length_is_an_error_with_its_row(template: Any) -> None:
    record = Demonstration("what is rain " * 10, "water", origin="data.jsonl:7")
    with pytest.raises(TercetError, match=r"data.jsonl:7: no token of the response is left.* sft.max_length is 8"):
        tokenise_demonstrations([record], template, "sft", 8)


def test_dropout_acts_while_training_and_never_in_evaluation(tmp_path: Path, template: Any) -> None:
    model = policy()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    figures, rows = train(model, template, tmp_path, held_out=RECORDS, learning_rate=1e-12)
    still = float(transformers_loss(policy(), template, RECORDS, "response").detach())
    assert figures["sft.eval_loss"] == pytest.approx(still, rel=1e-6)
    assert abs(rows[0]["loss"] - still) > 1e-3
