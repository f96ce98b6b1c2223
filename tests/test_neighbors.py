"""Nearest neighbors and their vote, against plain loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lowssl_core.neighbors import knn_accuracies, knn_accuracy, nearest

Rows = list[list[float]]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def slow_knn(bank: Rows, bank_labels: list, queries: Rows, query_labels: list, k: int, temperature: float) -> float:
    """Wu et al. 2018, section 3.4, in plain loops."""
    right = 0
    for query, label in zip(queries, query_labels, strict=True):
        neighbours = sorted(
            ((cosine(query, row), its) for row, its in zip(bank, bank_labels, strict=True)), reverse=True
        )
        votes: dict[int, float] = {}
        for similarity, its in neighbours[:k]:
            votes[its] = votes.get(its, 0) + math.exp(similarity / temperature)
        right += max(votes, key=votes.__getitem__) == label
    return right / len(queries)


def labelled(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features around three centres that overlap, and their classes."""
    generator = torch.manual_seed(seed)
    labels = torch.randint(0, 3, (size,), generator=generator)
    return torch.randn(size, 8, generator=generator) + 0.7 * torch.eye(8)[labels], labels


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_of_every_k_equal_plain_loops_however_they_are_cut(temperature: float, tmp_path: Path) -> None:
    bank, bank_labels = labelled(60, seed=1)
    queries, query_labels = labelled(33, seed=2)
    given = bank.tolist(), bank_labels.tolist(), queries.tolist(), query_labels.tolist()
    expected = {k: slow_knn(*given, k, temperature) for k in (20, 1, 5, 100)}
    assert 0.3 < min(expected.values()) < max(expected.values()) < 1
    np.save(tmp_path / "bank.npy", bank.numpy())
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    for rows in (bank, mapped):
        for bank_chunk, query_chunk in ((16384, 256), (60, 33), (7, 10), (1, 1)):
            got = knn_accuracies(
                rows,
                bank_labels,
                queries,
                query_labels,
                ks=(20, 1, 5, 100),
                temperature=temperature,
                bank_chunk=bank_chunk,
                query_chunk=query_chunk,
            )
            assert got == pytest.approx(expected)
            assert list(got) == [20, 1, 5, 100]


def test_one_k_is_that_of_several() -> None:
    sets = *labelled(50, seed=3), *labelled(40, seed=4)
    several = knn_accuracies(*sets, ks=(3, 20))
    assert knn_accuracy(*sets) == several[20]
    assert knn_accuracy(*sets, k=3) == several[3]


def test_nearest_are_the_largest_cosines_in_order() -> None:
    bank, queries = labelled(40, seed=5)[0], labelled(9, seed=6)[0]
    cosines, indices = nearest(bank, queries, 6, bank_chunk=11, query_chunk=4)
    for query, found, similarity in zip(queries.tolist(), indices.tolist(), cosines.tolist(), strict=True):
        every = [cosine(query, row) for row in bank.tolist()]
        assert found == sorted(range(40), key=lambda index: -every[index])[:6]
        assert similarity == pytest.approx([every[index] for index in found], abs=1e-6)


@pytest.mark.parametrize(
    "bank", [torch.ones(30, 4), -torch.ones(30, 4), torch.zeros(30, 4), torch.tensor([[0.0], [-0.0]]).repeat(15, 1)]
)
def test_equally_near_ones_come_in_the_banks_order_however_it_is_cut(bank: Tensor) -> None:
    """Cosines of 1, -1, 0, and 0 of either sign."""
    for chunk in (30, 8, 1):
        for sign in (1, -1):
            _, indices = nearest(bank, sign * torch.ones(300, bank.shape[1]), 5, bank_chunk=chunk)
            assert indices.tolist() == [[0, 1, 2, 3, 4]] * 300


def test_of_equal_votes_the_lowest_class_wins() -> None:
    bank, labels = torch.eye(4), torch.tensor([2, 1, 3, 0])
    query = torch.tensor([[1.0, 1, 1, 0]])
    assert knn_accuracies(bank, labels, query, torch.tensor([1]), ks=(1, 3)) == {1: 0.0, 3: 1.0}


def test_a_vote_at_a_very_low_temperature_is_the_nearests() -> None:
    sets = *labelled(50, seed=7), *labelled(40, seed=8)
    assert knn_accuracy(*sets, k=20, temperature=1e-5) == knn_accuracy(*sets, k=1)


def test_lengths_and_rotations_change_no_vote() -> None:
    bank, bank_labels = labelled(60, seed=9)
    queries, query_labels = labelled(50, seed=10)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.manual_seed(11)))[0]
    lengths = torch.rand(60, 1, generator=torch.manual_seed(12)) + 0.1
    plain = knn_accuracies(bank, bank_labels, queries, query_labels, ks=(1, 10))
    assert knn_accuracies(lengths * bank @ turn, bank_labels, 3 * queries @ turn, query_labels, ks=(1, 10)) == plain


def test_a_class_that_the_bank_lacks_is_never_found() -> None:
    assert knn_accuracy(torch.eye(2), torch.tensor([0, 1]), torch.eye(2), torch.tensor([0, 5])) == 0.5


def test_progress_counts_the_bank() -> None:
    done: list[int] = []
    nearest(torch.eye(10), torch.eye(10)[:3], 2, bank_chunk=4, query_chunk=2, on_chunk=done.append)
    assert done == [4, 8, 10]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bank_labels": torch.zeros(9, dtype=torch.long)}, "10 features and labels of shape .9,.: not one each"),
        ({"query_labels": torch.full((4,), -1)}, "below 0"),
        ({"ks": (5, 0)}, "expected from 1 and above 0"),
        ({"ks": ()}, "expected from 1 and above 0"),
        ({"temperature": 0.0}, "expected from 1 and above 0"),
        ({"bank": torch.ones(10, 3).index_fill(0, torch.tensor([6]), math.nan)}, "NaN or infinity, first in row 6"),
        ({"queries": torch.ones(0, 3), "query_labels": torch.zeros(0, dtype=torch.long)}, "to 0 queries"),
    ],
)
def test_what_cannot_be_voted_on_is_refused(changes: dict, message: str) -> None:
    given = {
        "bank": torch.ones(10, 3),
        "bank_labels": torch.zeros(10, dtype=torch.long),
        "queries": torch.ones(4, 3),
        "query_labels": torch.zeros(4, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracies(**(given | changes))
