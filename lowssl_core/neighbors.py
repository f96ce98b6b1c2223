"""Nearest neighbors by cosine, exact and in bounded memory, and the accuracy of their weighted vote."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lowssl_core.spectra import Features, blocks

_LOW_BITS = 0xFFFFFFFF


def nearest(
    bank: Features,
    queries: Features,
    k: int,
    *,
    device: torch.device | str = "cpu",
    bank_chunk: int = 16384,
    query_chunk: int = 256,
    on_chunk: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """The `k` rows of the bank nearest to each query by cosine, all of a smaller bank; equally near ones in its order.

    The bank is read once, a chunk at a time, so it may be a np.memmap. Memory: four chunks of the bank, float32, 16
    bytes for each pair of a bank's and a queries' chunk, and some 30 bytes for each of the M x k found: about 800 MB
    for a bank of ImageNet's size in 1,280 dimensions with 50,000 queries and k = 200, beside the pages of a mapped
    file, which the system takes back when it needs them.

    Args:
        bank: features (N, D), of any lengths; fewer than 2^32.
        queries: features (M, D).
        k: how many, from 1.
        device: where similarities are computed.
        bank_chunk: how many of the bank are compared at a time.
        query_chunk: how many queries are compared at a time.
        on_chunk: called after each chunk of the bank with how many of it have been compared so far.

    Returns:
        Cosines (M, k) float32 and indices (M, k) int64, on the CPU, the nearest first.

    Raises:
        ValueError: an empty bank or no queries, k below 1, or features with NaN or infinity.
    """
    if min(len(bank), len(queries), k) < 1:
        raise ValueError(f"{k} nearest of {len(bank)} to {len(queries)} queries; expected one or more of each")
    found = list(torch.split(torch.empty(len(queries), 0, dtype=torch.int64, device=device), query_chunk))
    compared = 0
    for rows in blocks(bank, bank_chunk):
        known = _units(rows, device).T
        places = torch.arange(compared, compared + len(rows), device=device)
        for index, asked in enumerate(blocks(queries, query_chunk)):
            keys = _keys(_units(asked, device) @ known, places)
            best = keys.topk(min(k, len(rows))).values
            merged = torch.cat([found[index], best], dim=1)
            found[index] = merged.topk(min(k, merged.shape[1])).values
        compared += len(rows)
        if on_chunk is not None:
            on_chunk(compared)
    return _from_keys(torch.cat(found).cpu())


def knn_accuracies(
    bank: Features,
    bank_labels: Tensor,
    queries: Features,
    query_labels: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
    bank_chunk: int = 16384,
    query_chunk: int = 256,
    on_chunk: Callable[[int], None] | None = None,
) -> dict[int, float]:
    """For each k, the share of queries whose class wins the vote of their k nearest, each weighing exp(cosine / T).

    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018), section 3.4. Among
    equally near ones the first of the bank vote, and among equal votes the lowest class wins. All k come from one
    search for the largest (`nearest`, which also says what memory it takes).

    Args:
        bank: features (N, D), of any lengths; a bank smaller than k votes whole.
        bank_labels: (N,) classes from 0, int64.
        queries: features (M, D).
        query_labels: (M,) classes from 0, int64; one that the bank lacks is never found.
        ks: how many vote.
        temperature: T.
        device: where similarities are computed.
        bank_chunk: as in `nearest`.
        query_chunk: as in `nearest`.
        on_chunk: as in `nearest`.

    Raises:
        ValueError: labels that are not one for each feature or below 0, a temperature or a k out of range, an empty
            bank or no queries, or features with NaN or infinity.
    """
    for features, labels in ((bank, bank_labels), (queries, query_labels)):
        if labels.shape != (len(features),):
            raise ValueError(f"{len(features)} features and labels of shape {tuple(labels.shape)}: not one each")
    if not ks or min(ks) < 1 or not temperature > 0:
        raise ValueError(f"ks are {tuple(ks)} and the temperature is {temperature}; expected from 1 and above 0")
    cosines, indices = nearest(
        bank,
        queries,
        max(ks),
        device=device,
        bank_chunk=bank_chunk,
        query_chunk=query_chunk,
        on_chunk=on_chunk,
    )
    bank_labels, query_labels = bank_labels.cpu(), query_labels.cpu()
    if min(int(bank_labels.min()), int(query_labels.min())) < 0:
        raise ValueError("a label is below 0; classes count from 0")
    classes = 1 + max(int(bank_labels.max()), int(query_labels.max()))
    right = dict.fromkeys(ks, 0)
    chunks = (torch.split(rows, query_chunk) for rows in (cosines, indices, query_labels))
    for similarity, neighbors, labels in zip(*chunks, strict=True):
        voters = bank_labels[neighbors]
        # Less the nearest one's: the same vote, and no temperature is so low that all weights become 0.
        weights = ((similarity.double() - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(labels), classes, dtype=torch.float64)
        counted = 0
        for k in sorted(right):
            votes.scatter_add_(1, voters[:, counted:k], weights[:, counted:k])
            counted = k
            right[k] += int((votes.argmax(dim=1) == labels).sum())
    return {k: count / len(queries) for k, count in right.items()}


def knn_accuracy(
    bank: Features,
    bank_labels: Tensor,
    queries: Features,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """`knn_accuracies` for one k, today's standard if nothing is said."""
    return knn_accuracies(bank, bank_labels, queries, query_labels, ks=(k,), temperature=temperature)[k]


def _units(rows: Tensor, device: torch.device | str) -> Tensor:
    return F.normalize(rows.to(device).float(), dim=-1)


def _keys(similarity: Tensor, places: Tensor) -> Tensor:
    """One whole number for each similarity (B, C), float32, of which no two of a row are alike.

    Numbers order as similarities do and, among equal ones, from the first place to the last, where a search among
    similarities may return any of the equal ones. The upper half holds the similarity's bits, those below the sign
    turned over where it is negative; the lower half holds its place (C,), counted down. `similarity` is used up.
    """
    bits = similarity.add_(0.0).view(torch.int32)  # +0, as -0 would come after it
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return bits.long().bitwise_left_shift_(32).bitwise_or_(_LOW_BITS - places)


def _from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities and places that `_keys` made into `keys`."""
    bits = (keys >> 32).int()
    bits ^= (bits >> 31) & 0x7FFFFFFF
    return bits.view(torch.float32), _LOW_BITS - (keys & _LOW_BITS)
