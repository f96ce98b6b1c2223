"""The moving average of the teacher against a loop over its entries."""

import copy

import pytest
import torch
from torch import nn

from lowssl_core.ema import update_ema


def small_network(seed):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network[1].running_mean.normal_()
    network[1].running_var.uniform_(0.5, 2)
    network[1].num_batches_tracked.fill_(seed + 1)
    return network


def pair():
    target, online = small_network(0), small_network(1)
    for parameter in target.parameters():
        parameter.requires_grad_(False)
    return target, online


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.996, 0.999, 1.0])
def test_each_entry_moves_by_one_minus_momentum(momentum):
    target, online = pair()
    before = copy.deepcopy(target)
    update_ema(target, online, momentum)
    for got, old, new in zip(target.parameters(), before.parameters(), online.parameters(), strict=True):
        got_entries = got.flatten().tolist()
        entries = zip(got_entries, old.flatten().tolist(), new.flatten().tolist(), strict=True)
        for got_entry, old_entry, new_entry in entries:
            assert got_entry == pytest.approx(momentum * old_entry + (1 - momentum) * new_entry, rel=1e-5, abs=1e-6)


def test_buffers_stay_the_targets_own():
    target, online = pair()
    before = {name: buffer.clone() for name, buffer in target.named_buffers()}
    update_ema(target, online, 0.5)
    after = dict(target.named_buffers())
    assert set(after) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    for name, buffer in before.items():
        assert torch.equal(after[name], buffer), name


def test_online_network_is_left_alone():
    target, online = pair()
    before = copy.deepcopy(online.state_dict())
    update_ema(target, online, 0.5)
    for name, tensor in online.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.requires_grad and parameter.grad is None for parameter in online.parameters())


def test_updates_leave_no_graph_and_keep_the_same_tensors():
    target, online = pair()
    identities = [id(parameter) for parameter in target.parameters()]
    update_ema(target, online, 0.9)
    assert [id(parameter) for parameter in target.parameters()] == identities
    assert all(parameter.grad_fn is None and not parameter.requires_grad for parameter in target.parameters())


def test_distance_to_a_resting_network_shrinks_geometrically():
    target, online = pair()
    distances = [new - old for old, new in zip(target.parameters(), online.parameters(), strict=True)]
    for _ in range(5):
        update_ema(target, online, 0.8)
    for distance, got, goal in zip(distances, target.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(goal - got, 0.8**5 * distance, rtol=1e-4, atol=1e-6)


def test_memory_formats_may_differ():
    target, online = pair()
    expected = 0.25 * target[0].weight + 0.75 * online[0].weight
    online.to(memory_format=torch.channels_last)
    update_ema(target, online, 0.25)
    torch.testing.assert_close(target[0].weight, expected.detach())
