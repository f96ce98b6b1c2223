"""Screening: every reply is checked before it may touch the model, and each that is refused is recorded with why."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowssl_core.protocol import BadUpdate
from lowssl_core.protocol.codec import decode_flat, largest_payload
from lowssl_core.protocol.manifest import FloatArray, Manifest, check_flat
from lowssl_core.protocol.messages import Update, read_message
from server.aggregation.comparison import Candidate, ComparisonConfig, Measure, measure_first
from server.aggregation.quarantine import Quarantine
from server.aggregation.reply import Reason, Rejected, Screened, Verdict, blocks

# Norms of earlier rounds that help to judge a round of few replies.
_EARLIER_NORMS = 50
# A BatchNorm statistic beyond it is that of a network that diverged; pooling squares it, and must stay finite.
_LARGEST_STATISTIC = 1e9
_SMALLEST_WEIGHT = 1e-6  # of an image: a sum of such weights still divides


@dataclass(frozen=True, kw_only=True)
class ScreeningConfig:
    """What a reply must be.

    Attributes:
        max_staleness: model versions that may have come out since the one it trained from.
        max_weight: images it may count for; more are not believed, and it counts for these.
        max_growth: its delta may be this many times as long as the model's own parameters.
        comparison: how it is compared with other replies; None: each is judged for itself, as privacy demands.
    """

    max_staleness: int = 5
    max_weight: float = 100_000
    max_growth: float = 3.0
    comparison: ComparisonConfig | None = field(default_factory=ComparisonConfig)

    def __post_init__(self) -> None:
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness is {self.max_staleness}; it is a whole number from 0")
        for name in ("max_weight", "max_growth"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a number above 0")


class _Refusal(Exception):  # noqa: N818 - a verdict
    """An update fails a check."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason: Reason = reason


class Screening:
    """The one way from bytes to replies that may be aggregated.

    `begin` a round, `receive` what arrives, `close` it; the last two give verdicts, not always on what has just
    arrived: with a comparison, a round's first replies are held, a few models of memory, until there are enough to
    judge them by each other. Which ones come first decides by what the others are judged; nothing else depends on
    the order. One reply for each device and model version counts, and each update id once.
    """

    def __init__(self, config: ScreeningConfig, quarantine: Quarantine) -> None:
        self.config, self.quarantine = config, quarantine
        self._seen: dict[tuple[str, str], int] = {}  # device, update id: base version
        self._answered: dict[tuple[str, int], str] = {}
        self._norms: deque[float] = deque(maxlen=_EARLIER_NORMS)
        self._held: list[Candidate] = []
        self._measure: Measure | None = None

    def begin(self, global_flat: FloatArray, manifest: Manifest, version: int) -> None:
        """Start a round from the global model (size,) of a version; replies still held from the last one are lost."""
        check_flat(global_flat, manifest)
        for candidate in self._held:  # they have not counted
            self._answered.pop((candidate.reply.device, self._seen.pop(candidate.reply.key)))
        self._manifest, self._version = manifest, version
        self._largest_norm = self.config.max_growth * _norm(global_flat, manifest)
        self._held, self._measure = [], None
        oldest = version - self.config.max_staleness
        self._remember((device, base, id_) for (device, id_), base in self._seen.items() if base >= oldest)

    def receive(self, sender: str, data: bytes) -> list[Verdict]:
        """Judge what has arrived from `sender`, the device whose key the connection was made with."""
        update_id = None
        try:
            update = self._read(data)
            update_id = update.update_id
            candidate = self._examine(sender, update)
        except _Refusal as refusal:
            detail = str(refusal)
            return self._settle([Rejected(device=sender, update_id=update_id, reason=refusal.reason, detail=detail)])
        config = self.config.comparison
        if config is None:
            return self._settle([candidate.reply])
        if self._measure is not None:
            return self._settle([self._measure.judge(candidate, config, self._manifest)], [candidate])
        self._held.append(candidate)
        return self.close() if len(self._held) >= config.replies else []

    def close(self) -> list[Verdict]:
        """Judge the replies that are still held: no more will come, or none are needed."""
        config, held = self.config.comparison, self._held
        if config is None or not held:
            return []
        self._measure, verdicts = measure_first(held, list(self._norms), config, self._manifest)
        self._held = []
        return self._settle(verdicts, held)

    def as_dict(self) -> dict[str, Any]:
        """What outlives a round, as plain values: updates seen, norms, quarantine. Replies held are not in it."""
        held = {candidate.reply.key for candidate in self._held}
        seen = [[device, base, id_] for (device, id_), base in self._seen.items() if (device, id_) not in held]
        return {"seen": seen, "norms": list(self._norms), "quarantine": self.quarantine.as_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `as_dict` gave."""
        self._remember((device, base, id_) for device, base, id_ in state["seen"])
        self._norms = deque(state["norms"], maxlen=_EARLIER_NORMS)
        self.quarantine.restore(state["quarantine"])

    def _remember(self, rows: Iterable[tuple[str, int, str]]) -> None:
        rows = list(rows)
        self._seen = {(device, id_): base for device, base, id_ in rows}
        self._answered = {(device, base): id_ for device, base, id_ in rows}

    def _read(self, data: bytes) -> Update:
        try:
            return read_message(Update, data, max_payload=largest_payload(self._manifest))
        except BadUpdate as error:
            raise _Refusal("message", str(error)) from None

    def _examine(self, sender: str, update: Update) -> Candidate:
        """Every check that needs no other reply, the cheap ones first."""
        if update.device != sender:
            raise _Refusal("sender", f"it says it is from {update.device}")
        if sender in self.quarantine:
            raise _Refusal("quarantined", f"since {self.quarantine.held[sender]}; a person can release it")
        if update.manifest != self._manifest.hash:
            raise _Refusal("manifest", f"{update.manifest[:12]}; this run's is {self._manifest.hash[:12]}")
        staleness = self._check_version(update)
        if update.weight < _SMALLEST_WEIGHT:
            raise _Refusal("weight", f"weight {update.weight:g}; {_SMALLEST_WEIGHT:g} is the least")
        try:
            flat = decode_flat(update.payload, self._manifest)
        except BadUpdate as error:
            raise _Refusal("payload", str(error)) from None
        if (lowest := float(flat[self._manifest.variances].min(initial=0))) < 0:
            raise _Refusal("variance", f"a BatchNorm variance of {lowest:.3g}")
        if (largest := float(np.abs(flat[self._manifest.trained_size :]).max(initial=0))) > _LARGEST_STATISTIC:
            raise _Refusal(
                "statistics", f"a BatchNorm statistic of {largest:.3g}; {_LARGEST_STATISTIC:.3g} is the most"
            )
        norm = _norm(flat, self._manifest)
        if norm > self._largest_norm:
            raise _Refusal("norm", f"norm {norm:.3g}; {self._largest_norm:.3g} is the most for this model")
        weight = min(update.weight, self.config.max_weight)
        remarks = [f"{staleness} versions late"] if staleness else []
        if weight < update.weight:
            remarks.append(f"weight {update.weight:.3g} counted as {weight:.3g}")
        reply = Screened(
            device=sender,
            update_id=update.update_id,
            weight=weight,
            staleness=staleness,
            remarks=tuple(remarks),
            metrics=update.metrics,
            flat=flat,
        )
        return Candidate(reply, norm)

    def _check_version(self, update: Update) -> int:
        """The update's staleness; it is noted, so that it counts once."""
        staleness = self._version - update.base_version
        if staleness < 0:
            raise _Refusal("from the future", f"trained from version {update.base_version}; there are {self._version}")
        if staleness > self.config.max_staleness:
            raise _Refusal("too old", f"{staleness} versions late; {self.config.max_staleness} pass")
        version, key = (update.device, update.base_version), (update.device, update.update_id)
        if self._seen.get(key) == update.base_version:
            raise _Refusal("repeated", "this update has arrived before")
        if key in self._seen:
            raise _Refusal("replayed", f"its id came with version {self._seen[key]} before")
        if version in self._answered:
            raise _Refusal("answered twice", f"{self._answered[version]} was this device's answer to this version")
        self._seen[key], self._answered[version] = update.base_version, update.update_id
        return staleness

    def _settle(self, verdicts: list[Verdict], candidates: Iterable[Candidate] = ()) -> list[Verdict]:
        """Note faults, and the norms of what passes; gives the verdicts back."""
        norms = {candidate.reply.key: candidate.norm for candidate in candidates}
        for verdict in verdicts:
            if isinstance(verdict, Screened):
                if verdict.key in norms:
                    self._norms.append(verdict.clip * norms[verdict.key])
            elif verdict.is_fault:
                self.quarantine.record(verdict.device, self._version, verdict.reason)
        return verdicts


def _norm(flat: FloatArray, manifest: Manifest) -> float:
    """Length of the parameters' part, in float64."""
    trained = flat[: manifest.trained_size]
    squares = (trained[block].astype(np.float64) for block in blocks(len(trained)))
    return math.sqrt(sum(float(values @ values) for values in squares))
