"""Judging a round's replies by each other: by the median norm, weight, direction and statistics of the first few."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lowssl_core.protocol.manifest import FloatArray, Manifest
from server.aggregation.reply import Rejected, Screened, Verdict, blocks
from server.aggregation.robust import median

# BatchNorm's own: a channel that is dead on one device has no variance to compare.
_EPSILON = 1e-5
# Norms or weights of fewer have no median to speak of.
_FEWEST = 3


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """How far a reply may be from the others.

    Attributes:
        replies: how many of a round's first replies make the measure for all; they are held until then. A round with
            fewer is judged by norm and weight alone, its norms along with those of earlier rounds.
        weight_multiple: weights are capped at this multiple of the median.
        clip_multiple: deltas are shortened to this multiple of the median norm.
        reject_multiple: deltas longer than this multiple of it are refused.
        min_cosine: of a delta to the median direction of others; below it points away from them. Devices with one
            class of CIFAR-10 each have .07 to .5, a flipped sign the negative of that.
        statistics: BatchNorm means may lie this many standard deviations from the median ones, and deviations differ
            by this factor, as root mean square over channels.
    """

    replies: int = 5
    weight_multiple: float = 10.0
    clip_multiple: float = 3.0
    reject_multiple: float = 30.0
    min_cosine: float = -0.02
    statistics: float = 10.0

    def __post_init__(self) -> None:
        if self.replies < 4:
            raise ValueError(f"replies is {self.replies}; fewer than 4 cannot outvote a faulty one")
        for name in ("weight_multiple", "clip_multiple", "reject_multiple", "statistics"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a number from 1")
        if not -1 <= self.min_cosine < 1:
            raise ValueError(f"min_cosine is {self.min_cosine}; it is from -1 to below 1")


@dataclass(frozen=True)
class Candidate:
    """A reply that is sound in itself, and its delta's norm."""

    reply: Screened
    norm: float

    def reject(self, reason: Literal["norm", "direction", "statistics"], detail: str) -> Rejected:
        """Refuse it."""
        return Rejected(device=self.reply.device, update_id=self.reply.update_id, reason=reason, detail=detail)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a round's replies are judged by; None: there were too few to tell.

    Attributes:
        norm: median norm.
        weight: median weight.
        direction: (trained size,) the median direction, of length 1.
        statistics: (2, channels) medians of BatchNorm's means and variances.
    """

    norm: float | None = None
    weight: float | None = None
    direction: FloatArray | None = None
    statistics: FloatArray | None = None

    def judge(self, candidate: Candidate, config: ComparisonConfig, manifest: Manifest) -> Verdict:
        """Refuse a candidate, or let it pass, shortened and capped where it must be."""
        norm, reply = candidate.norm, candidate.reply
        if self.norm is not None and norm > config.reject_multiple * self.norm:
            return candidate.reject("norm", f"norm {norm:.3g}; the median is {self.norm:.3g}")
        if self.direction is not None and norm > 0:
            cosine = _dot(reply.flat, self.direction) / norm
            if cosine < config.min_cosine:
                return candidate.reject("direction", _cosine_detail(cosine, config))
        if self.statistics is not None:
            distance = _statistics_distance(reply.flat, self.statistics, manifest)
            if distance > config.statistics:
                detail = f"BatchNorm statistics {distance:.3g} deviations from the median; {config.statistics:.3g} pass"
                return candidate.reject("statistics", detail)
        clip, weight, remarks = 1.0, reply.weight, list(reply.remarks)
        if self.norm is not None and norm > config.clip_multiple * self.norm:
            clip = config.clip_multiple * self.norm / norm
            remarks.append(f"norm {norm:.3g} clipped to {clip * norm:.3g}")
        if self.weight is not None and weight > config.weight_multiple * self.weight:
            weight = config.weight_multiple * self.weight
            remarks.append(f"weight {reply.weight:.3g} counted as {weight:.3g}")
        return dataclasses.replace(reply, clip=clip, weight=weight, remarks=tuple(remarks))


def measure_first(
    candidates: Sequence[Candidate], earlier_norms: Sequence[float], config: ComparisonConfig, manifest: Manifest
) -> tuple[Measure, list[Verdict]]:
    """The measure that a round's first candidates make, and the verdicts on them, in their order.

    With `config.replies` candidates each one's direction is compared with the median direction of the others, for it
    would draw one that it takes part in towards itself. Those refused take no part in the measure. With fewer, there
    is no direction, and the norms of earlier rounds help out.
    """
    is_full = len(candidates) >= config.replies
    norms = [candidate.norm for candidate in candidates]
    norm = _median(norms if is_full else [*norms, *earlier_norms])
    measure = Measure(norm=norm, weight=_median([candidate.reply.weight for candidate in candidates]))
    if not is_full:
        return measure, [measure.judge(candidate, config, manifest) for candidate in candidates]

    verdicts: dict[int, Verdict] = {}
    left = []
    for index, candidate in enumerate(candidates):
        verdict = measure.judge(candidate, config, manifest)
        if isinstance(verdict, Rejected):
            verdicts[index] = verdict
        else:
            left.append(index)
    cosines = _cosines_to_others([candidates[index] for index in left], manifest)
    for index, cosine in zip(left, cosines, strict=True):
        if cosine < config.min_cosine:
            verdicts[index] = candidates[index].reject("direction", _cosine_detail(cosine, config))
    passed = [candidates[index] for index in left if index not in verdicts]
    statistics = _median_statistics(passed, manifest)
    for index in left:
        if index not in verdicts:  # direction has been judged
            verdicts[index] = dataclasses.replace(measure, statistics=statistics).judge(
                candidates[index], config, manifest
            )
    measure = dataclasses.replace(measure, statistics=statistics, direction=_median_direction(passed, manifest))
    return measure, [verdicts[index] for index in range(len(candidates))]


def _units(candidates: Sequence[Candidate], block: slice) -> FloatArray:
    """Some coordinates of the candidates' directions (K, block), each of length 1 in all; zeros stay zeros."""
    return np.stack([one.reply.flat[block] / np.float32(one.norm or 1) for one in candidates])


def _cosines_to_others(candidates: Sequence[Candidate], manifest: Manifest) -> list[float]:
    """The cosine of each candidate's direction to the coordinate median of the others'; 0 for a zero delta."""
    count = len(candidates)
    if count < _FEWEST:
        return [1.0] * count
    dots, squares = np.zeros(count), np.zeros(count)
    for block in blocks(manifest.trained_size):
        units = _units(candidates, block)
        for index, others in enumerate(medians_of_others(units)):
            dots[index] += units[index] @ others
            squares[index] += others @ others
    return [float(cosine) for cosine in dots / np.sqrt(np.where(squares > 0, squares, 1))]


def medians_of_others(rows: FloatArray) -> Iterator[NDArray[np.float64]]:
    """For each of K rows (K, N) the coordinate median (N,) of all others, from one sort."""
    ordered = np.sort(rows, axis=0)
    lower, upper = (len(rows) - 2) // 2, (len(rows) - 1) // 2
    for row in rows:
        # Without the row, what stands behind its place moves up by one.
        middle = [np.where(row <= ordered[place], ordered[place + 1], ordered[place]) for place in (lower, upper)]
        yield np.mean(middle, axis=0, dtype=np.float64)


def _median_direction(candidates: Sequence[Candidate], manifest: Manifest) -> FloatArray | None:
    if len(candidates) < _FEWEST:
        return None
    direction = np.empty(manifest.trained_size, dtype=np.float32)
    for block in blocks(manifest.trained_size):
        direction[block] = median(_units(candidates, block))
    length = math.sqrt(_dot(direction, direction))
    return direction / np.float32(length) if length > 0 else None


def _median_statistics(candidates: Sequence[Candidate], manifest: Manifest) -> FloatArray | None:
    if len(candidates) < _FEWEST or manifest.means.start == manifest.means.stop:
        return None
    medians = [
        median(np.stack([one.reply.flat[place] for one in candidates]))
        for place in (manifest.means, manifest.variances)
    ]
    return np.stack(medians).astype(np.float32)


def _statistics_distance(flat: FloatArray, statistics: FloatArray, manifest: Manifest) -> float:
    """Root mean squares over channels: of the means' shift in deviations, and the factor between deviations."""
    means, variances = statistics.astype(np.float64)
    shift = (flat[manifest.means] - means) / np.sqrt(variances + _EPSILON)
    factor = np.log((flat[manifest.variances] + _EPSILON) / (variances + _EPSILON)) / 2
    return float(max(np.sqrt(np.mean(shift**2)), np.exp(min(np.sqrt(np.mean(factor**2)), 100.0))))


def _dot(flat: FloatArray, direction: FloatArray) -> float:
    """The product of the first values of `flat` with `direction`, in float64."""
    return float(sum(flat[block].astype(np.float64) @ direction[block] for block in blocks(len(direction))))


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if len(values) >= _FEWEST else None


def _cosine_detail(cosine: float, config: ComparisonConfig) -> str:
    return f"cosine {cosine:.3f} to the others' median direction; from {config.min_cosine:g} pass"
