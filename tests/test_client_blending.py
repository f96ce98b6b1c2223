"""FedEMA's blend, against its formulas written out name by name."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from client.blending import blend
from lowssl_core.backbones import BackboneConfig
from lowssl_core.methods import SwAVConfig
from lowssl_core.protocol.manifest import Entry, Manifest, manifest_of, pack, unpack


def swav(seed: int):
    torch.manual_seed(seed)
    method = SwAVConfig(hidden=8, outputs=4, prototypes=6).build(BackboneConfig(name="resnet_tiny"), 4)
    for module in method.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return method


@pytest.fixture(scope="module")
def states():
    methods = [swav(seed) for seed in (1, 2, 3)]
    manifest = manifest_of(methods[0])
    return manifest, [pack(method.federated_state(), manifest) for method in methods]


def oracle_distance(local, arrived, manifest) -> float:
    squares = 0.0
    for entry in manifest.entries:
        if entry.kind == "parameter":
            squares += sum(
                (float(a) - float(b)) ** 2 for a, b in zip(arrived[entry.place], local[entry.place], strict=True)
            )
    return math.sqrt(squares)


def test_the_first_blend_keeps_tau_of_the_device_and_sets_lambda(states):
    manifest, (local, arrived, _) = states
    blended = blend(local, arrived, manifest, scale=None, tau=0.7)
    distance = oracle_distance(local, arrived, manifest)
    assert blended.divergence == pytest.approx(distance, rel=1e-6)
    assert blended.scale == pytest.approx(0.7 / distance, rel=1e-6)
    assert blended.mu == pytest.approx(0.7, rel=1e-6)
    trained = slice(manifest.trained_size)
    expected = 0.7 * local[trained].astype(np.float64) + 0.3 * arrived[trained].astype(np.float64)
    np.testing.assert_allclose(blended.flat[trained], expected, rtol=1e-5, atol=1e-6)


def test_later_blends_keep_more_of_a_device_that_went_further(states):
    manifest, (local, arrived, other) = states
    scale = blend(local, arrived, manifest, scale=None).scale
    near = (0.9 * arrived + 0.1 * local).astype(np.float32)
    far = (arrived + 10 * (other - arrived)).astype(np.float32)
    for weights in (near, far):
        blended = blend(weights, arrived, manifest, scale=scale)
        assert blended.mu == pytest.approx(min(scale * oracle_distance(weights, arrived, manifest), 1), rel=1e-6)
        assert blended.scale == scale
    assert blend(near, arrived, manifest, scale=scale).mu == pytest.approx(0.07, rel=1e-5)
    trained = slice(manifest.trained_size)
    kept = blend(far, arrived, manifest, scale=scale)
    assert kept.mu == 1
    np.testing.assert_allclose(kept.flat[trained], far[trained], rtol=1e-6)


def test_statistics_are_those_of_a_mixture_of_both(states):
    """Each layer's: the mean and variance of samples of which mu come from the device's normal distribution."""
    manifest, (local, arrived, _) = states
    blended = blend(local, arrived, manifest, scale=None, tau=0.25)
    own, other, mixed = (unpack(flat, manifest) for flat in (local, arrived, blended.flat))
    for name in (entry.name for entry in manifest.entries if entry.kind == "batchnorm_mean"):
        spread = name.replace("running_mean", "running_var")
        means = [state[name].double() for state in (own, other)]
        mean = 0.25 * means[0] + 0.75 * means[1]
        # The variance of a mixture: that within its parts and that of its parts' means.
        within = 0.25 * own[spread].double() + 0.75 * other[spread].double()
        between = 0.25 * (means[0] - mean) ** 2 + 0.75 * (means[1] - mean) ** 2
        torch.testing.assert_close(mixed[name].double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed[spread].double(), within + between, rtol=1e-4, atol=1e-5)


def test_the_same_weights_stay_and_leave_lambda_open(states):
    manifest, (local, _, _) = states
    blended = blend(local, local, manifest, scale=None)
    assert (blended.mu, blended.divergence, blended.scale) == (0, 0, None)
    np.testing.assert_allclose(blended.flat, local, rtol=1e-5, atol=1e-6)


def test_tau_zero_is_federated_averaging(states):
    manifest, (local, arrived, other) = states
    first = blend(local, arrived, manifest, scale=None, tau=0)
    np.testing.assert_allclose(first.flat, arrived, rtol=1e-5, atol=1e-6)
    assert blend(other, arrived, manifest, scale=first.scale, tau=0).mu == 0


def test_variances_never_become_negative():
    manifest = Manifest(
        (
            Entry(name="m.running_mean", shape=(2,), dtype="float32", offset=0, kind="batchnorm_mean"),
            Entry(name="m.running_var", shape=(2,), dtype="float32", offset=2, kind="batchnorm_variance"),
        )
    )
    flat = np.array([1000.0, 3000.1, 0.0, 1e-6], dtype=np.float32)
    assert (blend(flat, flat, manifest, scale=1.0).flat[2:] >= 0).all()


def test_what_does_not_fit_is_refused(states):
    manifest, (local, arrived, _) = states
    with pytest.raises(ValueError, match="float32"):
        blend(local, arrived[:-1], manifest, scale=None)
    with pytest.raises(ValueError, match="tau is 2"):
        blend(local, arrived, manifest, scale=None, tau=2)
