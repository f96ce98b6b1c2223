"""Devices are found or refused in a line, and a method is set up for one without a change to what it computes."""

import copy

import pytest
import torch

from lowssl_core.backbones import BackboneConfig
from lowssl_core.compute import ComputeConfig, choose_device, prepare, synchronise_batchnorm
from lowssl_core.errors import UserError
from lowssl_core.methods import METHODS, DINOConfig, MoCoConfig, SwAVConfig
from lowssl_core.methods.heads import Network
from lowssl_core.schedules import Progress
from lowssl_core.views import Views

BATCH = 4
SMALL = {
    "dino": DINOConfig(hidden=24, bottleneck=10, outputs=14),
    "swav": SwAVConfig(hidden=24, outputs=10, prototypes=14, queue_length=2 * BATCH),
    "moco": MoCoConfig(hidden=24, outputs=10, queue_length=3 * BATCH + 2),
}
CPU = torch.device("cpu")
START = Progress(step=0, total_steps=6, steps_per_epoch=2)


def built(name):
    torch.manual_seed(0)
    return SMALL[name].build(BackboneConfig(name="resnet_tiny"), BATCH)


def views():
    generator = torch.Generator().manual_seed(0)
    return Views(
        [torch.randn(BATCH, 3, 24, 24, generator=generator) for _ in range(2)],
        [torch.randn(BATCH, 3, 12, 12, generator=generator) for _ in range(2)],
    )


def networks(method):
    return [module for module in method.modules() if isinstance(module, Network)]


# Devices


def test_auto_is_the_accelerator_where_there_is_one_and_else_the_cpu():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["abacus", "", "cpu:x", "cuda:77", "xla", "hpu", "meta"])
def test_a_device_that_is_not_here_is_refused_in_one_line(name):
    with pytest.raises(UserError) as caught:
        choose_device(name)
    assert str(caught.value).startswith(f"--device {name}: not usable here")
    assert "\n" not in str(caught.value)


# Setting up


@pytest.mark.parametrize("name", METHODS)
def test_channels_last_changes_the_order_in_memory_and_nothing_else(name):
    plain = prepare(built(name), CPU, ComputeConfig(channels_last=False))
    method = prepare(built(name), CPU, ComputeConfig(channels_last=True))
    for network in networks(method):
        weights = [p for p in network.parameters() if p.ndim == 4]
        assert weights
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert all(p.is_contiguous() for network in networks(plain) for p in network.parameters())
    losses = []
    for each in (plain, method):
        torch.manual_seed(1)
        pairs = each(views(), START)
        losses.append(torch.cat([pairs.global_pairs, pairs.local_pairs]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_made_ready_to_train_whatever_mode_it_was_in(name):
    method = prepare(built(name).eval(), CPU, ComputeConfig())
    assert method.training
    assert all(module.training for module in method.modules())


def test_on_a_cpu_all_runs_in_fp32_whatever_the_precision():
    method = prepare(built("dino"), CPU, ComputeConfig(precision="bf16"))
    assert [network.autocast_dtype for network in networks(method)] == [None, None]
    assert {value.dtype for value in method.state_dict().values() if value.is_floating_point()} == {torch.float32}


def test_in_lower_precision_the_backbone_alone_runs_so():
    network = built("moco").online
    seen = {}
    network.backbone.conv1.register_forward_hook(lambda *call: seen.update(backbone=call[2].dtype))
    network.head[0][0].register_forward_hook(lambda *call: seen.update(head=call[2].dtype))
    network.autocast_dtype = torch.bfloat16
    outputs, features = network(views().globals, views().locals)
    assert seen == {"backbone": torch.bfloat16, "head": torch.float32}
    assert (outputs.dtype, features.dtype) == (torch.float32, torch.float32)


def test_compiling_is_asked_of_each_backbone_and_keeps_the_names_of_weights(monkeypatch):
    asked = []

    def compile_later(module):
        asked.append(module)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_later)
    method = built("dino")
    names = list(method.state_dict())
    prepare(method, CPU, ComputeConfig(compile=True))
    assert asked == [method.online.backbone, method.teacher.backbone]
    assert list(method.state_dict()) == names


def test_without_being_asked_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: pytest.fail("compiled"))
    method = built("moco")
    before = copy.deepcopy(method.state_dict())
    prepare(method, CPU, ComputeConfig())
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("backbone", ["mobilenetv2_tiny", "resnet_tiny"])
def test_synchronised_batchnorm_computes_the_same_function(name, backbone):
    torch.manual_seed(0)
    network = SMALL[name].build(BackboneConfig(name=backbone), BATCH).online.eval()
    expected, _ = network(views().globals, views().locals)
    converted = synchronise_batchnorm(network)
    kinds = {type(part) for part in converted.modules() if isinstance(part, torch.nn.modules.batchnorm._BatchNorm)}
    assert kinds
    assert all(issubclass(kind, torch.nn.SyncBatchNorm) for kind in kinds)
    assert torch.equal(converted(views().globals, views().locals)[0], expected)
