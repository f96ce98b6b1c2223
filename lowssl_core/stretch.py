"""A stretch of training: the reports between two lines of metrics, and what they come to."""

import torch

from lowssl_core.distributed import mean_over_ranks
from lowssl_core.train import Report


class Stretch:
    """The reports since the last line of metrics; losses stay on the device until somebody asks."""

    def __init__(self) -> None:
        self._reports: list[Report] = []

    def __len__(self) -> int:
        return len(self._reports)

    def add(self, report: Report) -> None:
        """Take in the report of a step."""
        self._reports.append(report)

    def is_finite(self) -> bool:
        """Whether all losses are numbers; waits for the device."""
        return bool(torch.stack([report.loss for report in self._reports]).isfinite().all())

    def first_bad(self) -> Report:
        """The first report whose loss is no number, or the last one."""
        return next((report for report in self._reports if not report.loss.isfinite()), self._reports[-1])

    def take(self, batch_size: int) -> dict[str, float]:
        """Means over steps and ranks, with images per second and the share of time waited; the stretch is empty then.

        Every rank must take its stretch together with the others.
        """
        rows = [numbers_of(report) for report in self._reports]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        device = self._reports[0].loss.device
        values = mean_over_ranks(torch.tensor(list(means.values()), dtype=torch.float64, device=device))
        seconds = sum(report.seconds for report in self._reports)
        waited = sum(report.waited for report in self._reports)
        self._reports = []
        return dict(zip(means, values.tolist(), strict=True)) | {
            "images_per_second": batch_size * len(rows) / seconds,
            "seconds_per_step": seconds / len(rows),
            "waiting": waited / seconds,
        }


def numbers_of(report: Report) -> dict[str, float]:
    """A report's numbers, read from the device."""
    return {
        "loss": float(report.loss),
        "global_loss": float(report.global_loss),
        "local_loss": float(report.local_loss),
        "learning_rate": report.learning_rate,
        "weight_decay": report.weight_decay,
        **{name: float(value) for name, value in report.signals.items()},
    }
