"""Semi-supervised fine-tuning: the whole network, with what can be kept of its head, on a few labelled images.

Tan et al. 2023, https://arxiv.org/abs/2210.02808, and its release; the lists are made like those of SimCLR, Chen et
al. 2020, https://arxiv.org/abs/2002.05709, section 4.2.
"""

import copy
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from lowssl_core.checkpoint import Branch, Checkpoint, backbone_state, tensors_below
from lowssl_core.errors import UserError
from lowssl_core.evaluation.labelled import Subset
from lowssl_core.evaluation.subjects import check_same_classes
from lowssl_core.evaluation.supervised import SupervisedRun, feature_width, new_classifier
from lowssl_core.evaluation.training_config import TrainingConfig
from lowssl_core.files import write_atomically
from lowssl_core.preprocess import Preprocess
from lowssl_core.sources import Source


@dataclass(frozen=True, kw_only=True)
class SemiConfig(TrainingConfig):
    """Fine-tuning; the defaults are the paper's for 1 % of the labels: a learning rate of .12 at a batch of 1024."""

    optimizer: Literal["lars", "sgd"] = "sgd"
    nesterov: bool = True
    base_lr: float = 0.03
    batch_size: int = 1024
    epochs: int = 60


def semi_config(share: float) -> SemiConfig:
    """The paper's values for a share of the labels: 60 epochs below 5 % (published for 1 %), else 30 (for 10 %)."""
    return SemiConfig() if share < 0.05 else SemiConfig(epochs=30)


def label_list(names: Sequence[str], labels: Sequence[int], share: float, seed: int) -> list[str]:
    """Choose a share of images, nearly as many of each class, at least one.

    share * N images, rounded down (ImageNet: 12,811 for 1 %, as published), come in equal numbers from all classes,
    and what is left over after division one each from some of them. A class with fewer images gives all it has. Within
    a class the images come in the order of sha256("SEED NAME"), so a list depends on seed, names and labels alone: not
    on the order of images, the machine, or the version of any library's random numbers.

    Args:
        names: (N,) of all images, each of them once.
        labels: (N,) their classes.
        share: of the images, above 0 and up to 1.
        seed: another one, another list.

    Returns:
        The chosen names, sorted.

    Raises:
        UserError: a share that cannot be.
    """
    if not 0 < share <= 1:
        raise UserError(f"a share of {share:g} of the labels: it is above 0 and up to 1")
    by_class: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
    for name, label in zip(names, labels, strict=True):
        by_class[label].append((hashlib.sha256(f"{seed} {name}".encode()).hexdigest(), name))
    ranked = [sorted(images) for _, images in sorted(by_class.items())]
    count = int(round(share * len(names), 6))  # .29 of 100 is 29, and not what floating point makes of it
    each, left = divmod(max(count, len(ranked)), len(ranked))
    chosen = [name for images in ranked for _, name in images[:each]]
    # The classes whose next image comes first in the same order give one more.
    chosen += [name for _, name in sorted(images[each] for images in ranked if len(images) > each)[:left]]
    return sorted(chosen)


def write_list(path: Path, names: Iterable[str]) -> None:
    """Write a list of images, a name on each line, atomically."""
    text = "".join(f"{name}\n" for name in names)
    write_atomically(path, lambda file: file.write(text.encode()))


def read_list(path: Path, source: Source) -> list[str]:
    """Read a list of images of `source`, a name on each line; returns the names that they have there.

    A line may also be the end of a name, from a folder on or the file alone, as in lists published for ImageNet.

    Raises:
        UserError: no such file, an empty one, or one with names that are no image's, or more than one's.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no list of images: it is not a text file") from None
    wanted = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not wanted:
        raise UserError(f"{path}: the list is empty; it takes a name on each line")
    found = _find_ends(set(wanted), source)
    for problem, bad in (
        ("are not in", [name for name in wanted if name not in found]),
        ("are the names of several images of", [name for name in wanted if len(found.get(name, ())) > 1]),
    ):
        if bad:
            shown = ", ".join(bad[:3]) + (" ..." if len(bad) > 3 else "")
            raise UserError(f"{path}: {len(bad)} of {len(wanted)} names {problem} {source.description}: {shown}")
    return list(dict.fromkeys(found[name][0] for name in wanted))


def head_layers(checkpoint: Checkpoint, branch: Branch) -> nn.Sequential:
    """The hidden layers of a checkpoint's head, with their BatchNorm and activations: all before its last Linear.

    DINO's head has two of them, MoCo's and SwAV's one.

    Raises:
        UserError: the method has no such branch.
    """
    backbone_state(checkpoint, branch)  # says it where there is none
    recipe = checkpoint.recipe
    method = recipe.method.build(recipe.backbone, recipe.data.batch_size)
    method.load_state_dict(tensors_below(checkpoint.tensors, "method."))
    network = method.online if branch == "student" else method.teacher
    assert network is not None, "its state is there"
    assert isinstance(network.head, nn.Sequential), "every method's head starts with its MLP"
    projection = network.head[0]
    assert isinstance(projection, nn.Sequential)
    return projection[:-1].requires_grad_(True)


def semi_run(
    backbone: nn.Module,
    head: nn.Sequential | None,
    preprocess: Preprocess,
    train: Source,
    names: Iterable[str],
    test: Source,
    config: SemiConfig,
    *,
    checkpoint: Path | None = None,
    workers: int = 0,
) -> SupervisedRun:
    """Make ready to fine-tune a copy of `backbone` and `head` with a new linear layer on top, all in training mode.

    Args:
        backbone: from (B, 3, S, S) to (B, width), on the device that is to be used.
        head: what `head_layers` gave; None: there is none, and the linear layer stands on the backbone.
        preprocess: what the backbone takes.
        train: labelled images.
        names: those of them that training may see.
        test: others of the same classes.
        config: how.
        checkpoint: see `SupervisedRun`.
        workers: see `SupervisedRun`.

    Raises:
        UserError: no labels, different classes, names that are not in `train`, and see `SupervisedRun`.
    """
    check_same_classes(train, test)
    device = next(backbone.parameters()).device
    layers = nn.Sequential() if head is None else copy.deepcopy(head)
    network = nn.Sequential()
    network.add_module("backbone", copy.deepcopy(backbone).requires_grad_(True))
    network.add_module("head", layers)
    network.to(device).eval()
    width = feature_width(network, preprocess.size)
    network.add_module("classifier", new_classifier(width, len(train.classes or ()), config.seed).to(device))
    return SupervisedRun(
        network,
        config,
        train=Subset(train, find_images(train, names)),
        test=test,
        preprocess=preprocess,
        notes=[_head_note(layers)],
        checkpoint=checkpoint,
        workers=workers,
    )


def find_images(source: Source, names: Iterable[str]) -> list[int]:
    """The places of images in a source, by their names, in the source's order.

    Raises:
        UserError: a name that is not there.
    """
    wanted = set(names)
    found = {name: index for index in range(len(source)) if (name := source.name(index)) in wanted}
    if missing := sorted(wanted - found.keys()):
        raise UserError(f"{len(missing)} images are not in {source.description}: {', '.join(missing[:3])}")
    return list(found.values())


def _find_ends(wanted: set[str], source: Source) -> dict[str, list[str]]:
    """The images' names that end in each wanted one, from a folder on; whole names are found before ends."""
    names = [source.name(index) for index in range(len(source))]
    found = {name: [name] for name in names if name in wanted}
    ends = wanted - found.keys()
    for name in names:
        parts = name.split("/")
        for start in range(1, len(parts)):
            if (end := "/".join(parts[start:])) in ends:
                found.setdefault(end, []).append(name)
    return found


def _head_note(layers: nn.Sequential) -> str:
    count = sum(isinstance(layer, nn.Linear) for layer in layers)
    if count == 0:
        return "no pre-trained head was given: a linear layer stands on the backbone (a checkpoint has the head)"
    return (
        f"the head is {count} pre-trained layer{'s' if count > 1 else ''} of the method's head and a new linear layer"
    )
