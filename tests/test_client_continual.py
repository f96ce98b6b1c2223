"""Continual training over all three methods: the loss it says it has, and nothing added where nothing is asked."""

import copy

import pytest
import torch
from test_train import BATCH, OPTIM, SMALL, START, assert_same_state, batch, batches, reports_of
from torch.nn import functional as F  # noqa: N812

from client.continual import Continual, ContinualConfig, evaluating
from lowssl_core.backbones import BackboneConfig
from lowssl_core.losses import PairLosses, rebalance
from lowssl_core.methods import METHODS
from lowssl_core.protocol.manifest import manifest_of

REPLAYED = 3


def wrapped(name: str, **config) -> Continual:
    torch.manual_seed(0)
    method = SMALL[name].build(BackboneConfig(name="resnet_tiny"), BATCH).train()
    return Continual(method, ContinualConfig(hidden=16, **config))


def gradients(module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", METHODS)
def test_without_alignment_and_proximal_term_it_is_the_method_itself_to_the_bit(name):
    continual = wrapped(name, alignment=0.0)
    continual.num_replayed = REPLAYED
    alone = copy.deepcopy(continual.method)
    alone.online._forward_hooks.clear()
    losses = []
    for method in (alone, continual):
        torch.manual_seed(5)
        losses.append([report.loss.item() for report in reports_of(method, OPTIM.build(method), batches())])
    assert losses[0] == losses[1]
    assert len(losses[0]) == START.total_steps
    assert_same_state(alone, continual.method)


@pytest.mark.parametrize("name", METHODS)
def test_gradient_is_that_of_the_loss_written_out(name):
    """L_rebalanced - lambda mean cos(a(z), z_ema) + mu/2 |w - w_g|^2, differentiated by autograd as it stands."""
    strength, mu, alpha = 1.5, 0.3, 0.4
    continual = wrapped(name, alignment=strength)
    # Averages that differ from the weights, as they do later in training.
    with torch.no_grad():
        for parameter in continual.encoder.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    shared = {key: value for key, value in continual.method.named_parameters() if value.requires_grad}
    anchor = {key: value.detach() + 0.1 * torch.randn_like(value) for key, value in shared.items()}
    oracle = copy.deepcopy(continual)
    continual.num_replayed = REPLAYED
    continual.anchor(anchor, mu)
    views, progress = batch(3), START.advanced().advanced()

    torch.manual_seed(5)
    rebalance(continual(views, progress), alpha).backward()
    continual.after_backward(progress)

    torch.manual_seed(5)
    pairs = oracle.method(views, progress)
    loss = alpha * pairs.global_pairs.mean() + (1 - alpha) * pairs.local_pairs.mean()
    # What the method's own forward saw of the globals, looked at by it once more with the statistics of then.
    looked = views.globals[1:] if name == "moco" else views.globals
    features = oracle.method.online.backbone(torch.cat(looked))
    targets = oracle.encoder.eval()(torch.cat(looked)).detach()
    rows = [view * BATCH + row for view in range(len(looked)) for row in range(BATCH - REPLAYED, BATCH)]
    cosines = F.cosine_similarity(oracle.predictor(features), targets, dim=1)
    total = loss - strength * sum(cosines[row] for row in rows) / len(rows)
    total = total + mu / 2 * sum(
        (value - anchor[key]).square().sum() for key, value in oracle.method.named_parameters() if key in anchor
    )
    total.backward()

    found, expected = gradients(continual), gradients(oracle)
    assert found.keys() == expected.keys()
    assert any(key.startswith("predictor.") for key in found)
    for key, value in found.items():
        torch.testing.assert_close(
            value, expected[key], rtol=2e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", METHODS)
def test_only_replayed_rows_are_aligned(name):
    continual = wrapped(name)
    views, changed = batch(3), batch(3)
    for view in changed.globals:
        view[: BATCH - REPLAYED] += 0.5
    closeness = []
    for seen in (views, changed):
        twin = copy.deepcopy(continual)
        twin.num_replayed = REPLAYED
        # Running statistics: rows then do not reach each other through a batch's.
        twin.method.online.backbone.eval()
        twin.encoder.eval()
        torch.manual_seed(5)
        closeness.append(twin(seen, START).signals["alignment"])
    torch.testing.assert_close(closeness[0], closeness[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_without_replayed_images_is_the_methods_own(name):
    continual = wrapped(name)
    torch.manual_seed(5)
    pairs = continual(batch(3), START)
    assert isinstance(pairs, PairLosses)
    assert "alignment" not in pairs.signals


@pytest.mark.parametrize("name", METHODS)
def test_alignment_adds_to_the_loss_once_whatever_alpha(name):
    for alpha in (0.0, 0.4, 1.0):
        continual = wrapped(name, alignment=2.0)
        plain = copy.deepcopy(continual)
        continual.num_replayed = REPLAYED
        torch.manual_seed(5)
        pairs = continual(batch(3), START)
        torch.manual_seed(5)
        expected = rebalance(plain(batch(3), START), alpha) - 2.0 * pairs.signals["alignment"]
        torch.testing.assert_close(rebalance(pairs, alpha), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_shared_has_the_methods_names_and_nothing_private(name):
    continual = wrapped(name)
    shared = continual.federated_state()
    assert shared.keys() == continual.method.federated_state().keys()
    assert not [key for key in shared if key.startswith((*continual.method.private, "method.", "predictor", "average"))]
    assert manifest_of(continual.method).trained_size > 0
    # Each weight stands once in the state, and training reaches each trained one.
    places = [value.data_ptr() for value in continual.state_dict().values() if value.numel() > 1]
    assert len(places) == len(set(places))


@pytest.mark.parametrize("name", METHODS)
def test_the_average_follows_the_weights_and_can_begin_anew(name):
    continual = wrapped(name)
    continual.num_replayed = REPLAYED
    online = continual.method.online.backbone
    list(reports_of(continual, OPTIM.build(continual), batches()))
    pairs = list(zip(continual.encoder.parameters(), online.parameters(), strict=True))
    assert any(not torch.equal(average, weight) for average, weight in pairs)
    assert not any(average.requires_grad for average, _ in pairs)
    continual.restart_average()
    assert all(torch.equal(average, weight) for average, weight in pairs)
    for average, own in zip(continual.encoder.buffers(), online.buffers(), strict=True):
        assert torch.equal(average, own)


def test_swavs_average_is_the_exponential_one_and_takes_over_statistics():
    continual = wrapped("swav", momentum=0.9)
    expected = {key: value.double().clone() for key, value in continual.encoder.named_parameters()}
    online = continual.method.online.backbone
    for _ in reports_of(continual, OPTIM.build(continual), batches()):
        for key, value in online.named_parameters():
            expected[key] = 0.9 * expected[key] + 0.1 * value.detach().double()
    for key, value in continual.encoder.named_parameters():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)
    for average, own in zip(continual.encoder.buffers(), online.buffers(), strict=True):
        assert torch.equal(average, own)


def test_the_proximal_term_leaves_frozen_layers_alone_and_pulls_weights_back():
    distances = []
    for mu in (0.0, 10.0):
        continual = wrapped("dino", alignment=0.0)
        anchor = {key: value.detach().clone() for key, value in continual.method.named_parameters()}
        continual.anchor(anchor, mu)
        last = continual.method.online.head[-1]
        for report in reports_of(continual, OPTIM.build(continual), batches()):
            if report.progress.step <= 2:  # DINO's first epoch
                assert all(parameter.grad is None for parameter in last.parameters())
        online = continual.method.online.backbone.named_parameters(prefix="online.backbone")
        distances.append(sum(float((value.detach() - anchor[key]).square().sum()) for key, value in online))
    assert distances[1] < distances[0]


def test_evaluating_gives_back_the_mode_it_found():
    module = torch.nn.Dropout()
    for training in (True, False):
        module.train(training)
        with evaluating(module):
            assert not module.training
        assert module.training is training


def test_values_out_of_range_are_named():
    for values, name in (
        ({"alignment": -1.0}, "alignment"),
        ({"momentum": 2.0}, "momentum"),
        ({"hidden": 0}, "hidden"),
    ):
        with pytest.raises(ValueError, match=name):
            ContinualConfig(**values)
