"""What travels is what is trained and what BatchNorm has seen, in one array that both sides lay out alike."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from aggregation_data import small_manifest
from torch import nn

from lowssl_core.backbones import BackboneConfig
from lowssl_core.methods import METHODS, DINOConfig, MoCoConfig, SwAVConfig
from lowssl_core.protocol import BadUpdate
from lowssl_core.protocol.manifest import Manifest, delta_of, manifest_of, pack, unpack

SMALL = {
    "dino": DINOConfig(hidden=24, bottleneck=10, outputs=14),
    "swav": SwAVConfig(hidden=24, outputs=10, prototypes=14, queue_length=8),
    "moco": MoCoConfig(hidden=24, outputs=10, queue_length=8),
}


def built(name, backbone="resnet_tiny"):
    torch.manual_seed(0)
    return SMALL[name].build(BackboneConfig(name=backbone), 4)


@pytest.mark.parametrize("backbone", ["resnet_tiny", "mobilenetv2_tiny", "vit_tiny"])
@pytest.mark.parametrize("name", METHODS)
def test_trained_weights_and_batchnorm_statistics_travel_and_nothing_else(name, backbone):
    method = built(name, backbone)
    manifest = manifest_of(method)
    by_kind = {kind: {e.name for e in manifest.entries if e.kind == kind} for kind in ("parameter", "buffer")}
    assert by_kind["parameter"] == {key for key, weight in method.named_parameters() if weight.requires_grad}
    norms = [
        key
        for key, module in method.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not key.startswith("teacher.")
    ]
    for kind, value in (("batchnorm_mean", "running_mean"), ("batchnorm_variance", "running_var")):
        assert [e.name for e in manifest.entries if e.kind == kind] == [f"{key}.{value}" for key in norms]
    assert not by_kind["buffer"]


def test_swavs_prototypes_alone_have_unit_rows():
    assert [e.name for e in manifest_of(built("swav")).entries if e.unit_rows] == ["prototypes.weight"]
    assert not any(e.unit_rows for name in ("dino", "moco") for e in manifest_of(built(name)).entries)


def test_packing_and_unpacking_gives_the_state_back():
    method, other = built("swav"), built("swav")
    manifest = manifest_of(method)
    with torch.no_grad():
        for value in method.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value))
    flat = pack(method.federated_state(), manifest)
    assert flat.dtype == np.float32
    assert len(flat) == manifest.size
    other.load_state_dict(unpack(flat, manifest), strict=False)
    for entry in manifest.entries:
        assert torch.equal(other.state_dict()[entry.name], method.state_dict()[entry.name])
    assert torch.equal(pack_of(other, manifest), torch.from_numpy(flat))


def pack_of(method, manifest):
    return torch.from_numpy(pack(method.federated_state(), manifest))


def test_a_delta_is_a_difference_of_parameters_and_the_devices_own_statistics():
    manifest = small_manifest()
    rng = np.random.default_rng(0)
    local, base = rng.random((2, manifest.size), dtype=np.float32)
    delta = delta_of(local, base, manifest)
    trained = manifest.trained_size
    np.testing.assert_array_equal(delta[:trained], local[:trained] - base[:trained])
    np.testing.assert_array_equal(delta[trained:], local[trained:])


def test_json_gives_the_same_manifest_and_hash():
    manifest = manifest_of(built("dino"))
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.hash == manifest.hash


def test_any_other_entry_is_another_hash():
    first, *rest = small_manifest().entries
    hashes = {small_manifest().hash, small_manifest(unit_rows=["head.weight"]).hash}
    for change in ({"name": "other"}, {"shape": (40, 50)}, {"dtype": "float16"}):
        hashes.add(Manifest((dataclasses.replace(first, **change), *rest)).hash)
    assert len(hashes) == 5


def row(**changes):
    entry = {"name": "w", "shape": [2, 3], "dtype": "float32", "offset": 0, "kind": "parameter", "unit_rows": False}
    return json.dumps([entry | changes])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        "{}",
        "[[]]",
        row(extra=1),
        row(name=3),
        row(shape=[2, True]),
        row(shape=[2, -3]),
        row(shape=[2, 2.0]),
        row(shape=[2**40, 2**40]),
        row(dtype="int64"),
        row(kind="anything"),
        row(offset=1),
        row(offset=False),
        row(unit_rows=True, shape=[6]),
        row(kind="batchnorm_mean"),
        row()[:-1] + "," + row(offset=6)[1:],
        row(kind="buffer")[:-1] + "," + row(offset=6, name="v")[1:],
    ],
)
def test_json_that_is_no_manifest_is_refused(text):
    with pytest.raises(BadUpdate, match="manifest: "):
        Manifest.from_json(text)


def test_a_state_of_other_shapes_is_refused():
    manifest = manifest_of(built("moco"))
    state = built("moco").federated_state()
    name = manifest.entries[0].name
    with pytest.raises(ValueError, match=name):
        pack(state | {name: torch.zeros(1)}, manifest)
    with pytest.raises(ValueError, match="float32"):
        unpack(np.zeros(manifest.size), manifest)
