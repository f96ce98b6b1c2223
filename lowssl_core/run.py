"""One pre-training run from its first message to its last file: the consumer of the training loop."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

import lowssl_core
from lowssl_core.checkpoint import Checkpoint, load_checkpoint, restore, save_checkpoint, take_checkpoint
from lowssl_core.collapse import find_collapse
from lowssl_core.compute import prepare
from lowssl_core.distributed import Ranks, any_rank, barrier
from lowssl_core.encoder import load_encoder, save_encoder
from lowssl_core.errors import UserError
from lowssl_core.files import write_atomically
from lowssl_core.interruption import Interruption
from lowssl_core.journal import Journal
from lowssl_core.loader import Loader, ViewsMode
from lowssl_core.measurement import measure_views
from lowssl_core.monitor import QualityProbe
from lowssl_core.preprocess import Preprocess
from lowssl_core.recipe import Recipe
from lowssl_core.schedules import Progress
from lowssl_core.sources import open_source, open_sources
from lowssl_core.stretch import Stretch, numbers_of
from lowssl_core.train import train

CHECKPOINT = "checkpoint.safetensors"
ENCODER = "encoder.safetensors"
# Steps between two looks at the losses and at the other ranks, where looking costs a wait for the device.
STEPS_BETWEEN_LOOKS = 10
# Logged stretches in a row that must show a symptom of collapse before it is called one.
STRETCHES_OF_COLLAPSE = 3


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run happens; nothing here changes its result.

    Attributes:
        data: images to train on, each as `open_source` takes it.
        eval_data: images held out for the quality along the way, or None.
        out: the run's folder.
        resume: whether to go on from the folder's checkpoint.
        device: what it runs on.
        views: where views are made.
        workers: processes that load images.
    """

    data: Sequence[str]
    eval_data: str | None
    out: Path
    resume: bool
    device: torch.device
    views: ViewsMode
    workers: int

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: wanted a number of processes, 0 or more")


class Run:
    """A pre-training run.

    Args:
        recipe: what.
        options: where.
        ranks: this process among its peers; only the first writes and prints.

    Raises:
        UserError: data, folder or checkpoint cannot be used.
    """

    def __init__(self, recipe: Recipe, options: RunOptions, ranks: Ranks) -> None:
        self.recipe, self.options, self.ranks = recipe, options, ranks
        self._checkpoint_path = options.out / CHECKPOINT
        if self._checkpoint_path.exists() and not options.resume:
            raise UserError(
                f"--out {options.out} holds a run already; add --resume to go on with it, or take another folder"
            )
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {options.out}: not a folder that can be written: {error.strerror}") from None
        checkpoint = load_checkpoint(self._checkpoint_path) if self._checkpoint_path.exists() else None
        source = open_sources(options.data)
        queries = open_source(options.eval_data) if options.eval_data else None
        torch.manual_seed(recipe.seed)
        method = recipe.method.build(recipe.backbone, recipe.data.batch_size)
        self.method = prepare(method, options.device, recipe.compute)
        self.optimizer = recipe.optim.build(self.method)
        torch.manual_seed(recipe.seed * 1_000_003 + ranks.rank)
        self.measurement = measure_views(recipe, source, self.method.online.backbone)
        self.loader = Loader(
            source,
            recipe.views,
            self.measurement.local_size,
            recipe.data,
            seed=recipe.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            workers=options.workers,
            device=options.device,
            mode=_views_mode(options.views, checkpoint),
        )
        preprocess = Preprocess(size=recipe.views.global_size)
        self._preprocess = preprocess
        self._probe = (
            QualityProbe(self.loader.source, queries, preprocess, recipe.monitor, recipe.data.shrink_to)
            if ranks.is_first
            else None
        )
        steps = self.loader.steps_per_epoch
        self.progress = Progress(step=0, total_steps=steps * recipe.epochs, steps_per_epoch=steps)
        self._data: dict[str, Any] = {"images": len(self.loader.source), "description": source.description}
        self._seconds = 0.0
        self._resumed = checkpoint is not None
        if checkpoint:
            self._restore(checkpoint)
        self._journal: Journal | None = None
        self._stretch = Stretch()
        self._symptoms: dict[str, int] = {}
        self._known_bad = 0

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.facts["data"]["images"] != self._data["images"]:
            raise UserError(
                f"--data {' '.join(self.options.data)} has {self._data['images']} images, the run in "
                f"{self.options.out} had {checkpoint.facts['data']['images']}: give the same data, or another folder"
            )
        restore(checkpoint, self.method, self.optimizer, recipe=self.recipe)
        self.progress = checkpoint.progress
        self._seconds = checkpoint.facts["seconds"]

    def execute(self) -> int:
        """Train to the end, or until told to stop; returns the command's exit status."""
        with Interruption() as interruption, contextlib.ExitStack() as stack:
            if self.ranks.is_first:
                self._journal = stack.enter_context(Journal(self.options.out, self.progress))
                self._announce(self._journal)
            if self.progress.is_done:
                return self._finish()
            if self.progress.step == 0:
                self._measure_quality()
            reports = train(
                self.method,
                self.loader.batches(self.progress.step),
                self.optimizer,
                self.recipe.optim.schedule(self.recipe.data.batch_size),
                start=self.progress,
                alpha=self.recipe.alpha,
            )
            for report in reports:
                self.progress = report.progress
                self._seconds += report.seconds
                self._stretch.add(report)
                if self._is_time_to_look():
                    status = self._look(interruption)
                    if status is not None:
                        return status
        return 0

    def _announce(self, journal: Journal) -> None:
        """Say what is about to happen, and record it."""
        progress, views = self.progress, self.measurement
        journal.write(
            "start",
            {
                "step": progress.step,
                "recipe": self.recipe.hash(),
                "data": self._data,
                "views": dataclasses.asdict(views),
                "views_made_on": self.loader.mode,
                "device": str(self.options.device),
                "ranks": self.ranks.world_size,
                "versions": {"lowssl": lowssl_core.__version__, "torch": torch.__version__},
            },
        )
        parameters = sum(p.numel() for p in self.method.online.backbone.parameters()) / 1e6
        journal.say(
            f"{self.recipe.method.name} on {self.recipe.backbone.name} ({parameters:.1f} M parameters), "
            f"{self._data['description']}"
        )
        journal.say(
            f"views: 2 x {self.recipe.views.global_size} px, {self.recipe.views.num_locals} x {views.local_size} px; "
            f"mean(PS_l / PS_g) {views.ratio:.3f}, matched at {views.matched_size} px; made on the {self.loader.mode}"
        )
        resumed = f", resumed at step {progress.step}" if self._resumed else ""
        journal.say(
            f"{progress.total_steps} steps of {self.recipe.data.batch_size} images, {self.recipe.epochs} epochs, "
            f"on {self.ranks.world_size} x {self.options.device.type}{resumed}"
        )
        if self.options.resume and not self._resumed:
            journal.say(f"nothing to resume in {self.options.out}: starting anew")
        if progress.is_done:
            journal.say("the run is complete already")

    def _is_time_to_look(self) -> bool:
        """Whether to read losses back and ask the other ranks now: each step where that costs nothing."""
        if self.options.device.type == "cpu" and self.ranks.world_size == 1:
            return True
        step = self.progress.step
        return step % STEPS_BETWEEN_LOOKS == 0 or self._epoch_ends() or self.progress.is_done

    def _epoch_ends(self) -> bool:
        return self.progress.step % self.progress.steps_per_epoch == 0

    def _look(self, interruption: Interruption) -> int | None:
        """Between two steps: check, log, save, measure; returns an exit status if the run ends here."""
        monitor, progress = self.recipe.monitor, self.progress
        stops = any_rank(bool(interruption.signal_name))
        if any_rank(not self._is_finite(with_weights=stops or self._epoch_ends())):
            return self._stop_on_numbers()
        if len(self._stretch) >= monitor.log_every_steps or self._epoch_ends():
            self._log()
        if stops or progress.is_done or (self._epoch_ends() and progress.epoch % monitor.checkpoint_every_epochs == 0):
            self._save()
        every = monitor.quality_every_epochs
        if progress.is_done or (every and self._epoch_ends() and progress.epoch % every == 0):
            self._measure_quality()
        if progress.is_done:
            return self._finish()
        return self._stop_on_signal(interruption.signal_name) if stops else None

    def _is_finite(self, with_weights: bool) -> bool:
        """Whether the losses since the last look are numbers, and the weights too where they may be saved."""
        if not self._stretch.is_finite():
            return False
        if not with_weights:
            return True
        norms = torch._foreach_norm([p.detach() for p in self.method.parameters()])
        return bool(torch.stack(norms).isfinite().all())

    def _stop_on_numbers(self) -> int:
        bad = self._stretch.first_bad()
        if self._journal:
            numbers = numbers_of(bad) | {"images": bad.progress.step * self.recipe.data.batch_size}
            # JSON has no NaN.
            row = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
            row["step"] = bad.progress.step
            path = self.options.out / "nonfinite.json"
            write_atomically(path, lambda file: file.write(json.dumps(row, indent=2).encode()))
            kept = f"the checkpoint before it is kept: {self._checkpoint_path}"
            if not self._checkpoint_path.exists():
                kept = "no checkpoint was written before it"
            self._journal.warn(
                bad.progress,
                "not a number",
                f"the loss or the weights are NaN or infinite; {kept}; the step's report is in {path}. Usual cause: "
                "learning rate too high. Lower optim.base_lr or lengthen the warm-up",
            )
        return 1

    def _log(self) -> None:
        row = self._stretch.take(self.recipe.data.batch_size)
        if not self._journal:
            return
        self._journal.step(self.progress, self._position() | row)
        self._name_collapse(self._journal, row)
        if len(self.loader.set_aside) > self._known_bad:
            self._known_bad = len(self.loader.set_aside)
            self._journal.write("set_aside", {"step": self.progress.step, "images": self.loader.set_aside})
            self._journal.say(f"{self._known_bad} unusable images set aside so far (named in metrics.jsonl)")

    def _name_collapse(self, journal: Journal, means: dict[str, float]) -> None:
        """Warn of a symptom once, when it has lasted."""
        found = {symptom.name: symptom for symptom in find_collapse(means["loss"], self.method.chance_loss, means)}
        self._symptoms = {name: self._symptoms.get(name, 0) + 1 for name in found}
        for name, times in self._symptoms.items():
            if times == STRETCHES_OF_COLLAPSE:
                journal.warn(self.progress, name, found[name].message)

    def _save(self) -> None:
        facts = {
            "data": self._data,
            "seconds": self._seconds,
            "views": dataclasses.asdict(self.measurement),
            "views_made_on": self.loader.mode,
            "preprocess": dataclasses.asdict(self._preprocess),
            "version": lowssl_core.__version__,
        }
        checkpoint = take_checkpoint(
            self.method, self.optimizer, recipe=self.recipe, progress=self.progress, facts=facts
        )
        if self.ranks.is_first:
            save_checkpoint(self._checkpoint_path, checkpoint)

    def _measure_quality(self) -> None:
        if self._journal and self._probe:
            quality = self._probe.measure(self.method.online.backbone)
            if self.progress.step == 0:
                pixels = self._probe.measure_pixels()
                quality |= {f"pixels_{name}": value for name, value in pixels.items()}
                figures = ", ".join(f"{name} {pixels[name]:.3f}" for name in ("retrieval", "knn") if name in pixels)
                self._journal.say(f"yardstick, raw pixels: {figures}; the network as it starts:")
            if self.progress.is_done and self.method.teacher is not None:
                of_teacher = self._probe.measure(self.method.teacher.backbone)
                quality |= {f"teacher_{name}": value for name, value in of_teacher.items()}
            self._journal.quality(self.progress, self._position() | quality)
        barrier()

    def _position(self) -> dict[str, float]:
        progress = self.progress
        return {
            "step": progress.step,
            "epoch": progress.step / progress.steps_per_epoch,
            "images": progress.step * self.recipe.data.batch_size,
            "seconds": self._seconds,
        }

    def _stop_on_signal(self, name: str) -> int:
        if self._journal:
            self._journal.say(
                f"stopped by {name or 'a signal to another rank'} at step {self.progress.step}; "
                "the checkpoint is written: go on with --resume"
            )
        return 143 if name == "SIGTERM" else 130

    def _finish(self) -> int:
        if self._journal:
            path = self.options.out / ENCODER
            encoder = load_encoder(self._checkpoint_path)
            save_encoder(path, encoder.backbone, encoder.info)
            self._journal.write("end", self._position())
            self._journal.say(f"done: {path} (encoder), {self._checkpoint_path} (whole run)")
        return 0


def _views_mode(asked: ViewsMode, checkpoint: Checkpoint | None) -> ViewsMode:
    """Where views are made: as asked, but a resumed run that leaves it open goes on as it began."""
    if asked == "auto" and checkpoint is not None:
        return cast(ViewsMode, checkpoint.facts["views_made_on"])
    return asked
