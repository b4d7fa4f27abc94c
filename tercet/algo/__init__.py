"""The mathematics: tensors in, tensors out, and nothing but torch imported.

masks: what counts in a padded batch. logprobs: hidden states to log-probabilities. kl: estimators and the coefficient's
controllers. advantages: scores to rewards to advantages. losses: what the optimizer minimises. schedules: the learning rate.
statistics: figures for evaluation. What spans ranks arrives as `all_sum`, the output head as `head`.
"""

from tercet.algo import advantages, kl, logprobs, losses, masks, schedules, statistics

__all__ = ["advantages", "kl", "logprobs", "losses", "masks", "schedules", "statistics"]
