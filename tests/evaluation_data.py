"""Small labelled data of real photographs and small checkpoints for the tests of evaluation."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lowssl_core.backbones import BackboneConfig
from lowssl_core.checkpoint import save_checkpoint, take_checkpoint
from lowssl_core.loader import DataConfig
from lowssl_core.methods import DINOConfig, MethodConfig
from lowssl_core.photos import open_photos
from lowssl_core.recipe import Recipe
from lowssl_core.schedules import Progress

CLASSES = ("cat", "coffee", "tissue")


def write_data(root: Path, train: int = 8, test: int = 4, classes: tuple[str, ...] = CLASSES) -> Path:
    """Write root/SPLIT/CLASS/NN.png, so many tiles of each photograph; returns `root`."""
    for split, count in (("train", train), ("test", test)):
        photos = open_photos(split=split)
        assert photos.classes is not None
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            label = photos.classes.index(name)
            chosen = [i for i in range(len(photos)) if photos.label(i) == label]
            step = len(chosen) // count
            for number in range(count):
                pixels = photos.read(chosen[number * step])
                assert isinstance(pixels, np.ndarray)
                Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return root


def write_checkpoint(path: Path, config: MethodConfig | None = None, backbone: str = "resnet_tiny") -> Path:
    """Write a checkpoint of a method whose student and teacher differ; returns `path`."""
    recipe = Recipe(
        method=config or DINOConfig(hidden=8, bottleneck=8, outputs=6),
        backbone=BackboneConfig(name=backbone),
        data=DataConfig(batch_size=4),
        epochs=2,
    )
    torch.manual_seed(0)
    method = recipe.method.build(recipe.backbone, 4)
    with torch.no_grad():
        for number, parameter in enumerate(method.online.backbone.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    facts = {"data": {"images": 9, "description": "noise"}, "preprocess": {"size": 32, "resize": 37}}
    progress = Progress(step=3, total_steps=4, steps_per_epoch=2)
    checkpoint = take_checkpoint(method, recipe.optim.build(method), recipe=recipe, progress=progress, facts=facts)
    save_checkpoint(path, checkpoint)
    return path
