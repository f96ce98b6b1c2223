"""Every method's losses and state against loops over its equations, and the contract that all of them keep."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from lowssl_core.backbones import BackboneConfig
from lowssl_core.losses import default_alpha, rebalance
from lowssl_core.methods import METHODS, DINOConfig, MoCoConfig, SwAVConfig
from lowssl_core.optim import OptimConfig
from lowssl_core.schedules import Progress
from lowssl_core.views import Views

BATCH, STEPS_PER_EPOCH, EPOCHS = 4, 3, 60
TINY = BackboneConfig(name="resnet_tiny")

SMALL = {
    "dino": DINOConfig(hidden=24, bottleneck=10, outputs=14),
    "swav": SwAVConfig(hidden=24, outputs=10, prototypes=14, queue_length=2 * BATCH + 3),
    "moco": MoCoConfig(hidden=24, outputs=10, queue_length=3 * BATCH + 2),
}
FORMULATIONS = {"default": None, "re-balanced": 0.4}


def built(name, config=None, backbone=TINY):
    torch.manual_seed(0)
    return (config or SMALL[name]).build(backbone, BATCH)


def views_of(num_locals=3, seed=0, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    return Views(
        [torch.randn(batch, 3, 32, 32, generator=generator) for _ in range(2)],
        [torch.randn(batch, 3, 16, 16, generator=generator) for _ in range(num_locals)],
    )


def at(epoch, step_in_epoch=0):
    """The clock at a step of an epoch."""
    return Progress(
        step=epoch * STEPS_PER_EPOCH + step_in_epoch,
        total_steps=EPOCHS * STEPS_PER_EPOCH,
        steps_per_epoch=STEPS_PER_EPOCH,
    )


def as_rows(tensors):
    """Tensors (B, D) as lists of lists of floats."""
    return [tensor.detach().double().tolist() for tensor in tensors]


def looked_at(network, *groups):
    """What a network's head says of each view: the backbone once a resolution, the head once for all of them.

    On a copy, whose BatchNorm statistics alone move. Returns one (B, D) list of lists a view.
    """
    network = copy.deepcopy(network)
    with torch.no_grad():
        features = [network.backbone(torch.cat(group)) for group in groups if group]
        outputs = network.head(torch.cat(features))
    return as_rows(outputs.split(len(groups[0][0])))


def scores_of(method, rows):
    """Cosines of unit rows (B, D) with the prototypes, made unit first."""
    return oracle_products(rows, oracle_normalized(method.prototypes.weight.tolist()))


def assert_pairs(pairs, expected, rel=2e-4):
    expected_global, expected_local = expected
    assert sorted(pairs.global_pairs.tolist()) == pytest.approx(sorted(expected_global), rel=rel)
    assert sorted(pairs.local_pairs.tolist()) == pytest.approx(sorted(expected_local), rel=rel)


def take_step(method, optimizer, views, progress, alpha=0.4):
    """One step, as the loop takes it."""
    pairs = method(views, progress)
    optimizer.zero_grad()
    rebalance(pairs, alpha).backward()
    method.after_backward(progress)
    optimizer.step()
    method.after_step(progress)
    return pairs


def sgd(method, lr=0.05, **options):
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr, **options)


def oracle_log_softmax(row):
    """One row of logits (a list) as log-probabilities."""
    top = max(row)
    log_sum = top + math.log(sum(math.exp(entry - top) for entry in row))
    return [entry - log_sum for entry in row]


def oracle_cross_entropy(targets, logits):
    """- sum_k targets[b][k] log softmax(logits[b])[k], averaged over b."""
    total = 0.0
    for target, row in zip(targets, logits, strict=True):
        log_probabilities = oracle_log_softmax(row)
        total -= sum(t * p for t, p in zip(target, log_probabilities, strict=True))
    return total / len(targets)


def oracle_scaled(rows, divisor, center=None):
    """(row - center) / divisor, for each row."""
    center = [0.0] * len(rows[0]) if center is None else center
    return [[(entry - c) / divisor for entry, c in zip(row, center, strict=True)] for row in rows]


def oracle_normalized(rows):
    """Each row over its length."""
    return [[entry / math.sqrt(sum(e * e for e in row)) for entry in row] for row in rows]


def oracle_products(left, right):
    """The dot product of each row of `left` with each row of `right`."""
    return [[sum(a * b for a, b in zip(x, y, strict=True)) for y in right] for x in left]


def oracle_dino(student_views, teacher_views, *, center, teacher_temperature):
    """Losses (global pairs, local pairs) of DINO; the first two of the student's views are the teacher's."""
    global_pairs, local_pairs = [], []
    for t, teacher in enumerate(teacher_views):
        log_targets = map(oracle_log_softmax, oracle_scaled(teacher, teacher_temperature, center))
        targets = [[math.exp(entry) for entry in row] for row in log_targets]
        for s, student in enumerate(student_views):
            if s == t:
                continue
            loss = oracle_cross_entropy(targets, oracle_scaled(student, 0.1))
            (global_pairs if s < 2 else local_pairs).append(loss)
    return global_pairs, local_pairs


def oracle_center(center, teacher_views, momentum=0.9):
    """The center after a batch: from the mean over all rows of all of the teacher's views."""
    rows = [row for view in teacher_views for row in view]
    mean = [sum(row[k] for row in rows) / len(rows) for k in range(len(center))]
    return [momentum * c + (1 - momentum) * m for c, m in zip(center, mean, strict=True)]


def oracle_teacher_temperature(epoch, start, end, epochs):
    """One value an epoch, `epochs` of them evenly from start to end, then end."""
    return np.linspace(start, end, epochs)[epoch] if epoch < epochs else end


def oracle_codes(scores, epsilon=0.05, iterations=3):
    """Sinkhorn-Knopp, as in test_sinkhorn.py but over numpy's axes: (B, K) to (B, K)."""
    q = np.exp(np.array(scores, dtype=np.float64) / epsilon)
    num_samples, num_prototypes = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q = q / q.sum(axis=0, keepdims=True) / num_prototypes
        q = q / q.sum(axis=1, keepdims=True) / num_samples
    return q * num_samples


def oracle_swav(scores_of_views, queued_scores=None):
    """Losses (global pairs, local pairs) of SwAV from one (B, K) table of cosines a view, globals first.

    `queued_scores` are the two tables of the queued features, one for each global view.
    """
    global_pairs, local_pairs = [], []
    batch_size = len(scores_of_views[0])
    for t in range(2):
        queued = [] if queued_scores is None else list(queued_scores[t])
        codes = oracle_codes([*queued, *scores_of_views[t]])[-batch_size:]
        for s, scores in enumerate(scores_of_views):
            if s == t:
                continue
            loss = oracle_cross_entropy(codes.tolist(), oracle_scaled(scores, 0.1))
            (global_pairs if s < 2 else local_pairs).append(loss)
    return global_pairs, local_pairs


def oracle_moco(query_views, keys, queue):
    """Losses (global pairs, local pairs) of MoCo: InfoNCE of each query with its key against the queue's rows."""
    losses = []
    for queries in query_views:
        total = 0.0
        for query, key in zip(queries, keys, strict=True):
            logits = [sum(a * b for a, b in zip(query, row, strict=True)) / 0.2 for row in [key, *queue]]
            total -= oracle_log_softmax(logits)[0]
        losses.append(total / len(keys))
    return losses[:1], losses[1:]


# Every method


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_pairs_are_counted_as_the_paper_counts_them(name, formulation):
    method = built(name)
    targets = 1 if name == "moco" else 2
    for num_locals in (0, 1, 3):
        pairs = method(views_of(num_locals), at(epoch=1))
        assert pairs.global_pairs.shape == (targets,)
        assert pairs.local_pairs.shape == (targets * num_locals,)
        if FORMULATIONS[formulation] is None:
            losses = [*pairs.global_pairs.tolist(), *pairs.local_pairs.tolist()]
            loss = rebalance(pairs, default_alpha(targets, targets * num_locals))
            assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        elif num_locals:
            expected = 0.4 * sum(pairs.global_pairs.tolist()) / targets
            expected += 0.6 * sum(pairs.local_pairs.tolist()) / (targets * num_locals)
            assert rebalance(pairs, 0.4).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_gradient_reaches_every_trained_parameter_and_no_other(name, formulation):
    method = built(name)
    pairs = method(views_of(), at(epoch=1))
    alpha = FORMULATIONS[formulation]
    if alpha is None:
        alpha = default_alpha(len(pairs.global_pairs), len(pairs.local_pairs))
    rebalance(pairs, alpha).backward()
    method.after_backward(at(epoch=1))
    for key, parameter in method.named_parameters():
        if key.startswith("teacher."):
            assert not parameter.requires_grad
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
        else:
            assert parameter.grad is None, key
    assert all(parameter.requires_grad for parameter in method.online.backbone.parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in method.online.backbone.parameters())


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_of_the_loop_lowers_that_batchs_loss(name, formulation):
    # The targets stand still within the comparison: the same state looks at the same views twice.
    method = built(name)
    alpha = FORMULATIONS[formulation]
    if alpha is None:
        alpha = default_alpha(1, 3)
    views, optimizer = views_of(), sgd(method, lr=1e-3)
    torch.manual_seed(1)
    before = rebalance(copy.deepcopy(method)(views, at(epoch=1)), alpha).item()
    torch.manual_seed(1)
    rebalance(method(views, at(epoch=1)), alpha).backward()
    if name == "dino":
        method.center.zero_()
    optimizer.step()
    torch.manual_seed(1)
    assert rebalance(method(views, at(epoch=1)), alpha).item() < before


@pytest.mark.parametrize("name", METHODS)
def test_one_backbone_pass_per_resolution_then_one_head_pass(name):
    method = built(name)
    seen = []
    method.online.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    method.online.head.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    method(views_of(num_locals=3), at(epoch=1))
    num_globals = 1 if name == "moco" else 2
    assert seen == [
        (num_globals * BATCH, 3, 32, 32),
        (3 * BATCH, 3, 16, 16),
        ((num_globals + 3) * BATCH, 256),
    ]


@pytest.mark.parametrize("name", METHODS)
def test_signals_are_finite_scalars_without_a_graph(name):
    pairs = built(name)(views_of(), at(epoch=1))
    assert pairs.signals
    for key, signal in pairs.signals.items():
        assert signal.shape == (), key
        assert torch.isfinite(signal), key
        assert not signal.requires_grad, key


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_and_restored_method_goes_on_in_the_same_way(name):
    straight = built(name)
    optimizer = sgd(straight)
    for step in range(3):
        take_step(straight, optimizer, views_of(seed=step), at(20, step))
    torch.manual_seed(99)
    restored = SMALL[name].build(TINY, BATCH)
    restored.load_state_dict(copy.deepcopy(straight.state_dict()))
    losses = []
    for method in (straight, restored):
        torch.manual_seed(5)
        pairs = [take_step(method, sgd(method), views_of(seed=seed), at(21, seed)) for seed in (0, 1)]
        losses.append([p.global_pairs.tolist() + p.local_pairs.tolist() for p in pairs])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", METHODS)
def test_devices_share_the_trained_weights_alone(name):
    method = built(name)
    shared = set(method.federated_state())
    trained = {key for key, parameter in method.named_parameters() if parameter.requires_grad}
    assert trained <= shared
    assert all(key.startswith(("online.", "prototypes.")) for key in shared), shared


@pytest.mark.parametrize("name", METHODS)
def test_a_network_that_says_nothing_has_the_chance_loss(name):
    method = built(name)
    with torch.no_grad():
        if name == "dino":
            last = method.online.head[-1].direction
            last.copy_(last[:1].expand_as(last))
        elif name == "swav":
            method.prototypes.weight.copy_(method.prototypes.weight[:1].expand_as(method.prototypes.weight))
        else:
            for network in (method.online, method.teacher):
                linear = [layer for layer in network.head.modules() if isinstance(layer, nn.Linear)][-1]
                linear.weight.zero_()
                linear.bias.fill_(1.0)
            method.queue.fill_(method.queue.shape[1] ** -0.5)
    pairs = method(views_of(), at(epoch=1))
    losses = [*pairs.global_pairs.tolist(), *pairs.local_pairs.tolist()]
    expected = math.log(1 + 3 * BATCH + 2) if name == "moco" else math.log(14)
    assert losses == pytest.approx([expected] * len(losses), rel=1e-5)
    assert method.chance_loss == pytest.approx(expected)


@pytest.mark.parametrize("name", ["dino", "moco"])
def test_teacher_starts_as_the_trained_network_and_follows_its_parameters_but_not_its_buffers(name):
    method = built(name)
    for (key, old), new in zip(method.online.named_parameters(), method.teacher.parameters(), strict=True):
        assert torch.equal(old, new), key
    optimizer = sgd(method, lr=0.5)
    progress = at(30, 1)
    before = copy.deepcopy(method.teacher)
    pairs = method(views_of(), progress)
    rebalance(pairs, 0.4).backward()
    optimizer.step()
    buffers = {key: buffer.clone() for key, buffer in method.teacher.named_buffers()}
    method.after_step(progress)
    if name == "moco":
        momentum = 0.999
    else:
        share_done = progress.step / progress.total_steps
        momentum = 1 - (1 - 0.996) * (1 + math.cos(math.pi * share_done)) / 2
    for got, old, new in zip(method.teacher.parameters(), before.parameters(), method.online.parameters(), strict=True):
        expected = old.double() * momentum + new.detach().double() * (1 - momentum)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert any(key.endswith("running_mean") for key in buffers)
    for key, buffer in method.teacher.named_buffers():
        assert torch.equal(buffer, buffers[key]), key


@pytest.mark.parametrize("name", ["dino", "moco"])
def test_teacher_keeps_batchnorm_statistics_of_what_it_saw_itself(name):
    method = built(name)
    assert all(module.training for module in method.teacher.modules())
    start = method.teacher.backbone.bn1.running_mean.clone()
    method(views_of(), at(epoch=1))
    teacher, online = method.teacher.backbone.bn1.running_mean, method.online.backbone.bn1.running_mean
    assert not torch.equal(teacher, start)
    assert not torch.equal(teacher, online)


@pytest.mark.parametrize("name", ["dino", "moco"])
def test_stochastic_depth_is_the_students_alone(name):
    method = built(name, backbone=BackboneConfig(name="vit_tiny", drop_path=0.1))
    rates = {}
    for network in ("online", "teacher"):
        rates[network] = [
            drop.drop_prob
            for block in getattr(method, network).backbone.blocks
            for drop in (block.drop_path1, block.drop_path2)
            if not isinstance(drop, nn.Identity)
        ]
    # From 0 in the first block to .1 in the last, twice a block.
    assert rates["online"] == pytest.approx([0.1 * block / 11 for block in range(1, 12) for _ in range(2)])
    assert rates["teacher"] == []


# DINO


@pytest.mark.parametrize("epoch", [0, 20, 49, 55])
@pytest.mark.parametrize("num_locals", [0, 3])
def test_dino_losses_are_those_of_the_loops(num_locals, epoch):
    method, views = built("dino"), views_of(num_locals)
    method.center.copy_(torch.linspace(-0.5, 0.5, 14))
    expected = oracle_dino(
        looked_at(method.online, views.globals, views.locals),
        looked_at(method.teacher, views.globals),
        center=method.center.tolist(),
        teacher_temperature=oracle_teacher_temperature(epoch, 0.04, 0.07, 50),
    )
    assert_pairs(method(views, at(epoch)), expected)


def test_dino_compares_no_view_with_itself():
    # With a teacher that says of one view what the student says of it, only a pair with itself would be this low.
    method, views = built("dino"), views_of(num_locals=0)
    student = looked_at(method.online, views.globals)
    teacher = looked_at(method.teacher, views.globals)
    losses = {}
    for t in range(2):
        log_targets = [oracle_log_softmax(row) for row in oracle_scaled(teacher[t], 0.04)]
        targets = [[math.exp(entry) for entry in row] for row in log_targets]
        for s in range(2):
            losses[t, s] = oracle_cross_entropy(targets, oracle_scaled(student[s], 0.1))
    got = method(views, at(epoch=0)).global_pairs.tolist()
    assert sorted(got) == pytest.approx(sorted([losses[0, 1], losses[1, 0]]), rel=2e-4)
    assert losses[0, 0] < losses[0, 1]
    assert min(abs(loss - own) for loss in got for own in (losses[0, 0], losses[1, 1])) > 1e-3


def test_dino_center_is_used_before_its_update_from_all_rows():
    method = built("dino")
    center = torch.linspace(-2, 2, 14).tolist()
    method.center.copy_(torch.tensor(center))
    for step in range(3):
        views = views_of(seed=step)
        teacher = looked_at(method.teacher, views.globals)
        expected = oracle_dino(
            looked_at(method.online, views.globals, views.locals),
            teacher,
            center=center,
            teacher_temperature=0.04,
        )
        assert_pairs(method(views, at(0, step)), expected)
        center = oracle_center(center, teacher)
        assert method.center.tolist() == pytest.approx(center, rel=1e-4, abs=1e-6)


def test_dino_center_starts_at_zero_and_is_saved():
    method = built("dino")
    assert method.center.tolist() == [0.0] * 14
    method(views_of(), at(epoch=0))
    assert torch.equal(method.state_dict()["center"], method.center)
    assert method.center.abs().max() > 0


@pytest.mark.parametrize("epochs", [50, 30])
def test_dino_teacher_temperature_warms_up_once_an_epoch(epochs):
    method = built("dino", DINOConfig(hidden=8, bottleneck=4, outputs=6, teacher_temperature_epochs=epochs))
    for epoch in range(EPOCHS):
        expected = oracle_teacher_temperature(epoch, 0.04, 0.07, epochs)
        for step in range(STEPS_PER_EPOCH):
            assert method.teacher_temperature(at(epoch, step)) == pytest.approx(expected, rel=1e-12)


def test_dino_teacher_sees_the_globals_once_and_nothing_else():
    method = built("dino")
    seen = []
    method.teacher.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    views = views_of()
    method(views, at(epoch=0))
    assert len(seen) == 1
    assert torch.equal(seen[0], torch.cat(views.globals))


def test_dino_last_layer_rests_for_one_epoch_whatever_the_optimizer():
    method = built("dino")
    optimizer = OptimConfig(base_lr=0.5, weight_decay=0.1).build(method)
    last = method.online.head[-1].direction
    start = last.detach().clone()
    for step in range(STEPS_PER_EPOCH):
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.5, 0.1
        take_step(method, optimizer, views_of(seed=step), at(0, step))
        assert torch.equal(last, start)
    take_step(method, optimizer, views_of(), at(1))
    assert not torch.equal(last, start)


def test_dino_heads_are_those_of_the_paper():
    convolutional = built("dino", DINOConfig()).online.head
    linears = [layer.weight.shape for layer in convolutional.modules() if isinstance(layer, nn.Linear)]
    assert [tuple(shape) for shape in linears] == [(2048, 256), (2048, 2048), (256, 2048)]
    kinds = [type(layer) for layer in convolutional.modules()]
    assert kinds.count(nn.BatchNorm1d) == kinds.count(nn.GELU) == 2
    assert convolutional[-1].direction.shape == (4096, 256)
    assert not convolutional[-1].gain.requires_grad
    assert (convolutional[-1].gain == 1).all()

    config = DINOConfig(hidden=16, bottleneck=8, outputs=12, head_batchnorm=False, gain_trainable=True)
    transformer = built("dino", config).online.head
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in transformer.modules())
    assert transformer[-1].gain.requires_grad


def test_dino_outputs_are_cosines_with_the_last_layers_directions():
    head = built("dino").online.head
    with torch.no_grad():
        head[-1].direction.mul_(torch.rand(14, 1) + 0.5)
    projected = []
    head[0].register_forward_hook(lambda _module, _inputs, output: projected.append(output))
    outputs = head(torch.randn(5, 256))
    expected = oracle_products(oracle_normalized(projected[0].tolist()), oracle_normalized(head[-1].direction.tolist()))
    np.testing.assert_allclose(outputs.detach().double().numpy(), expected, rtol=1e-4, atol=1e-6)


# SwAV


def fill_queue(method, seed=0):
    """Show batches until the queue is full; returns the rows (2, queue, D) that it must then hold."""
    views = [views_of(seed=seed + step) for step in range(2)]
    expected = [[], []]
    for step, batch in enumerate(views):
        embeddings = looked_at(method.online, batch.globals, batch.locals)
        method(batch, at(0, step))
        method.after_step(at(0, step))
        for view in range(2):
            expected[view] = embeddings[view] + expected[view]
    return expected


def swav_expectation(method, views, queue=None):
    """Losses from the equations, with the queue's (2, queue, D) rows in front."""
    embeddings = looked_at(method.online, views.globals, views.locals)
    queued = None if queue is None else [scores_of(method, rows) for rows in queue]
    return oracle_swav([scores_of(method, rows) for rows in embeddings], queued)


@pytest.mark.parametrize("num_locals", [0, 3])
def test_swav_losses_are_those_of_the_loops(num_locals):
    method, views = built("swav"), views_of(num_locals)
    assert_pairs(method(views, at(epoch=1)), swav_expectation(method, views))


def test_swav_prototypes_are_of_unit_length_in_every_forward():
    method = built("swav")
    views = views_of()
    with torch.no_grad():
        method.prototypes.weight.mul_(torch.linspace(0.3, 4, 14).unsqueeze(1))
    expected = swav_expectation(method, views)
    optimizer = sgd(method, lr=1.0)
    assert_pairs(method(views, at(epoch=1)), expected)
    for step in range(2):
        take_step(method, optimizer, views, at(1, step))
        assert (method.prototypes.weight.norm(dim=1) - 1).abs().max() > 1e-6  # the step leaves the sphere
        method(views, at(1, step))
        torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(14))


def test_swav_prototypes_rest_in_epoch_zero_alone():
    method = built("swav")
    method(views_of(), at(epoch=0))  # brings them to unit length
    start = method.prototypes.weight.detach().clone()
    optimizer = sgd(method, lr=0.5, weight_decay=0.1, momentum=0.9)
    for step in range(STEPS_PER_EPOCH):
        take_step(method, optimizer, views_of(seed=step), at(0, step))
        torch.testing.assert_close(method.prototypes.weight, start, rtol=1e-6, atol=1e-7)
    take_step(method, optimizer, views_of(), at(1))
    assert (method.prototypes.weight - start).abs().max() > 1e-4


@pytest.mark.parametrize(("length", "expected"), [(11, 8), (8, 8), (7, 4), (3, 0), (0, 0)])
def test_swav_queue_is_a_multiple_of_the_global_batch(length, expected):
    method = built("swav", SwAVConfig(hidden=8, outputs=4, prototypes=5, queue_length=length))
    assert method.queue.shape == (2, expected, 4)
    take_step(method, sgd(method), views_of(), at(epoch=20))


def test_swav_queue_holds_each_globals_newest_embeddings_first():
    method = built("swav")
    expected = fill_queue(method)
    np.testing.assert_allclose(method.queue.double().numpy(), expected, rtol=1e-4, atol=1e-5)
    views = views_of(seed=7)
    embeddings = looked_at(method.online, views.globals, views.locals)
    method(views, at(1))
    method.after_step(at(1))
    expected = [embeddings[view] + expected[view][:BATCH] for view in range(2)]
    np.testing.assert_allclose(method.queue.double().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("epoch", [15, 40])
def test_swav_queue_stands_in_front_of_the_batch_from_epoch_fifteen(epoch):
    method = built("swav")
    queue = fill_queue(method)
    views = views_of(seed=5)
    with_queue, without_queue = swav_expectation(method, views, queue), swav_expectation(method, views)
    assert with_queue[0] != pytest.approx(without_queue[0], rel=1e-3)
    assert_pairs(method(views, at(epoch)), with_queue)


def test_swav_queue_is_not_used_before_epoch_fifteen():
    method = built("swav")
    fill_queue(method)
    views = views_of(seed=5)
    expected = swav_expectation(method, views)
    assert_pairs(method(views, at(14, STEPS_PER_EPOCH - 1)), expected)


def test_swav_queue_is_not_used_until_it_is_full():
    method = built("swav")
    for step in range(2):
        views = views_of(seed=step)
        expected = swav_expectation(method, views)
        assert_pairs(method(views, at(16, step)), expected)
        method.after_step(at(16, step))
    views = views_of(seed=5)
    expected = swav_expectation(method, views, method.queue.double().tolist())
    assert_pairs(method(views, at(17)), expected)


def test_swav_starts_from_the_releases_distributions():
    method = built("swav", SwAVConfig(hidden=512, outputs=64, prototypes=200))
    for key, module in method.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.05), key
            assert abs(module.weight.mean().item()) < 1e-3, key
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1), key


def test_swav_head_is_that_of_the_paper():
    method = built("swav", SwAVConfig())
    layers = [tuple(m.weight.shape) for m in method.online.head.modules() if isinstance(m, nn.Linear)]
    assert layers == [(4096, 256), (128, 4096)]
    kinds = [type(layer) for layer in method.online.head.modules()]
    assert kinds.count(nn.BatchNorm1d) == kinds.count(nn.ReLU) == 1
    assert method.prototypes.weight.shape == (3000, 128)
    assert method.prototypes.bias is None
    assert method.queue.shape == (2, 3840, 128)
    outputs = method.online.head(torch.randn(6, 256))
    torch.testing.assert_close(outputs.norm(dim=1), torch.ones(6))


# MoCo


def moco_alone(**options):
    """MoCo with the keys' BatchNorm over the whole batch, as in the equations."""
    return built("moco", MoCoConfig(hidden=24, outputs=10, queue_length=14, key_groups=1, **options))


@pytest.mark.parametrize("num_locals", [0, 3])
def test_moco_losses_are_those_of_the_loops(num_locals):
    method, views = moco_alone(), views_of(num_locals)
    expected = oracle_moco(
        looked_at(method.online, views.globals[1:], views.locals),
        looked_at(method.teacher, views.globals[:1])[0],
        method.queue.double().tolist(),
    )
    assert_pairs(method(views, at(epoch=1)), expected)


def test_moco_makes_keys_from_global_view_zero_and_queries_from_the_others():
    method, views = moco_alone(), views_of()
    seen = {"online": [], "teacher": []}
    for network, images in seen.items():
        getattr(method, network).backbone.register_forward_pre_hook(
            lambda _, inputs, images=images: images.append(inputs[0].clone())
        )
    method(views, at(epoch=1))
    assert len(seen["online"]) == 2
    assert torch.equal(seen["online"][0], views.globals[1])
    assert torch.equal(seen["online"][1], torch.cat(views.locals))
    key_images = torch.cat(seen["teacher"])
    # Each image of view 0 once, in whatever order.
    assert sorted(key_images.flatten(1).sum(dim=1).tolist()) == pytest.approx(
        sorted(views.globals[0].flatten(1).sum(dim=1).tolist()), abs=1e-3
    )


def test_moco_queue_takes_the_batchs_keys_once_a_step_in_place_of_the_oldest():
    method = moco_alone()
    queue = method.queue.double().tolist()
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(14))
    end = 0
    for step in range(5):  # 20 keys through 14 places
        views = views_of(seed=step)
        keys = looked_at(method.teacher, views.globals[:1])[0]
        method(views, at(1, step))
        np.testing.assert_allclose(method.queue.double().numpy(), queue, rtol=1e-4, atol=1e-5)
        method.after_step(at(1, step))
        for key in keys:
            queue[end] = key
            end = (end + 1) % 14
        np.testing.assert_allclose(method.queue.double().numpy(), queue, rtol=1e-4, atol=1e-5)


def test_moco_gradient_does_not_reach_keys_or_queue():
    method = moco_alone()
    rebalance(method(views_of(), at(epoch=1)), 0.4).backward()
    assert not method.queue.requires_grad
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


def test_moco_keys_find_back_to_their_images_after_the_shuffle():
    method = built("moco", MoCoConfig(hidden=24, outputs=10, queue_length=16, key_groups=4))
    method.teacher.eval()  # no statistics: the order alone can go wrong
    views = views_of(batch=8)
    keys = looked_at(method.teacher, views.globals[:1])[0]
    method(views, at(epoch=1))
    method.after_step(at(epoch=1))
    np.testing.assert_allclose(method.queue[:8].double().numpy(), keys, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [*range(2, 13), 15, 16])
def test_moco_never_leaves_a_key_alone_with_its_batchnorm(batch):
    method = built("moco", MoCoConfig(hidden=24, outputs=10, queue_length=32, key_groups=4))
    sizes = []
    method.teacher.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    method(views_of(num_locals=0, batch=batch), at(epoch=1))
    assert sum(sizes) == batch
    assert len(sizes) == max(1, min(4, batch // 2))
    assert min(sizes) >= 2


def test_moco_head_is_that_of_the_paper():
    method = built("moco", MoCoConfig(queue_length=8))
    layers = [tuple(m.weight.shape) for m in method.online.head.modules() if isinstance(m, nn.Linear)]
    assert layers == [(2048, 256), (128, 2048)]
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in method.online.head.modules())
    torch.testing.assert_close(method.online.head(torch.randn(6, 256)).norm(dim=1), torch.ones(6))
    assert MoCoConfig().queue_length == 65536
