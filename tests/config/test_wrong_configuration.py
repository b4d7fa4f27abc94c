"""Wrong configurations: each gives one message that names the key, what was found and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tercet.config import load_config
from tercet.types import TercetError

G = "model: {name: gpt2}\n"

# What the file says, and parts that the message must have.
WRONG: list[tuple[str, list[str]]] = [
    ("", ["expected sections", "an empty file", "tercet init"]),
    ("[1, 2]", ["expected sections", "list"]),
    ("just words", ["expected sections", "str"]),
    ("model: [", ["line 1", "not valid YAML"]),
    (G + "\tseed: 1", ["line 2", "not valid YAML"]),
    ("a: 1\n---\nb: 2", ["not valid YAML", "another document"]),
    ("a: \x00", ["not valid YAML", "special characters"]),
    ("a: !!python/object/apply:os.system [x]", ["not valid YAML", "could not determine a constructor"]),
    ("model: &a {name: *a}", ["not valid YAML", "recursive"]),
    (G + "seed: 1\nseed: 2", ["'seed'", "given twice", "remove one"]),
    (G + "ppo: {kl: {coef: 1, coef: 2}}", ["'coef'", "given twice"]),
    ("seed: 1", ["model is missing", "the pretrained model"]),
    ("1: 2\nmodel: {name: gpt2}", ["1: Keys should be strings"]),
    ("model: {}", ["model: exactly one of name and scratch", "neither is set", "scratch: {}"]),
    ("model: {name: gpt2, scratch: {}}", ["model: exactly one of name and scratch", "both are set"]),
    ("model: {scratch: {}}", ["model.scratch needs text", "data.pretrain or data.sft"]),
    (G + "data: {pretrain: a.jsonl}", ["data.pretrain", "model.name", "model.scratch"]),
    ("model: {scratch: {vocab_size: 100}}", ["model.scratch.vocab_size", "260", "found 100"]),
    ("model: {name: 3}", ["model.name", "string", "found 3"]),
    ("model: 3", ["model:", "found 3"]),
    ("model: {name: g, template: chatml}", ["model.template", "'plain' or 'chat'", "found 'chatml'"]),
    ("model: {name: g, trust_remote_code: maybe}", ["model.trust_remote_code", "boolean", "'maybe'"]),
    ("model: {name: g, options: {}}", ["model.options: unknown key", "did you mean model.scratch.options?"]),
    (G + "sftt: {epochs: 1}", ["sftt: unknown key; did you mean sft?"]),
    (G + "sft: {epoch: 1}", ["sft.epoch: unknown key; did you mean sft.epochs?"]),
    (G + "ppo: {kl: {coeff: 1}}", ["ppo.kl.coeff: unknown key; did you mean ppo.kl.coef?"]),
    (G + "ppo: {kl_coef: 1}", ["ppo.kl_coef: unknown key; did you mean ppo.kl.coef?"]),
    (G + "gae_lambda: 1", ["gae_lambda: unknown key; did you mean ppo.gae_lambda?"]),
    (G + "checkpoint: {zzz: 1}", ["checkpoint.zzz: unknown key; known here: every, every_minutes, keep"]),
    (G + "ppo: {rewards: [{wieght: 1}]}", ["ppo.rewards.0.wieght", "did you mean ppo.rewards.0.weight?"]),
    (G + "ppo: {kl: 0.1}", ["ppo.kl: expected a section (found 0.1), whose keys are coef, "]),
    (G + "ppo: {rewards: [{kind: stage}, 5]}", ["ppo.rewards.1: expected a section (found 5), whose keys are kind, "]),
    (G + "ppo: {best_kl_budget: 10}", ["best_kl_budget is set but evaluate_every is 0", "try evaluate_every: 10"]),
    (
        G + "evaluation: {greedy: true}\nppo: {best_kl_budget: 9, evaluate_every: 1}",
        ["best_kl_budget", "evaluation.greedy", "remove one"],
    ),
    (G + "ppo: {best_kl_budget: 0, evaluate_every: 1}", ["ppo.best_kl_budget", "greater than 0"]),
    (G + "evaluation: {policies: {sft: a}}", ["policies: the name 'sft' means something else already", "my_sft"]),
    (G + "evaluation: {judges: {repetition: {kind: stage}}}", ["judges: the name 'repetition' means something else already"]),
    (G + "evaluation: {judges: {combined: {kind: stage}}}", ["judges: the name 'combined' means something else already"]),
    (G + "evaluation: {judges: {eval_combined: {kind: stage}}}", ["judges: the name 'eval_combined' means something else"]),
    (G + "evaluation: {policies: {ppo_combined: a}}", ["policies: the name 'ppo_combined' is that of a column", "rename it"]),
    (G + "evaluation: {judges: {mine_std: {kind: stage}}}", ["judges: the name 'mine_std' ends as a figure's spread"]),
    (G + "evaluation: {policies: {ppo_score: a}}", ["policies: the name 'ppo_score' is that of a column", "rename it"]),
    (G + "evaluation: {policies: {'a b': a}}", ["policies: the name 'a b' should be letters"]),
    (G + "evaluation: {policies: {mine: a}, judges: {mine: {kind: stage}}}", ["policies: the name 'mine'", "no judge's name"]),
    (
        G + "evaluation: {judges: {mine: {functon: 'a:b'}}}",
        ["evaluation.judges.mine.functon", "did you mean evaluation.judges.mine.function?"],
    ),
    (G + "seed: -1", ["seed", "greater than or equal to 0", "found -1"]),
    (G + "seed: 1.5", ["seed", "integer", "found 1.5"]),
    (G + "seed: 4294967296", ["seed", "less than 2147483648"]),
    (G + "seed:", ["seed", "integer", "None"]),
    (G + "sft: {epochs: yes}", ["sft.epochs", "true/false"]),
    (G + "sft: {epochs: 0}", ["sft.epochs", "greater than or equal to 1", "found 0"]),
    (G + "sft: {epochs: many}", ["sft.epochs", "integer", "'many'"]),
    (G + "sft: {learning_rate: .inf}", ["sft.learning_rate", "finite"]),
    (G + "sft: {learning_rate: .nan}", ["sft.learning_rate"]),
    (G + "ppo: {learning_rate: 0}", ["ppo.learning_rate", "'auto' or a number above 0", "found 0"]),
    (G + "ppo: {value_learning_rate: .inf}", ["ppo.value_learning_rate", "'auto' or a number above 0"]),
    (G + "sft: {learning_rate: 0}", ["sft.learning_rate", "greater than 0"]),
    (G + "sft: {dropout: 1}", ["sft.dropout", "less than 1"]),
    (G + "sft: {schedule: step}", ["sft.schedule", "'linear', 'cosine' or 'constant'"]),
    (G + "sft: 3", ["sft:", "found 3"]),
    (G + "data: {held_out: 0.9}", ["data.held_out", "less than or equal to 0.5", "found 0.9"]),
    (G + "data: {sft: ''}", ["data.sft", "at least 1 character"]),
    (G + "data: {sft: [a, b]}", ["data.sft", "string"]),
    (G + "data: {eval_sft: a}", ["data: eval_sft is set but sft is empty", "set sft"]),
    (G + "data: {eval_comparisons: a}", ["data: eval_comparisons is set but comparisons is empty"]),
    (G + "ppo: {minibatch_size: 96}", ["ppo: minibatch_size (96) must divide rollout_batch_size (128): try 64"]),
    (G + "ppo: {minibatch_size: 500}", ["minibatch_size (500) must divide rollout_batch_size (128): try 128"]),
    (G + "ppo: {missing_eos_score: -1}", ["missing_eos_penalty and missing_eos_score", "missing_eos_penalty: null"]),
    (G + "ppo: {missing_eos_score: -1, missing_eos_penalty: 0}", ["are both set", "missing_eos_penalty: null"]),
    (G + "ppo: {truncate_after: 64}", ["truncate_after (64) must be below max_new_tokens (64)"]),
    (
        G + "ppo: {iterations: 20, value_warmup_iterations: 20}",
        ["value_warmup_iterations (20) must be below iterations (20)", "try 2"],
    ),
    (G + "ppo: {clip_range: 1}", ["ppo.clip_range", "less than 1"]),
    (G + "ppo: {gamma: 1.1}", ["ppo.gamma", "less than or equal to 1"]),
    (G + "ppo: {kl: {controller: adaptive, coef: 0}}", ["ppo.kl: coef is 0", "try 0.05"]),
    (
        G + "ppo: {kl: {controller: adaptive, horizon: 25}}",
        ["ppo: kl.horizon (25) must exceed a fifth of rollout_batch_size (128)", "try 10000"],
    ),
    (
        G + "ppo: {rollout_batch_size: 100, kl: {controller: adaptive, horizon: 20}}",  # exactly a fifth is too short as well
        ["kl.horizon (20) must exceed a fifth of rollout_batch_size (100)"],
    ),
    (G + "ppo: {rewards: [{weight: 0}]}", ["ppo", "every score would be the same", "give one of them a weight"]),
    (G + "ppo: {rewards: {kind: stage}}", ["ppo.rewards", "list", "a single mapping: put [ ] around it"]),
    (G + "reward: {normalise_samples: 1}", ["reward", "one response has no standard deviation", "0 for none"]),
    (G + "ppo: {rewards: [{kind: function}]}", ["ppo.rewards.0: kind: function needs function"]),
    (G + "ppo: {rewards: [{kind: classifier}]}", ["ppo.rewards.0: kind: classifier needs model"]),
    (G + "ppo: {rewards: [{function: 'a:b'}]}", ["function is set but kind is stage", "kind: function"]),
    (G + "ppo: {rewards: [{label: 1}]}", ["label is set but kind is stage"]),
    (G + "ppo: {rewards: {kind: stage}}", ["ppo.rewards", "list"]),
    (G + "ppo: {stop: END}", ["ppo.stop", "list", "'END'"]),
    (G + "ppo: {stop: ['']}", ["ppo", "stop has an empty text", "leave it out"]),
    (G + "ppo: {stop: [1]}", ["ppo.stop.0", "string", "found 1"]),
    (G + "evaluation: {main_group: known}", ["main_group is 'known' but group_by is empty"]),
    (G + "evaluation: {judges: {kl: {kind: stage}}}", ["judges", "'kl'", "my_kl"]),
    (G + "machine: {threads: 0}", ["machine.threads", "'auto' or a whole number of at least 1", "found 0"]),
    (G + "machine: {threads: all}", ["machine.threads", "'auto'", "found 'all'"]),
    (G + "machine: {microbatch_tokens: 1.5}", ["machine.microbatch_tokens", "'auto'", "found 1.5"]),
    (G + "machine: {dtype: float16}", ["machine.dtype", "'bfloat16'", "found 'float16'"]),
    (G + "checkpoint: {keep: 0}", ["checkpoint.keep", "greater than or equal to 1"]),
]


@pytest.mark.parametrize(("text", "parts"), WRONG, ids=[repr(text.removeprefix(G))[:60] for text, _ in WRONG])
def test_a_wrong_file(text: str, parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(TercetError) as caught:
        load_config(file)
    message = str(caught.value)
    assert message.startswith(str(file)), message
    assert len(message.splitlines()) == 1, message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("ppo.kl.coef", ["expected section.key=value"]),
        ("=3", ["expected section.key=value"]),
        ("ppo..coef=3", ["expected section.key=value"]),
        ("seed.x=3", ["seed is not a section"]),
        ("ppo.stop=[", ["--set ppo.stop", "not valid YAML"]),
        ("ppo.klcoef=3", ["ppo.klcoef: unknown key; did you mean ppo.kl.coef?"]),
        ("ppo.minibatch_size=96", ["minibatch_size (96)", "try 64"]),
        ("ppo={a: 1, a: 2}", ["--set ppo", "given twice"]),
    ],
)
def test_a_wrong_override(override: str, parts: list[str]) -> None:
    with pytest.raises(TercetError) as caught:
        load_config({"model": {"name": "gpt2"}, "seed": 1}, [override])
    for part in parts:
        assert part in str(caught.value)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(G + "seed: -1\nsft: {epoch: 2}\nppo: {gamma: 3}\n")
    with pytest.raises(TercetError) as caught:
        load_config(file)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all(line.startswith(f"{file}: ") for line in lines)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TercetError, match=r"missing\.yaml: no such file; `tercet init`"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(TercetError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: {name: caf\xe9}")
    with pytest.raises(TercetError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_the_shortest_horizon_that_cannot_turn_the_coefficient() -> None:
    """0.2 * 128 = 25.6; a fixed coefficient has no horizon to check."""
    for kl in ({"controller": "adaptive", "horizon": 26}, {"horizon": 1}):
        load_config({"model": {"name": "gpt2"}, "ppo": {"kl": kl}})


def test_a_part_of_a_list_cannot_be_overridden() -> None:
    with pytest.raises(TercetError, match=r"ppo\.rewards is a list: give all of it, as in --set 'ppo\.rewards=\[\.\.\.\]'"):
        load_config({"model": {"name": "gpt2"}, "ppo": {"rewards": [{"kind": "stage"}]}}, ["ppo.rewards.0.weight=2"])
