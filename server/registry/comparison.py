"""Two versions side by side: what is said of them, their figures and files, and how alike they see the same images."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lowssl_core.export.checks import Agreement, measure_agreement
from server.registry.gate import GateSettings
from server.registry.probe import ExportedEncoder, open_probe
from server.registry.registry import Registry
from server.registry.version import ONNX, Version


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two versions.

    Attributes:
        versions: both.
        agreement: of the second's features with the first's; None where they cannot be compared.
        probe: the images that it was measured on, or why it was not.
    """

    versions: tuple[Version, Version]
    agreement: Agreement | None
    probe: str

    def sections(self) -> dict[str, dict[str, tuple[Any, Any]]]:
        """Pairs of values by section and name; None where one has no such value."""
        trees = [_sections(version) for version in self.versions]
        return {
            section: {
                name: (trees[0][section].get(name), trees[1][section].get(name))
                for name in trees[0][section] | trees[1][section]
            }
            for section in trees[0]
        }

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "versions": [version.name for version in self.versions],
            **self.sections(),
            "agreement": None if self.agreement is None else self.agreement.as_dict(),
            "probe": self.probe,
        }


def compare(
    registry: Registry,
    names: tuple[str, str],
    settings: GateSettings,
    *,
    on_step: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Compare two versions; features where both have files and are of the same width.

    Raises:
        UserError: there is no such version, a file is damaged, or the images cannot be read.
    """
    first, second = registry.version(names[0]), registry.version(names[1])
    pair = (first, second)
    pruned = [version.name for version in pair if ONNX not in version.files]
    if pruned:
        return Comparison(versions=pair, agreement=None, probe=f"not measured: {pruned[0]} has no file any more")
    widths = [version.description.width for version in pair]
    if widths[0] != widths[1]:
        return Comparison(
            versions=pair, agreement=None, probe=f"not measured: features are {widths[0]} and {widths[1]} wide"
        )
    probe = open_probe(settings.probe)
    features = []
    for version in pair:
        on_step(f"embedding with {version.name}")
        encoder = ExportedEncoder(registry.fetch(version), version.description)
        features.append(torch.from_numpy(encoder.embed(probe.images)))
    agreement = measure_agreement(features[1], features[0])
    return Comparison(versions=pair, agreement=agreement, probe=probe.description)


def _sections(version: Version) -> dict[str, dict[str, Any]]:
    description = {name: value for name, value in asdict(version.description).items() if name != "version"}
    agreement = description.pop("agreement")
    head = {"state": version.state, "kind": version.kind, "parent": version.parent}
    return {
        "version": head | {"created": version.created.isoformat(timespec="seconds")},
        "description": description | {f"agreement in {name}": value for name, value in agreement.items()},
        "metrics": dict(version.metrics),
        "files": {role: f"{file.sha256[:12]}, {file.bytes:,} bytes" for role, file in version.files.items()},
    }
