"""A simulation's parts: who gets which image, in which order, and the formulas of forgetting and transfer."""

import numpy as np
import pytest

from lowssl_core.errors import UserError
from server.aggregation.means import LDAWAConfig
from server.simulation.federations import federation_names, read_federation, separate
from server.simulation.link import SimulatedLink, Watch
from server.simulation.partition import class_shares, parse_partition, partition_images
from server.simulation.stream import make_stream, part_ends, place_of
from server.simulation.transfer import average_accuracy, backward_transfer, forgetting, forward_transfer

LABELS = np.repeat(np.arange(5), 120).tolist()
PARTITIONS = ("iid", "dirichlet:0.1", "dirichlet:100", "classes:2")


@pytest.mark.parametrize("text", PARTITIONS)
@pytest.mark.parametrize("images", [None, 40])
def test_each_image_goes_to_one_device_and_each_device_gets_as_many(text, images):
    given = partition_images(parse_partition(text), LABELS, 7, images=images, seed=3)
    together = np.concatenate(given)
    assert [len(each) for each in given] == [images or 600 // 7] * 7
    assert len(np.unique(together)) == len(together)
    assert set(together.tolist()) <= set(range(600))
    again = partition_images(parse_partition(text), LABELS, 7, images=images, seed=3)
    assert all(np.array_equal(one, other) for one, other in zip(given, again, strict=True))


def test_dirichlet_shares_are_numpys_and_images_are_drawn_by_them():
    # Of shares from Dir(alpha p) the mean is p and the variance p (1 - p) / (alpha + 1).
    uneven = np.repeat([0, 1, 2], [100, 300, 600]).tolist()
    ours = class_shares(parse_partition("dirichlet:2"), uneven, 20_000, np.random.default_rng(0))
    theirs = np.random.default_rng(1).dirichlet(2 * np.array([0.1, 0.3, 0.6]), size=20_000)
    np.testing.assert_allclose(ours.sum(axis=1), 1)
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(np.cov(ours.T), np.cov(theirs.T), atol=0.005)
    # Few images of many: no pool runs out, so that counts follow the shares.
    partition = parse_partition("dirichlet:0.5")
    labels = np.repeat(np.arange(4), 30_000).tolist()
    shares = class_shares(partition, labels, 6, np.random.default_rng([9, 6]))
    given = partition_images(partition, labels, 6, images=4000, seed=9)
    drawn = np.stack([np.bincount(np.asarray(labels)[each], minlength=4) / 4000 for each in given])
    np.testing.assert_allclose(drawn, shares, atol=0.03)


def test_iid_devices_are_alike_and_devices_of_few_classes_are_not():
    counts = [
        np.bincount(np.asarray(LABELS)[each], minlength=5)
        for each in partition_images(parse_partition("iid"), LABELS, 2, images=None, seed=0)
    ]
    assert np.abs(np.subtract(*counts)).max() < 50
    given = partition_images(parse_partition("classes:2"), LABELS, 5, images=100, seed=0)
    held = [set(np.asarray(LABELS)[each].tolist()) for each in given]
    assert [len(each) for each in held] == [2] * 5
    assert sorted(kind for each in held for kind in each) == sorted([*range(5)] * 2)  # each class has two devices


@pytest.mark.parametrize("text", ["", "iid:3", "dirichlet", "dirichlet:0", "dirichlet:nan", "classes:1.5", "classes:0"])
def test_a_partition_that_is_none_is_refused_in_one_line(text):
    with pytest.raises(UserError, match="wanted iid, dirichlet:ALPHA") as caught:
        parse_partition(text)
    assert "\n" not in str(caught.value)


def test_more_images_or_classes_than_there_are_is_refused():
    with pytest.raises(UserError, match="10 devices of 61 images: the data has 600 images"):
        partition_images(parse_partition("iid"), LABELS, 10, images=61, seed=0)
    with pytest.raises(UserError, match="classes:6: the data has 5 classes"):
        partition_images(parse_partition("classes:6"), LABELS, 2, images=None, seed=0)


def test_a_stream_brings_each_image_once_class_by_class():
    images = np.arange(0, 600, 4)
    stream = make_stream(images, LABELS, 3, np.random.default_rng(0))
    arriving = [stream.arriving(number, 8) for number in range(1, 9)]
    assert sorted(np.concatenate(arriving).tolist()) == images.tolist()
    assert part_ends(8, 3) == [2, 5, 8]
    assert [place_of(number, 8, 3)[0] for number in range(1, 9)] == [0, 0, 1, 1, 1, 2, 2, 2]
    for part, share in zip(stream.parts, stream.shares, strict=True):
        kinds, counts = np.unique(np.asarray(LABELS)[part], return_counts=True)
        np.testing.assert_allclose(share[kinds], counts / len(part))
        assert len(kinds) <= 3  # 5 classes of 30 images in 3 parts of 50
    np.testing.assert_allclose(stream.own_shares, np.bincount(np.asarray(LABELS)[images]) / len(images))
    # Another device goes through the classes in another order.
    other = make_stream(images, LABELS, 3, np.random.default_rng(1))
    assert not np.allclose(stream.shares, other.shares)


def test_transfer_is_what_a_hand_finds():
    # R[i, j]: accuracy on part j after part i. b: before any.
    accuracies = np.array([[0.6, 0.3, 0.2], [0.7, 0.5, 0.4], [0.5, 0.6, 0.8]])
    start = np.array([0.1, 0.1, 0.3])
    assert average_accuracy(accuracies) == pytest.approx((0.5 + 0.6 + 0.8) / 3)
    assert backward_transfer(accuracies) == pytest.approx(((0.5 - 0.6) + (0.6 - 0.5)) / 2)
    assert forward_transfer(accuracies, start) == pytest.approx(((0.3 - 0.1) + (0.4 - 0.3)) / 2)
    # Part 1 has been at .7 and is at .5 now, part 2 at .5 and is at .6.
    assert forgetting(accuracies) == pytest.approx(((0.7 - 0.5) + (0.5 - 0.6)) / 2)
    one = accuracies[:1, :1]
    assert (average_accuracy(one), backward_transfer(one), forward_transfer(one, start[:1]), forgetting(one)) == (
        0.6,
        None,
        None,
        None,
    )


def test_federations_are_read_strictly():
    for name in federation_names():
        assert read_federation(name, []).plan.rounds.min_devices == 1
    recipe, federation = separate(
        ["optim.base_lr=1", "federation.aggregator.name=l_dawa", "federation.learner.tau=0.5"]
    )
    assert recipe == ["optim.base_lr=1"]
    settings = read_federation("l-dawa", federation)
    assert isinstance(settings.plan.aggregator, LDAWAConfig)
    assert settings.learner == {"tau": 0.5}
    for override, said in {
        "rounds.speed=3": "federation: unknown key rounds.speed",
        "aggregator.name=mode": "federation: aggregator.name is 'mode'; it is one of fedavg",
        "aggregator.momentum=2": "federation: aggregator.momentum is 2",
        "rounds=3": "federation: rounds is 3; it is a table",
        "aggregator.name=private_mean": "federation: privacy is given exactly where",
    }.items():
        with pytest.raises(UserError, match=said) as caught:
            read_federation("fedavg", [override])
        assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match="federation: 'nothing' is neither a TOML file nor one of fedavg, fedema, l-dawa"
    ):
        read_federation("nothing", [])


def test_participants_follow_from_seed_and_round_alone():
    watch = Watch(on_step=lambda: None, on_device=lambda: None)

    def present(number: int) -> list[str]:
        link = SimulatedLink(dict.fromkeys("abcdefgh"), participants=3, seed=1, watch=watch)
        link.open_round(number)
        return list(link.devices())

    rounds = [present(number) for number in range(20)]
    assert rounds == [present(number) for number in range(20)]
    assert all(len(set(each)) == 3 for each in rounds)
    assert {name for each in rounds for name in each} == set("abcdefgh")
    with pytest.raises(UserError, match="too few devices"):
        SimulatedLink(dict.fromkeys("ab"), participants=None, seed=1, watch=watch).receive(1.0)
