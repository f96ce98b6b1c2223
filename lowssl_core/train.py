"""The one training loop, a generator: one optimizer step for each batch, one report for each step."""

import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lowssl_core.distributed import world_size
from lowssl_core.losses import PairLosses, default_alpha, rebalance
from lowssl_core.methods.method import Method
from lowssl_core.optim import Schedule
from lowssl_core.schedules import Progress
from lowssl_core.views import Views


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one step did. Tensors are scalars that stay on the device: reading one waits for it.

    Attributes:
        progress: the clock after the step.
        loss: the loss that was minimised, of this rank's part of the batch.
        global_loss: mean loss of the global-global pairs.
        local_loss: mean loss of the global-local pairs; 0 without local views.
        signals: the method's signs of health.
        learning_rate: of this step.
        weight_decay: of this step.
        waited: seconds this step waited for its batch.
        seconds: seconds from asking for the batch to the end of the step, as the host sees it.
    """

    progress: Progress
    loss: Tensor
    global_loss: Tensor
    local_loss: Tensor
    signals: Mapping[str, Tensor]
    learning_rate: float
    weight_decay: float
    waited: float
    seconds: float


def train(
    method: Method,
    batches: Iterable[Views],
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    start: Progress,
    alpha: float | None = None,
) -> Iterator[Report]:
    """Train `method`, a step for each batch, until the clock or the batches end.

    Between two reports nothing is half done: the caller may stop, checkpoint or evaluate there, and go on. With
    several ranks, each calls this with its own part of every global batch and gradients are averaged.

    Args:
        method: what is trained, in train mode, on its device.
        batches: views on the same device.
        optimizer: over the method's trainable parameters (`OptimConfig.build`).
        schedule: learning rate and weight decay.
        start: the clock before the first step.
        alpha: the balance of global and local pairs (`rebalance`); None: the default formulation.

    Yields:
        A report after each step.
    """
    model: nn.Module = method
    if world_size() > 1:
        # Buffers are no business of DDP: statistics are synchronised or a rank's own, queues are the same everywhere.
        with warnings.catch_warnings():
            # Newer releases of torch have another name for the option, which the older ones do not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            model = DistributedDataParallel(method, broadcast_buffers=False)
    progress = start
    source = iter(batches)
    while not progress.is_done:
        began = time.perf_counter()
        views = next(source, None)
        if views is None:
            return
        waited = time.perf_counter() - began
        learning_rate, weight_decay = schedule.apply(optimizer, progress)
        optimizer.zero_grad(set_to_none=True)
        pairs = cast(PairLosses, model(views, progress))
        weight = default_alpha(len(pairs.global_pairs), len(pairs.local_pairs)) if alpha is None else alpha
        loss = rebalance(pairs, weight)
        loss.backward()  # type: ignore[no-untyped-call]
        method.after_backward(progress)
        optimizer.step()
        method.after_step(progress)
        progress = progress.advanced()
        yield Report(
            progress=progress,
            loss=loss.detach(),
            global_loss=pairs.global_pairs.detach().mean(),
            local_loss=pairs.local_pairs.detach().sum() / max(1, len(pairs.local_pairs)),
            signals=pairs.signals,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            waited=waited,
            seconds=time.perf_counter() - began,
        )
