"""The loop's contract, for every method: one step and one report at a time, nothing half done, nothing read back."""

import copy
from itertools import count, islice

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowssl_core.backbones import BackboneConfig
from lowssl_core.losses import PairLosses
from lowssl_core.methods import METHODS, DINOConfig, Method, MoCoConfig, SwAVConfig
from lowssl_core.methods.heads import Network
from lowssl_core.optim import OptimConfig
from lowssl_core.schedules import Progress
from lowssl_core.train import train
from lowssl_core.views import Views

BATCH = 4
SMALL = {
    "dino": DINOConfig(hidden=24, bottleneck=10, outputs=14),
    "swav": SwAVConfig(hidden=24, outputs=10, prototypes=14, queue_length=2 * BATCH, queue_start_epoch=1),
    "moco": MoCoConfig(hidden=24, outputs=10, queue_length=3 * BATCH + 2),
}
START = Progress(step=0, total_steps=6, steps_per_epoch=2)
OPTIM = OptimConfig(name="lars", warmup_steps=2, warmup_start_lr=0.001, weight_decay=1e-4, final_weight_decay=1e-3)


def built(name, optim=OPTIM):
    torch.manual_seed(0)
    method = SMALL[name].build(BackboneConfig(name="resnet_tiny"), BATCH).train()
    return method, optim.build(method)


def batch(step, num_locals=2):
    generator = torch.Generator().manual_seed(step)
    return Views(
        [torch.randn(BATCH, 3, 24, 24, generator=generator) for _ in range(2)],
        [torch.randn(BATCH, 3, 12, 12, generator=generator) for _ in range(num_locals)],
    )


def batches(first=0):
    return map(batch, count(first))


def reports_of(method, optimizer, views, start=START, alpha=0.4):
    return train(method, views, optimizer, OPTIM.schedule(BATCH), start=start, alpha=alpha)


def assert_same_state(method, other):
    state, expected = method.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


class Plain(Method):
    """A method of one weight that writes down what the loop does with it."""

    synchronised = ()
    private = ()

    def __init__(self, calls):
        super().__init__()
        self.online = Network(nn.Flatten(), 3, nn.Linear(3, 1, bias=False))
        self.teacher = None
        self.chance_loss = 1.0
        self.calls = calls

    def forward(self, views, progress):
        self.calls.append(("forward", progress.step))
        outputs, _ = self.online(views.globals, views.locals)
        losses = (outputs - 1).square().mean(dim=(1, 2))
        return PairLosses(losses[:2], losses[2:], signals={"mean": outputs.detach().mean()})

    def after_backward(self, progress):
        assert self.online.head.weight.grad is not None
        self.calls.append(("after_backward", progress.step))

    def after_step(self, progress):
        self.calls.append(("after_step", progress.step))


def plain_views(num_locals=2):
    generator = torch.Generator().manual_seed(3)
    pixels = [torch.randn(BATCH, 3, 1, 1, generator=generator) for _ in range(2 + num_locals)]
    return Views(pixels[:2], pixels[2:])


def plain_run(calls, **options):
    torch.manual_seed(0)
    method = Plain(calls)
    optimizer = OptimConfig(name="sgd").build(method)
    optimizer.register_step_post_hook(lambda *_: calls.append(("step",)))
    return method, reports_of(method, optimizer, iter(lambda: plain_views(**options), None))


class NoReading(TorchDispatchMode):
    """Refuses every operation for which a host would wait for its accelerator."""

    READS = frozenset(
        {
            torch.ops.aten._local_scalar_dense.default,  # item(), float(), bool(), an `if` on a tensor
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
            torch.ops.aten._unique2.default,
            torch.ops.aten.bincount.default,
        }
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.READS, f"{func} waits for the device"
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "a mask waits for the device"
        return func(*args, **(kwargs or {}))


# Every method


@pytest.mark.parametrize("name", METHODS)
def test_there_is_one_report_a_step_until_the_clock_ends(name):
    method, optimizer = built(name)
    reports = list(reports_of(method, optimizer, batches()))
    assert [report.progress for report in reports] == [
        Progress(step=step, total_steps=6, steps_per_epoch=2) for step in range(1, 7)
    ]
    schedule = OPTIM.schedule(BATCH)
    for report in reports:
        before = Progress(step=report.progress.step - 1, total_steps=6, steps_per_epoch=2)
        assert report.learning_rate == schedule.learning_rate(before)
        assert report.weight_decay == schedule.weight_decay(before)
        assert 0 <= report.waited <= report.seconds
        for value in (report.loss, report.global_loss, report.local_loss, *report.signals.values()):
            assert value.shape == ()
            assert not value.requires_grad
        torch.testing.assert_close(report.loss, 0.4 * report.global_loss + 0.6 * report.local_loss)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_stopped_between_two_reports_and_taken_up_again_equals_a_straight_one(name):
    straight, optimizer = built(name)
    losses = [report.loss for report in reports_of(straight, optimizer, batches())]

    stopped, optimizer = built(name)
    first = list(islice(reports_of(stopped, optimizer, batches()), 3))  # in the middle of an epoch
    at = first[-1].progress
    # Whatever a caller does there, an evaluation for example, is not the run's business.
    frozen = copy.deepcopy(stopped).eval()
    with torch.no_grad():
        frozen.online(batch(99).globals)
    rest = list(reports_of(stopped, optimizer, batches(at.step), start=at))
    assert [report.loss.item() for report in first + rest] == [loss.item() for loss in losses]
    assert_same_state(stopped, straight)


@pytest.mark.parametrize("name", METHODS)
def test_no_step_reads_from_the_device(name):
    method, optimizer = built(name)
    with NoReading():
        reports = list(reports_of(method, optimizer, [batch(step) for step in range(6)]))
        with pytest.raises(AssertionError, match="waits for the device"):
            float(reports[-1].loss)
    assert len(reports) == 6


@pytest.mark.parametrize(("name", "frozen"), [("dino", "online.head.2.direction"), ("swav", "prototypes.weight")])
def test_the_last_layer_stays_as_it_was_for_one_epoch_and_then_learns(name, frozen):
    optim = OptimConfig(name="sgd", base_lr=6.4)
    method, optimizer = built(name, optim)
    last, first = method.get_parameter(frozen), method.online.backbone.conv1.weight
    # Of prototypes the direction counts: their lengths are brought to 1 before every use.
    start = nn.functional.normalize(last.detach().clone())
    for report in train(method, batches(), optimizer, optim.schedule(BATCH), start=START):
        moved = (nn.functional.normalize(last.detach()) - start).abs().max()
        assert (moved > 1e-5) == (report.progress.step > START.steps_per_epoch)
        if report.progress.step == 1:
            early = first.detach().clone()
    assert not torch.equal(first, early)


@pytest.mark.parametrize("name", METHODS)
def test_without_local_views_the_loss_is_that_of_the_globals(name):
    method, optimizer = built(name)
    report = next(reports_of(method, optimizer, [batch(0, num_locals=0)]))
    assert report.local_loss.item() == 0
    assert report.loss.item() == report.global_loss.item()


# The loop itself


def test_each_step_looks_then_touches_up_gradients_then_steps_then_moves_targets():
    calls = []
    _, reports = plain_run(calls)
    next(reports)
    expected = [("forward", 0), ("after_backward", 0), ("step",), ("after_step", 0)]
    assert calls == expected
    next(reports)
    assert calls[4:] == [("forward", 1), ("after_backward", 1), ("step",), ("after_step", 1)]


@pytest.mark.parametrize("alpha", [None, 0.4])
def test_a_step_is_the_gradient_of_the_balanced_loss_times_the_learning_rate(alpha):
    torch.manual_seed(0)
    method = Plain([])
    schedule = OptimConfig(name="sgd", base_lr=6.4, weight_decay=0.0).schedule(BATCH)
    optimizer = schedule.config.build(method)
    weight = method.online.head.weight.detach().clone().flatten().double()
    views = plain_views(num_locals=3)
    report = next(train(method, [views], optimizer, schedule, start=START, alpha=alpha))

    # loss of a view: mean over images of (w x - 1)^2; its gradient: mean of 2 (w x - 1) x
    shares = [0.2] * 5 if alpha is None else [alpha / 2] * 2 + [(1 - alpha) / 3] * 3
    loss, gradient = 0.0, torch.zeros(3, dtype=torch.float64)
    for share, pixels in zip(shares, [*views.globals, *views.locals], strict=True):
        for row in pixels.flatten(1).double():
            rest = weight @ row - 1
            loss += share * rest.item() ** 2 / BATCH
            gradient += share * 2 * rest * row / BATCH
    assert report.loss.item() == pytest.approx(loss, rel=1e-5)
    assert report.learning_rate == pytest.approx(6.4 * BATCH / 256)
    torch.testing.assert_close(
        method.online.head.weight.detach().flatten().double(), weight - 0.1 * gradient, rtol=1e-5, atol=1e-6
    )


def test_a_run_ends_where_its_batches_end():
    method, optimizer = built("moco")
    reports = list(reports_of(method, optimizer, islice(batches(), 4)))
    assert [report.progress.step for report in reports] == [1, 2, 3, 4]


def test_a_finished_run_takes_no_further_batch():
    end = Progress(step=6, total_steps=6, steps_per_epoch=2)
    taken = []
    views = (taken.append(step) or plain_views() for step in count())
    method = Plain([])
    optimizer = OptimConfig(name="sgd").build(method)
    assert list(reports_of(method, optimizer, views, start=end)) == []
    assert taken == []
    assert len(list(reports_of(method, optimizer, views))) == 6
    assert taken == list(range(6))


def test_waiting_for_batches_is_part_of_a_steps_time(monkeypatch):
    # A clock that each look moves by one second: asking, receiving, end of the step.
    monkeypatch.setattr("time.perf_counter", map(float, count()).__next__)
    _, reports = plain_run([])
    report = next(reports)
    assert (report.waited, report.seconds) == (1.0, 2.0)
