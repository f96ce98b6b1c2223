"""The gate before serving: an export that runs, has not collapsed, and is no worse than the version that serves."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lowssl_core.errors import UserError
from lowssl_core.export.checks import BOUNDS, PARITY_BOUND
from server.registry.probe import (
    ExportedEncoder,
    LabelledProbe,
    Probe,
    measure,
    measure_knn,
    open_labelled_probe,
    open_probe,
)
from server.registry.registry import Registry
from server.registry.report import Check, GateReport
from server.registry.version import StaleReportError, Version

# Absolute bounds: an encoder that gives all images nearly the same features, or has one direction to tell them apart.
MOST_UNIFORMITY = -0.02
LEAST_RANKME = 2.0

# Bounds relative to the version that serves.
RANKME_SHARE = 0.9
UNIFORMITY_SHARE = 0.5
ALIGNMENT_TOLERANCE = 0.1
RETRIEVAL_TOLERANCE = 0.05
KNN_TOLERANCE = 0.03


class GateSettings(Protocol):
    """What the gate needs to know; the server's settings have it."""

    @property
    def probe(self) -> Path | None:
        """Images to measure on; None: photographs that come with scikit-image and scikit-learn."""

    @property
    def probe_labelled(self) -> Path | None:
        """Class folders with a train and a held-out split for k-NN; None: no k-NN."""


@dataclass(frozen=True, kw_only=True)
class Probes:
    """What versions are measured on."""

    images: Probe
    labelled: LabelledProbe | None

    @property
    def description(self) -> str:
        """Both, in words and with the hashes of their pixels."""
        labelled = "" if self.labelled is None else f"; k-NN: {self.labelled.description}"
        return self.images.description + labelled


def judge(
    registry: Registry,
    version: Version,
    settings: GateSettings,
    *,
    on_step: Callable[[str], None] = lambda _: None,
) -> GateReport:
    """Ask whether a version may serve; nothing is changed.

    The figures come from the exported file itself, run as it would be served. Measured are 128 images and two copies of
    each: the label-free figures of `label_free_quality`, compared with those of the version that serves. Figures that
    a report already has for it on the same images are not measured again. The same file and images, the same report.

    RankMe is compared as a share of what is possible, the smaller of the number of images and the width; as every
    backbone here is wider than 128, that is the plain ratio. The other figures are of angles between features, or count
    images found, and may be compared between widths.

    Args:
        registry: which has it.
        version: which.
        settings: images to measure on.
        on_step: called with what is being done, a few words.

    Raises:
        UserError: the images cannot be read, or the version's file is damaged or missing.
    """
    path = registry.fetch(version)
    probes = Probes(
        images=open_probe(settings.probe),
        labelled=None if settings.probe_labelled is None else open_labelled_probe(settings.probe_labelled),
    )
    serving = registry.serving()
    against = None if serving is None else serving.name
    on_step(f"measuring {version.name}")
    checks, figures = [_parity(version), *_agreement(version)], {}
    try:
        figures = _measure(path, version, probes)
    except UserError as error:
        checks.insert(0, _check("runs", False, f"It does not run in ONNX Runtime as it should: {error}."))
    else:
        runs = "It runs in ONNX Runtime, and its features of all images are finite."
        checks = [_check("runs", True, runs), *checks, *_absolute(figures)]
        if serving is not None:
            on_step(f"comparing with {serving.name}, which serves")
            checks += _compared(registry, version, figures, serving, probes)
    return GateReport(version=version.name, against=against, probe=probes.description, checks=checks, figures=figures)


def judge_and_promote(
    registry: Registry,
    name: str,
    settings: GateSettings,
    *,
    who: str,
    why: str = "",
    force: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> tuple[Version, GateReport]:
    """Judge a version, and promote it if it passes or `force` says so; else refuse it. Returns it as it is then.

    It is judged again where another version came to serve meanwhile.

    Raises:
        UserError: it serves already, there is no such version, or it cannot be judged (`judge`).
    """
    while True:
        version = registry.version(name)
        if version.state == "serving":
            raise UserError(f"{name} serves already")
        report = judge(registry, version, settings, on_step=on_step)
        if not report.passed and not force:
            return registry.refuse(name, who=who, why=why, report=report), report
        try:
            return registry.promote(name, who=who, why=why, report=report), report
        except StaleReportError:
            continue


def _measure(path: Path, version: Version, probes: Probes) -> dict[str, float]:
    encoder = ExportedEncoder(path, version.description)
    figures = measure(encoder, probes.images)
    if probes.labelled is not None:
        figures["knn"] = measure_knn(encoder, probes.labelled)
    return figures


def _known_figures(registry: Registry, version: Version, probes: Probes) -> Mapping[str, float]:
    """What is known of the version that serves on these images, or else is measured now."""
    for event in reversed(registry.events(version.name)):
        if event.report is not None and event.report.figures and event.report.probe == probes.description:
            return event.report.figures
    return _measure(registry.fetch(version), version, probes)


def _parity(version: Version) -> Check:
    value = version.description.parity
    if value is not None:
        why = "The export's features must be those of the network that it was made from (largest relative difference)."
        return _check("parity", value <= PARITY_BOUND, why, value, PARITY_BOUND)
    if version.kind == "imported":
        why = (
            "It came as an ONNX file: there is no other network to compare with, and it was tried when it was adopted."
        )
        return _check("parity", True, why)
    return _check("parity", False, "Nobody compared the export with the network that it was made from.")


def _agreement(version: Version) -> Iterator[Check]:
    """fp16 and int8 against fp32, as measured at the export."""
    description = version.description
    for name, bound in BOUNDS[description.precision].items():
        words = name.replace("_", " ")
        value = description.agreement.get(name)
        if value is not None:
            why = f"Features in {description.precision} must agree with those in fp32 ({words})."
            yield _check(words, value >= bound, why, value, bound)
        else:
            passed = version.kind == "imported" and description.parity is None
            why = f"There is no fp32 to compare {description.precision} with." if passed else "It was not measured."
            yield _check(words, passed, why, None, bound)


def _absolute(figures: Mapping[str, float]) -> list[Check]:
    return [
        _at_most(
            "spread",
            figures,
            "uniformity",
            MOST_UNIFORMITY,
            "Different images must get different features (uniformity: 0 is a collapse).",
        ),
        _at_least(
            "directions", figures, "rankme", LEAST_RANKME, "More than one direction must tell images apart (RankMe)."
        ),
    ]


def _compared(
    registry: Registry, version: Version, figures: Mapping[str, float], serving: Version, probes: Probes
) -> list[Check]:
    """The checks against the version that serves, if that one can still be measured."""
    name = serving.name
    try:
        known = _known_figures(registry, serving, probes)
    except UserError as error:
        why = f"{name}, which serves, cannot be measured: {error}; only absolute bounds count."
        return [_check("comparison", True, why)]
    images = len(probes.images.images)
    possible = min(images, version.description.width) / min(images, serving.description.width)
    checks = [
        _at_least(
            "rankme",
            figures,
            "rankme",
            RANKME_SHARE * possible * known["rankme"],
            f"The effective rank of the features must be at least {RANKME_SHARE:.0%} of {name}'s.",
        ),
        _at_most(
            "uniformity",
            figures,
            "uniformity",
            UNIFORMITY_SHARE * known["uniformity"],
            f"Features must be spread at least half as evenly as {name}'s (less is better).",
        ),
        _at_most(
            "alignment",
            figures,
            "relative_alignment",
            known["relative_alignment"] + ALIGNMENT_TOLERANCE,
            f"Copies of an image must stay about as near, relative to other images, as with {name} (less is better).",
        ),
        _at_least(
            "retrieval",
            figures,
            "retrieval",
            known["retrieval"] - RETRIEVAL_TOLERANCE,
            f"Images must be found from copies of them about as often as with {name}.",
        ),
    ]
    if "knn" in figures:
        why = f"Labelled images must be classified by their neighbors about as well as with {name}."
        checks.append(_at_least("knn", figures, "knn", known["knn"] - KNN_TOLERANCE, why))
    return checks


def _at_least(name: str, figures: Mapping[str, float], figure: str, bound: float, why: str) -> Check:
    return _check(name, figures[figure] >= bound, why, figures[figure], bound)


def _at_most(name: str, figures: Mapping[str, float], figure: str, bound: float, why: str) -> Check:
    return _check(name, figures[figure] <= bound, why, figures[figure], bound)


def _check(name: str, passed: bool, why: str, value: float | None = None, bound: float | None = None) -> Check:
    return Check(name=name, passed=passed, value=value, bound=bound, why=why)
