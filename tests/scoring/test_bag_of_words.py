"""tercet/scoring/bag_of_words.py: the linear baseline."""

import random

import pytest
import torch

from tercet.scoring.bag_of_words import BagOfWords
from tercet.types import Comparison


def comparisons(count: int, seed: int) -> list[Comparison]:
    """Pairs in which the response with "sunny" beats the one with "rainy", among other words."""
    rng = random.Random(seed)
    filler = ("a", "day", "walk", "town", "sea")
    made = []
    for i in range(count):
        rest = " ".join(rng.choices(filler, k=4))
        made.append(Comparison(f"prompt {i}", (f"sunny {rest}", f"rainy {rest}"), (0, 1)))
    return made


def test_it_finds_the_words_that_decide_and_orders_new_pairs():
    model = BagOfWords(comparisons(60, seed=0))
    assert model.accuracy(comparisons(40, seed=1)) == 1.0
    sunny, rainy, neither = model.score_texts(["Sunny day", "rainy day", "day"]).tolist()
    assert sunny > neither > rainy


def test_labels_without_a_rule_give_chance():
    rng = random.Random(2)
    shuffled = [Comparison(c.prompt, c.responses, rng.choice([(0, 1), (1, 0)])) for c in comparisons(400, seed=3)]
    assert abs(BagOfWords(shuffled[:200]).accuracy(shuffled[200:]) - 0.5) < 0.12


def test_ties_do_not_count_and_unseen_words_score_nothing():
    tied = [Comparison("p", ("one two", "three four"), (1, 1))]
    model = BagOfWords(tied)
    assert model.accuracy(tied) == 0.5
    assert model.score_texts(["one", "", "unheard of"]).tolist() == [0.0, 0.0, 0.0]


def test_the_weights_are_the_minimum_of_the_penalised_loss():
    pairs = comparisons(30, seed=4)
    model = BagOfWords(pairs, l2=0.1)
    weights = model.weights.double().requires_grad_(True)
    better = model._matrix([c.responses[0] for c in pairs]).to_dense().double()
    worse = model._matrix([c.responses[1] for c in pairs]).to_dense().double()
    loss = torch.log1p(torch.exp(-(better - worse) @ weights)).mean() + 0.05 * (weights**2).sum()
    assert torch.autograd.grad(loss, weights)[0].abs().max().item() == pytest.approx(0.0, abs=1e-4)


def test_of_many_pairs_it_sees_an_even_share(monkeypatch):
    """Those at the end too, where alone the word is that decides; and scores do not depend on how many are scored together."""
    pairs = [Comparison("p", ("one two", "one four"), (0, 1))] * 300 + comparisons(300, seed=5)
    monkeypatch.setattr("tercet.scoring.bag_of_words.MOST_PAIRS", 40)
    model = BagOfWords(pairs)
    assert model.accuracy(comparisons(40, seed=6)) == 1.0
    texts = [text for c in pairs[::50] for text in c.responses]
    whole = model.score_texts(texts)
    monkeypatch.setattr("tercet.scoring.bag_of_words._AT_ONCE", 5)
    assert torch.equal(model.score_texts(texts), whole) and len(model.score_texts([])) == 0
