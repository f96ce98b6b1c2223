"""Aggregators that are weighted means, folded as replies come: FedAvg with server momentum, FedBuff and L-DAWA."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from lowssl_core.protocol.manifest import FloatArray, Manifest
from server.aggregation.aggregator import Aggregator, DeltaSum, step
from server.aggregation.batchnorm import StatisticsPool
from server.aggregation.reply import Screened, blocks


@dataclass(frozen=True, kw_only=True)
class FedAvgConfig:
    """FedAvg (McMahan et al. 2017) with server momentum, FedAvgM (Hsu et al. 2019): v <- beta v + delta, w += rate v.

    Attributes:
        momentum: beta; 0 for plain FedAvg. In the long run the model moves 1 / (1 - beta) times as far as the devices
            have gone: a beta of .9 wants a rate of .1, or devices that take small steps.
        rate: the server's learning rate.
    """

    name: ClassVar[str] = "fedavg"
    momentum: float = 0.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        check_momentum(self.momentum, self.rate)

    def build(self, folder: Path) -> "FedAvg":
        """The aggregator; it keeps nothing in `folder`."""
        return FedAvg(self)


class FedAvg(Aggregator):
    """The mean of deltas, by images trained on; late ones count less by `Screened.discount`."""

    def __init__(self, config: FedAvgConfig) -> None:
        super().__init__()
        self.config = config

    def _start(self) -> None:
        self._sum, self._statistics = DeltaSum(self._manifest.trained_size), StatisticsPool(self._manifest)

    def _take(self, reply: Screened) -> None:
        weight = reply.weight * reply.discount
        self._sum.add(reply.flat, weight * reply.clip, weight)
        self._statistics.add(reply.flat, weight)

    def _move(self, new: FloatArray) -> None:
        if not self.added:
            return
        self._sum.values /= self._sum.weight
        self.carried = step_with_momentum(new, self._sum, self.carried, self.config.momentum, self.config.rate)
        self._statistics.write(new)


@dataclass(frozen=True, kw_only=True)
class FedBuffConfig:
    """FedBuff (Nguyen et al. 2022), asynchronous: w += rate / K * sum of delta / sqrt(1 + staleness).

    Attributes:
        buffer: K, replies after which the server finishes and begins again; a deadline may finish earlier, and the
            sum is then divided by the replies there are.
        rate: the server's learning rate.
    """

    name: ClassVar[str] = "fedbuff"
    buffer: int = 10
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.buffer < 1 or not 0 < self.rate < math.inf:
            raise ValueError(f"buffer is {self.buffer}, rate {self.rate}; they are from 1, and above 0")

    def build(self, folder: Path) -> "FedBuff":
        """The aggregator; it keeps nothing in `folder`."""
        return FedBuff(self)


class FedBuff(Aggregator):
    """The mean of discounted deltas, each device counting the same; BatchNorm is pooled by images."""

    def __init__(self, config: FedBuffConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def is_full(self) -> bool:
        """Whether it is time to finish."""
        return len(self.added) >= self.config.buffer

    def _start(self) -> None:
        self._sum, self._statistics = DeltaSum(self._manifest.trained_size), StatisticsPool(self._manifest)

    def _take(self, reply: Screened) -> None:
        self._sum.add(reply.flat, reply.discount * reply.clip, 1.0)
        self._statistics.add(reply.flat, reply.weight * reply.discount)

    def _move(self, new: FloatArray) -> None:
        if self.added:
            step(new, self._sum.values, self.config.rate / self._sum.weight)
            self._statistics.write(new)


@dataclass(frozen=True, kw_only=True)
class LDAWAConfig:
    """L-DAWA (Rehman et al. 2023): layer by layer, devices count by cos(W_g, W_k), renormalised by the sum."""

    name: ClassVar[str] = "l_dawa"

    def build(self, folder: Path) -> "LDAWA":
        """The aggregator; it keeps nothing in `folder`."""
        return LDAWA()


class LDAWA(Aggregator):
    """W <- sum_k c_k W_k / sum_k c_k with c_k = cos(W_g, W_k), for each layer, its weight and bias together.

    With W_k = W_g + delta_k that is W_g + sum c_k delta_k / sum c_k, which can be folded. A layer that has turned by
    more than a right angle counts 0 rather than pulling backwards; one that is zero on the server has no angle, and
    all devices count the same. Late replies count less by `Screened.discount`; BatchNorm is pooled by images.
    """

    def _start(self) -> None:
        self._layers = layers(self._manifest)
        self._sum = np.zeros(self._manifest.trained_size)
        self._weights = np.zeros(len(self._layers))
        self._statistics = StatisticsPool(self._manifest)

    def _take(self, reply: Screened) -> None:
        for index, layer in enumerate(self._layers):
            weight = reply.discount * self._cosine(reply, layer)
            self._weights[index] += weight
            for block in blocks(layer.stop - layer.start):
                place = slice(layer.start + block.start, layer.start + block.stop)
                self._sum[place] += reply.flat[place].astype(np.float64) * (weight * reply.clip)
        self._statistics.add(reply.flat, reply.weight * reply.discount)

    def _cosine(self, reply: Screened, layer: slice) -> float:
        """cos(W_g, W_k) of one layer, from 0 to 1."""
        ours = own = across = 0.0
        for block in blocks(layer.stop - layer.start):
            place = slice(layer.start + block.start, layer.start + block.stop)
            there = self._global[place].astype(np.float64)
            here = there + reply.clip * reply.flat[place]
            ours += float(there @ there)
            own += float(here @ here)
            across += float(there @ here)
        if ours == 0:
            return 1.0
        return max(0.0, across / math.sqrt(ours * own)) if own > 0 else 0.0

    def _move(self, new: FloatArray) -> None:
        for layer, weight in zip(self._layers, self._weights, strict=True):
            if weight > 0:
                self._sum[layer] /= weight
            else:
                self._sum[layer] = 0
        step(new, self._sum)
        self._statistics.write(new)


def layers(manifest: Manifest) -> list[slice]:
    """Where each layer's parameters are: entries that follow each other and differ in the last part of their name."""
    places: list[slice] = []
    last = None
    for entry in manifest.entries:
        if entry.kind != "parameter":
            break
        layer = entry.name.rpartition(".")[0]
        if layer == last:
            places[-1] = slice(places[-1].start, entry.place.stop)
        else:
            places.append(entry.place)
        last = layer
    return places


def check_momentum(momentum: float, rate: float) -> None:
    """Refuse a server momentum or learning rate that cannot be.

    Raises:
        ValueError: out of range.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum is {momentum}; it is from 0 to below 1")
    if not 0 < rate < float("inf"):
        raise ValueError(f"rate is {rate}; it is a number above 0")


def step_with_momentum(
    new: FloatArray, delta: DeltaSum, carried: FloatArray | None, momentum: float, rate: float
) -> FloatArray | None:
    """Move `new` by rate * (momentum * carried + delta), in place; returns what is to be carried on."""
    if carried is not None:
        for block in blocks(len(delta.values)):
            delta.values[block] += momentum * carried[block].astype(np.float64)
    step(new, delta.values, rate)
    return delta.values.astype(np.float32) if momentum > 0 else None
