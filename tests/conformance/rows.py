"""What goes wrong elsewhere, row by row, in our words; the tests of each row are found by their names."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent

NOTEBOOK = {
    "row_01": "The PPO loss is a Python float, or a new tensor made of one: no parameter gets a gradient",
    "row_02": "The reference is the policy object itself: the log ratio is 0 for ever",
    "row_03": "The KL is taken over prompt tokens, which no action changed",
    "row_04": "`kl_div` with swapped arguments, raw logits, or a mean over the vocabulary",
    "row_05": "The decoded response holds the prompt, and the prompt is put before it again",
    "row_06": "Labels include prompt and pads, or lose EOS because pad is EOS",
    "row_07": "Generation without an attention mask: pads are read as text",
    "row_08": "A GPT-2 classifier without a pad id: batches raise, or the score is read at a pad",
    "row_09": "log(sigmoid(x)): infinite from -90 on, gradient NaN",
    "row_10": "The reward model starts from base GPT-2, not from the SFT model",
    "row_11": "`Trainer` is not imported; the tokenizer has no pad token and raises",
    "row_12": "No ratio, clip, values or advantages: not PPO",
    "row_13": "Dropout while scoring, gradients through rollouts, a reward tied to no token, pad as EOS, an optimizer of a copy, "
    "top_k 50",
}

PEERS = {
    "row_01": ("TRL", "More minibatches do not mean more optimizer steps"),
    "row_02": ("TRL", "On the last batch of the data every micro-batch takes an optimizer step of its own"),
    "row_03": ("TRL", "`max_grad_norm` is accepted and never read"),
    "row_04": ("TRL, any `generate`", "A checkpoint's generation settings get into the recorded log-probabilities"),
    "row_05": ("TRL", "The score stands one slot after EOS"),
    "row_06": ("TRL", "The missing-EOS penalty looks for EOS though another token ends responses"),
    "row_07": ("TRL, DeepSpeed-Chat, torchtune", "Masks are derived from ids: with pad = EOS, end tokens in prompts are masked"),
    "row_08": (
        "Hugging Face classifiers, TRL",
        "With pad = EOS a score is the same with and without EOS; stages 2 and 3 disagree",
    ),
    "row_09": ("trlx", "The response's window runs past EOS, or leaves EOS out of the loss"),
    "row_10": ("trlx", "GAE and whitening run over padding, anew in each micro-batch"),
    "row_11": ("trlx", "Responses are decoded and tokenised again; the temperature is missing in the log-probabilities"),
    "row_12": ("DeepSpeed-Chat", "Old log-probabilities are taken with dropout on"),
    "row_13": ("DeepSpeed-Chat", "Left padding without position ids in the training forward"),
    "row_14": ("DeepSpeed-Chat", "Rollouts are greedy: PPO explores nothing"),
    "row_15": ("OpenRLHF, veRL", "Dropout is on in the update and off in what it is compared with"),
    "row_16": ("torchtune", "Whitening adds the mean back"),
    "row_17": ("TRL, torchtune, trlx, veRL", "Micro-batch means are averaged: the gradient depends on the split"),
    "row_18": ("TRL", "Whitening per rank"),
    "row_19": ("veRL (early) and forks", "The sign of the KL loss: it is maximised"),
    "row_20": ("bfloat16 everywhere", "Log-probabilities in bfloat16; sampler and training forward differ unseen"),
    "row_21": ("TRL with vLLM", "The sampler reports log-probabilities at temperature 1, the trainer uses its own"),
    "row_22": ("OpenRLHF", "Cut texts end in a false EOS in stages 1 and 2 but not in 3"),
    "row_23": ("OpenRLHF", "The prompt's length is measured on the prompt alone: merges across the seam move the mask"),
    "row_24": ("OpenRLHF", "Group estimators with one response a prompt: every advantage is 0, silently"),
    "row_25": ("TRL", "Metrics are averaged over padding"),
    "row_26": ("TRL", "Immediate EOS with micro-batches of one row: the loss is NaN"),
    "row_27": ("all with adaptive KL", "Target and horizon are not checked, the coefficient is lost on resume"),
    "row_28": ("TRL", "Packing needs one attention kernel; without it samples see each other"),
    "trap_old_log_probabilities": ("veRL", "Old log-probabilities replaced by the new ones: hides rows 4, 13, 15 and 20"),
    "trap_there_is_a_kl_penalty": ("veRL", "No KL penalty at all by default"),
    "trap_the_kl_of_a_token": ("OpenRLHF", "The KL of a token is clamped, so large departures are free"),
    "trap_evaluation_samples": ("TRL", "Evaluation samples at temperature 0.01, never at the training temperature"),
}

FILES = {"test_notebook_errors.py": tuple(NOTEBOOK), "test_peer_errors.py": tuple(PEERS)}


def names_in(file: str) -> list[str]:
    """Names of the test functions of a file in this folder, in their order."""
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def names_of(file: str, row: str) -> list[str]:
    """The tests of one row."""
    return [name for name in names_in(file) if name.startswith(f"test_{row}_")]
