"""LARS against a loop over its equations, and which parameter belongs to which group."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lowssl_core.optim import LARS, OptimConfig, parameter_groups
from lowssl_core.schedules import Progress


def oracle_lars(parameter, gradients, *, lrs, weight_decay, use_trust_ratio, momentum=0.9, trust_coefficient=0.001):
    """The values (a list of floats) of one parameter after a step for each gradient."""
    values = list(parameter)
    mu = [0.0] * len(values)
    for gradient, lr in zip(gradients, lrs, strict=True):
        d = [g + weight_decay * p for g, p in zip(gradient, values, strict=True)]
        parameter_norm = math.sqrt(sum(p * p for p in values))
        direction_norm = math.sqrt(sum(entry * entry for entry in d))
        q = 1.0
        if use_trust_ratio and parameter_norm > 0 and direction_norm > 0:
            q = trust_coefficient * parameter_norm / direction_norm
        mu = [momentum * m + q * entry for m, entry in zip(mu, d, strict=True)]
        values = [p - lr * m for p, m in zip(values, mu, strict=True)]
    return values


def run_lars(parameters, gradients, *, lrs, groups=None, **options):
    """Step LARS on copies of `parameters` (arrays), `gradients[step][i]` being that of parameter i."""
    tensors = [nn.Parameter(torch.tensor(parameter, dtype=torch.float32)) for parameter in parameters]
    described = [{"params": [tensors[i]], **group} for i, group in enumerate(groups)] if groups else tensors
    optimizer = LARS(described, lr=lrs[0], **options)
    for lr, step_gradients in zip(lrs, gradients, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for tensor, gradient in zip(tensors, step_gradients, strict=True):
            tensor.grad = None if gradient is None else torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    return [tensor.detach().double().numpy() for tensor in tensors]


def random_arrays(shapes, seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


SHAPES = [(4, 3), (2, 3, 3, 3), (5,)]
LRS = [0.1, 0.5, 1.92, 0.3, 0.7]


@pytest.mark.parametrize("use_trust_ratio", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-6, 0.1])
def test_lars_follows_its_equations_for_several_steps(weight_decay, use_trust_ratio):
    parameters = random_arrays(SHAPES, seed=0)
    gradients = [random_arrays(SHAPES, seed=step) for step in range(1, 6)]
    groups = [{"weight_decay": weight_decay, "use_trust_ratio": use_trust_ratio}] * len(SHAPES)
    got = run_lars(parameters, gradients, lrs=LRS, groups=groups)
    for i, parameter in enumerate(parameters):
        expected = oracle_lars(
            parameter.ravel(),
            [step_gradients[i].ravel() for step_gradients in gradients],
            lrs=LRS,
            weight_decay=weight_decay,
            use_trust_ratio=use_trust_ratio,
        )
        np.testing.assert_allclose(got[i].ravel(), expected, rtol=1e-4, atol=1e-6)


def test_lars_reads_decay_and_trust_from_each_group():
    parameters = random_arrays([(3, 2)] * 4, seed=0)
    gradients = [random_arrays([(3, 2)] * 4, seed=step) for step in range(1, 6)]
    groups = [{"weight_decay": decay, "use_trust_ratio": trust} for decay in (0.0, 0.2) for trust in (False, True)]
    got = run_lars(parameters, gradients, lrs=LRS, groups=groups)
    for i, (parameter, group) in enumerate(zip(parameters, groups, strict=True)):
        expected = oracle_lars(parameter.ravel(), [g[i].ravel() for g in gradients], lrs=LRS, **group)
        np.testing.assert_allclose(got[i].ravel(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("momentum", "trust_coefficient"), [(0.0, 0.001), (0.9, 0.02), (0.5, 1.0)])
def test_lars_takes_its_momentum_and_trust_coefficient(momentum, trust_coefficient):
    parameters, gradients = (
        random_arrays([(4, 4)], 0),
        [random_arrays([(4, 4)], step) for step in range(1, 6)],
    )
    got = run_lars(
        parameters,
        gradients,
        lrs=LRS,
        groups=[{"weight_decay": 0.01, "use_trust_ratio": True}],
        momentum=momentum,
        trust_coefficient=trust_coefficient,
    )
    expected = oracle_lars(
        parameters[0].ravel(),
        [g[0].ravel() for g in gradients],
        lrs=LRS,
        weight_decay=0.01,
        use_trust_ratio=True,
        momentum=momentum,
        trust_coefficient=trust_coefficient,
    )
    np.testing.assert_allclose(got[0].ravel(), expected, rtol=1e-4, atol=1e-6)


def test_trust_is_one_where_a_norm_is_zero():
    group = [{"weight_decay": 0.0, "use_trust_ratio": True}]
    gradient = np.array([[3.0, 4.0]])
    from_zero = run_lars([np.zeros((1, 2))], [[gradient]], lrs=[0.1], groups=group)
    np.testing.assert_allclose(from_zero[0], [[-0.3, -0.4]], rtol=1e-6)
    without_gradient = run_lars([gradient], [[np.zeros((1, 2))]], lrs=[0.1], groups=group)
    np.testing.assert_array_equal(without_gradient[0], gradient)


def test_trust_makes_a_step_independent_of_the_gradients_scale():
    parameters = random_arrays([(6, 6)], 0)
    gradient = random_arrays([(6, 6)], 1)[0]
    group = [{"weight_decay": 0.0, "use_trust_ratio": True}]
    one = run_lars(parameters, [[gradient]], lrs=[1.0], groups=group)[0]
    thousand = run_lars(parameters, [[1000 * gradient]], lrs=[1.0], groups=group)[0]
    np.testing.assert_allclose(one, thousand, rtol=1e-5)
    # The step is as long as a thousandth of the weights.
    step_length = np.linalg.norm(one - parameters[0].astype(np.float32))
    assert step_length == pytest.approx(0.001 * np.linalg.norm(parameters[0]), rel=1e-3)


def test_parameters_without_gradient_stay():
    parameters = random_arrays([(3, 3), (3, 3)], 0)
    gradient = random_arrays([(3, 3)], 1)[0]
    groups = [{"weight_decay": 0.1, "use_trust_ratio": True}] * 2
    got = run_lars(parameters, [[gradient, None], [gradient, None]], lrs=[0.5, 0.5], groups=groups)
    np.testing.assert_array_equal(got[1], parameters[1].astype(np.float32))
    assert not np.array_equal(got[0], parameters[0].astype(np.float32))


def test_resumed_lars_goes_on_as_if_it_had_not_stopped():
    torch.manual_seed(0)
    start = torch.randn(4, 3)
    gradients = torch.randn(6, 4, 3)
    group = {"weight_decay": 0.01, "use_trust_ratio": True}

    def steps(parameter, optimizer, some_gradients):
        for gradient in some_gradients:
            parameter.grad = gradient.clone()
            optimizer.step()

    straight = nn.Parameter(start.clone())
    steps(straight, LARS([{"params": [straight], **group}], lr=0.5), gradients)

    first = nn.Parameter(start.clone())
    stopped = LARS([{"params": [first], **group}], lr=0.5)
    steps(first, stopped, gradients[:3])
    second = nn.Parameter(first.detach().clone())
    resumed = LARS([{"params": [second], **group}], lr=0.5)
    resumed.load_state_dict(stopped.state_dict())
    steps(second, resumed, gradients[3:])
    assert torch.equal(second, straight)


class Zoo(nn.Module):
    """One of each kind of parameter."""

    def __init__(self):
        super().__init__()
        self.gray_stem = nn.Conv2d(1, 8, 3, bias=False)  # one input channel, but not depthwise
        self.one_to_one = nn.Conv2d(1, 1, 3, bias=False)  # as many groups as channels, but only one
        self.stem = nn.Conv2d(3, 8, 3, bias=True)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=True)
        self.depthwise_doubling = nn.Conv2d(8, 16, 3, groups=8, bias=False)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4, bias=False)
        self.pointwise = nn.Conv2d(16, 8, 1, bias=False)
        self.layer_norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 4)


def treatment(module):
    """What parameter_groups says for each parameter: name -> (decays, trusts)."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {}
    for group in parameter_groups(module):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found, f"{name} is in two groups"
            found[name] = (group["decays"], group["use_trust_ratio"])
    return found


def test_one_dimensional_parameters_neither_decay_nor_trust():
    found = treatment(Zoo())
    for name in (
        "stem.bias",
        "norm.weight",
        "norm.bias",
        "depthwise.bias",
        "layer_norm.weight",
        "layer_norm.bias",
        "linear.bias",
    ):
        assert found[name] == (False, False), name


def test_depthwise_convolutions_trust_but_do_not_decay():
    found = treatment(Zoo())
    for name in ("depthwise.weight", "depthwise_doubling.weight"):
        assert found[name] == (False, True), name


def test_all_other_weights_decay_and_trust_even_of_a_one_channel_stem():
    found = treatment(Zoo())
    for name in (
        "gray_stem.weight",
        "one_to_one.weight",
        "stem.weight",
        "grouped.weight",
        "pointwise.weight",
        "linear.weight",
    ):
        assert found[name] == (True, True), name


def test_every_parameter_is_in_exactly_one_group():
    zoo = Zoo()
    assert set(treatment(zoo)) == {name for name, _ in zoo.named_parameters()}


def test_frozen_parameters_are_in_no_group():
    zoo = Zoo()
    zoo.pointwise.weight.requires_grad_(False)
    assert set(treatment(zoo)) == {name for name, _ in zoo.named_parameters()} - {"pointwise.weight"}


def oracle_learning_rate(step, *, base_lr, final_lr, batch_size, warmup_steps, total_steps, warmup_start_lr):
    peak = base_lr * batch_size / 256
    if step < warmup_steps:
        return warmup_start_lr + (peak - warmup_start_lr) * step / warmup_steps
    turn = math.pi * (step - warmup_steps) / (total_steps - warmup_steps)
    return final_lr + (peak - final_lr) * (1 + math.cos(turn)) / 2


@pytest.mark.parametrize(
    ("base_lr", "final_lr", "warmup_start_lr"),
    [(0.48, 0.0048, 0.0), (0.0005, 1e-5, 0.0), (0.3, 0.0048, 0.075)],
    ids=["DINO and MoCo, CNN", "DINO, ViT", "SwAV"],
)
def test_only_the_base_rate_is_scaled_by_the_batch(base_lr, final_lr, warmup_start_lr):
    config = OptimConfig(base_lr=base_lr, final_lr=final_lr, warmup_start_lr=warmup_start_lr, warmup_epochs=10)
    schedule = config.schedule(batch_size=1024)
    for step in range(0, 200 * 4, 7):
        expected = oracle_learning_rate(
            step,
            base_lr=base_lr,
            final_lr=final_lr,
            batch_size=1024,
            warmup_steps=10 * 4,
            total_steps=200 * 4,
            warmup_start_lr=warmup_start_lr,
        )
        got = schedule.learning_rate(Progress(step=step, total_steps=200 * 4, steps_per_epoch=4))
        assert got == pytest.approx(expected, rel=1e-12)


def test_weight_decay_rises_on_a_cosine_for_the_groups_that_decay_alone():
    config = OptimConfig(name="adamw", base_lr=0.0005, weight_decay=0.04, final_weight_decay=0.4)
    optimizer = config.build(Zoo())
    for step, expected in [(0, 0.04), (25, 0.04 + 0.36 * (1 - math.sqrt(0.5)) / 2), (50, 0.22), (100, 0.4)]:
        progress = Progress(step=step, total_steps=100, steps_per_epoch=10)
        config.schedule(batch_size=256).apply(optimizer, progress)
        kinds = {group["decays"] for group in optimizer.param_groups}
        assert kinds == {True, False}
        for group in optimizer.param_groups:
            assert group["weight_decay"] == pytest.approx(expected if group["decays"] else 0.0)


@pytest.mark.parametrize(("name", "kind"), [("lars", LARS), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_config_builds_the_optimizer_it_names(name, kind):
    assert type(OptimConfig(name=name).build(Zoo())) is kind


def test_lars_built_from_its_config_follows_the_equations_on_every_kind_of_parameter():
    torch.manual_seed(0)
    zoo = Zoo()
    config = OptimConfig(base_lr=0.48, weight_decay=0.1)
    optimizer = config.build(zoo)
    before = {name: parameter.detach().clone() for name, parameter in zoo.named_parameters()}
    for parameter in zoo.parameters():
        parameter.grad = torch.randn_like(parameter)
    config.schedule(batch_size=512).apply(optimizer, Progress(step=0, total_steps=10, steps_per_epoch=5))
    optimizer.step()
    for name, parameter in zoo.named_parameters():
        is_flat, is_depthwise = parameter.ndim == 1, name.startswith("depthwise")
        expected = oracle_lars(
            before[name].flatten().tolist(),
            [parameter.grad.flatten().tolist()],
            lrs=[0.96],
            weight_decay=0.0 if is_flat or is_depthwise else 0.1,
            use_trust_ratio=not is_flat,
        )
        assert parameter.flatten().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6), name
