"""The learner of a device: rounds of local training on new and remembered images, whose state outlives any kill."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch

from client.arrivals import Arrivals
from client.blending import blend
from client.continual import Continual
from client.drift import Drift
from client.folder import MEMORY
from client.intake import Intake
from client.learner_config import LearnerConfig
from client.learner_state import LearnerState
from client.memory import MemorySource, ReplayMemory
from client.rounds import Outcome, Round, RoundTask, draws, plan_round
from lowssl_core.assembly import PixelBatch, assemble_on
from lowssl_core.checkpoint import optimizer_tensors, restore_optimizer, tensors_below
from lowssl_core.compute import prepare
from lowssl_core.errors import UserError
from lowssl_core.measurement import measure_views
from lowssl_core.order import Stream
from lowssl_core.preprocess import Preprocess
from lowssl_core.protocol.manifest import FloatArray, check_flat, delta_of, manifest_of, pack, unpack
from lowssl_core.recipe import Recipe, differences, recipe_from_dict
from lowssl_core.schedules import Progress
from lowssl_core.tensor_file import read_sealed, write_sealed
from lowssl_core.train import Report, train
from lowssl_core.views import Views, normalize

FORMAT = "lowssl-learner-1"
STATE = "learner.safetensors"

# A stream of images has no end that a schedule could aim at. So far away, every cosine stays at its beginning: the
# learning rate is constant after its warm-up, as it must be to follow what changes, and so are weight decay and DINO's
# momentum.
HORIZON = 2**40


class TrainingDivergedError(Exception):
    """The loss or the weights are no numbers; the last state written is from before."""


class Learner:
    """Trains a recipe's method round by round on the images that arrive at a device and those it remembers.

    A round is `begin_round`, `steps` (paused by not asking for the next one), `delta`, `finish_round`. Between any two
    of its calls, and at every write in them, the state on disk is one from which a new learner on the same folder goes
    on: with the same weights, to the bit, as if nothing had happened. What is private to the method (queue, center,
    moving average), the optimizer, the clock and lambda are part of it and survive rounds.

    One learner works on a folder at a time, in one thread. After an OSError (a full disk) the learner in memory is no
    longer what is on disk: make a new one.

    Args:
        recipe: what is trained and how.
        config: what a device adds.
        arrivals: where images come from.
        state_dir: where the state is, `learner.safetensors` and the memory.

    Attributes:
        method: the recipe's method.
        manifest: what of it travels.
        memory: the images remembered.
        progress: the clock.
        state: what else it knows: the round, and whether it is open.

    Raises:
        UserError: a state of another recipe, or a damaged one.
    """

    def __init__(self, recipe: Recipe, config: LearnerConfig, arrivals: Arrivals, state_dir: Path) -> None:
        self.recipe, self.config, self.arrivals = recipe, config, arrivals
        self._path = state_dir / STATE
        self.memory = ReplayMemory(state_dir / MEMORY, config.memory)
        torch.manual_seed(recipe.seed)
        method = recipe.method.build(recipe.backbone, recipe.data.batch_size)
        self.method = prepare(method, torch.device("cpu"), recipe.compute)
        self.continual = Continual(self.method, config.continual)
        self.optimizer = recipe.optim.build(self.continual)
        self.manifest = manifest_of(self.method)
        self.progress = Progress(step=0, total_steps=HORIZON, steps_per_epoch=config.steps_per_epoch)
        self.state = LearnerState()
        self._base: FloatArray | None = None
        self._drift = Drift(config.drift)
        preprocess = Preprocess(size=recipe.views.global_size)
        self._intake = Intake(
            arrivals,
            self.memory,
            self.continual.encoder,
            self.method.online.width,
            preprocess,
            side=recipe.data.shrink_to or preprocess.resize,
        )
        if self._path.exists():
            self._restore()
            if self.state.is_finishing or (self.state.is_open and not self._is_as_planned()):
                self._settle()

    def close(self) -> None:
        """Close the memory; what was trained since the last write is lost, unless `save` wrote it."""
        self.memory.close()

    def begin_round(self, arrived: FloatArray | None, task: RoundTask) -> Round:
        """Take over a global model, take in what is new in the folder, and plan a round.

        Args:
            arrived: (size,) the global model, a flat array as the manifest says; None: train on alone. It is taken over
                whole until a round was trained past the warm-up, then blended with the device's own weights.
            task: what is asked.

        Raises:
            ValueError: a round is open, or an array that is not the manifest's.
            UserError: the images' folder is gone.
            OSError: the disk is full.
        """
        state, config = self.state, self.config
        if state.is_open:
            raise ValueError("a round is open: finish it or abandon it")
        # More than are taken, for some may be bad or known.
        self.arrivals.rescan(examine=4 * config.budget.new_images)
        mu = self._take_over(arrived)
        self._intake.take_in(self.progress.step, limit=config.budget.new_images, refresh=config.refresh_images)
        reading = self._drift.update(self._intake.distances())
        stats = self.memory.stats()
        state.round = plan_round(
            task,
            config.budget,
            first_step=self.progress.step,
            batch_size=self.recipe.data.batch_size,
            images=(stats.staged, stats.images),
            mu=mu,
            reading=reading,
        )
        state.is_open, state.loss, state.seconds = True, 0.0, 0.0
        self._measure_sizes()
        self._pull()
        self.save()
        return state.round

    def steps(self) -> Iterator[Report]:
        """Take the steps that are left of the open round, a report after each.

        Raises:
            TrainingDivergedError: a loss that is no number.
            UserError: no image of the memory can be read.
            OSError: the disk is full.
        """
        plan = self._open_round()
        reports = train(
            self.continual,
            self._batches(plan),
            self.optimizer,
            self.recipe.optim.schedule(plan.rows),
            start=self.progress,
            alpha=self.recipe.alpha,
        )
        with closing(reports):  # type: ignore[type-var]  # a generator, though it promises less
            for report in reports:
                loss = float(report.loss)
                if not math.isfinite(loss):
                    raise TrainingDivergedError(f"the loss of step {report.progress.step} is {loss}")
                self.progress = report.progress
                self.state.loss += loss
                self.state.seconds += report.seconds
                if self.progress.step % self.config.save_every_steps == 0:
                    self.save()
                yield report

    def delta(self) -> FloatArray:
        """(size,) what the device sends for the open or the last round: see `delta_of`.

        The parameters' difference is what the round's training changed. With FedEMA what the device kept of its own
        when the global model arrived is no part of it: the server has had that in earlier rounds. Where all devices
        take part with the same mu, what they keep sums up to nothing, and the server comes to the mean of the devices'
        models as in the paper.

        Raises:
            ValueError: there was no round.
        """
        if self._base is None:
            raise ValueError("no round was begun")
        return delta_of(self._packed(), self._base, self.manifest)

    def outcome(self) -> Outcome:
        """What came of the open or the last round so far; ValueError if there was none."""
        plan = self.state.round
        if plan is None:
            raise ValueError("no round was begun")
        taken = self.progress.step - plan.first_step
        new, replayed = (
            min(images, taken * rows)
            for images, rows in ((plan.new_images, plan.new_rows), (plan.memory_images, plan.replayed_rows))
        )
        return Outcome(
            round=plan,
            steps=taken,
            images=new + replayed,
            replayed_images=replayed,
            loss=self.state.loss / taken if taken else None,
            seconds=self.state.seconds,
        )

    def finish_round(self) -> Outcome:
        """End the open round, after all of its steps or some: its new images join the memory.

        After none they stay new. Once this has begun it is completed, by the next learner if need be.

        Raises:
            ValueError: no round is open.
            TrainingDivergedError: the weights are no numbers.
            OSError: the disk is full.
        """
        self._open_round()
        self.state.is_finishing = True
        self.save()
        self._settle()
        return self.outcome()

    def abandon_round(self) -> None:
        """Go back to the last state written, end its round without counting it, and take the next global model whole.

        For training that diverged. The round's new images stay new.
        """
        self._restore()
        self.state.is_open, self.state.is_finishing, self.state.starts_over = False, False, True
        self.save()

    def save(self) -> None:
        """Write the whole state, atomically.

        Raises:
            TrainingDivergedError: the weights are no numbers; the last state stays.
            OSError: the disk is full; the last state stays.
        """
        norms = torch._foreach_norm([parameter.detach() for parameter in self.continual.parameters()])
        if not torch.stack(norms).isfinite().all():
            raise TrainingDivergedError(f"the weights at step {self.progress.step} are no numbers")
        facts = {
            "recipe": self.recipe.as_dict(),
            "progress": dataclasses.asdict(self.progress),
            "state": self.state.as_dict(),
            "drift": self._drift.state(),
        }
        tensors = {f"continual.{name}": value for name, value in self.continual.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizer)
        if self._base is not None:
            tensors["base"] = torch.from_numpy(self._base)
        write_sealed(self._path, tensors, format=FORMAT, facts=facts)

    def _restore(self) -> None:
        """Take over the state on disk.

        Raises:
            UserError: it is of another recipe, or damaged.
        """
        file = read_sealed(self._path, format=FORMAT, kind="state of lowssl-client")
        facts, tensors = file.facts, file.tensors
        if changed := differences(recipe_from_dict(facts["recipe"]), self.recipe):
            raise UserError(f"{self._path} is of another recipe (there, here): {'; '.join(changed)}")
        self.continual.load_state_dict(tensors_below(tensors, "continual."))
        self.optimizer = self.recipe.optim.build(self.continual)
        restore_optimizer(self.optimizer, tensors)
        self.progress = Progress(**facts["progress"])
        self.state = LearnerState.from_dict(facts["state"])
        self._drift = Drift(self.config.drift, facts["drift"])
        self._base = tensors["base"].numpy() if "base" in tensors else None
        self._pull()

    def _settle(self) -> None:
        """Complete the end of a round; done twice it does the same."""
        if self.outcome().steps:
            # In this order: once admitted, nothing tells any more which images were the round's.
            self.arrivals.mark_learned(self.memory.keys(staged=True))
            self.memory.admit()
            self.state.starts_over = False
        self.state.is_open, self.state.is_finishing = False, False
        self.save()

    def _take_over(self, arrived: FloatArray | None) -> float | None:
        """Blend with a global model; returns the share of the device's own weights, None where none arrived."""
        own, state = self._packed(), self.state
        if arrived is None:
            self._base = own
            return None
        check_flat(arrived, self.manifest)
        if state.starts_over:
            # Nothing of its own is worth keeping: not the weights, nor what the optimizer and the average know of them.
            self._start_from(arrived)
            self.continual.restart_average()
            self.optimizer = self.recipe.optim.build(self.continual)
            state.starts_over = False
            return 0.0
        if self.config.tau == 0 or (state.scale is None and not self._has_warmed_up()):
            # Without tau a model is taken as it is; with it, the small steps of a warm-up would set lambda so high that
            # mu is 1 from then on.
            self._start_from(arrived)
            return 0.0
        blended = blend(own, arrived, self.manifest, scale=state.scale, tau=self.config.tau)
        state.scale = blended.scale
        self._start_from(blended.flat)
        return blended.mu

    def _has_warmed_up(self) -> bool:
        """Whether the last round was trained past the learning rate's warm-up from its first step on."""
        last = self.state.round
        return last is not None and last.first_step >= self.recipe.optim.warmup(self.config.steps_per_epoch)

    def _start_from(self, flat: FloatArray) -> None:
        self._load(flat)
        self._base = flat.copy()

    def _measure_sizes(self) -> None:
        """Find the local views' size once, on the first images; it stays, so that the network sees one scale."""
        source = self._source()
        if self.state.local_size is None and len(source):
            self.state.local_size = measure_views(self.recipe, source, self.method.online.backbone).local_size

    def _pull(self) -> None:
        """Tell the method which rows are replayed, and what the proximal term pulls to."""
        plan = self.state.round
        if plan is None or self._base is None:
            return
        self.continual.num_replayed = plan.replayed_rows
        proximal = plan.task.proximal
        self.continual.anchor(unpack(self._base, self.manifest) if proximal else {}, proximal)

    def _batches(self, plan: Round) -> Iterator[Views]:
        """The batches that are left of a round, new images first in each."""
        if not plan.steps:
            return
        local_size = self.state.local_size
        assert local_size is not None, "it is measured where there are images"
        source = self._source()
        stream = Stream(self.recipe.seed)
        batches = assemble_on("cpu", source, stream, self.recipe.views, local_size, max_bad=len(source) - 1)
        for draw in draws(plan, self.recipe.seed, self.progress.step - plan.first_step):
            batch = batches[draw].batch
            if not isinstance(batch, PixelBatch):
                raise UserError(f"{self.memory.path}: none of its images can be read")
            # What a step draws (MoCo's shuffling, stochastic depth) is a function of the step, whatever else runs here.
            torch.manual_seed(self.recipe.seed * 1_000_003 + draw.epoch)
            yield Views([normalize(view) for view in batch.globals], [normalize(view) for view in batch.locals])

    def _source(self) -> MemorySource:
        """The round's images: new ones first, then those that may be replayed."""
        return MemorySource(self.memory, [*self.memory.keys(staged=True), *self.memory.keys(staged=False)])

    def _is_as_planned(self) -> bool:
        """Whether the memory holds what the open round was planned on; it does not where somebody removed it."""
        plan, stats = self._open_round(), self.memory.stats()
        return (plan.new_images, plan.memory_images) == (stats.staged, stats.images)

    def _open_round(self) -> Round:
        if self.state.round is None or not self.state.is_open:
            raise ValueError("no round is open: begin one")
        return self.state.round

    def _packed(self) -> FloatArray:
        return pack(self.method.federated_state(), self.manifest)

    def _load(self, flat: FloatArray) -> None:
        self.method.load_state_dict(unpack(flat, self.manifest), strict=False)
