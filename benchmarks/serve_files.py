"""What benchmarks/serve.py sends and serves: photographs as JPEGs of several sizes, and exported encoders."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lowssl_core.evaluation.timm_models import untrained
from lowssl_core.export.exporting import export_encoder
from lowssl_core.photos import PHOTOGRAPHS, open_photos, read_photograph

# The first is what the models are compared on.
SIDES = [640, 256, 1280, 4032]
JPEG_QUALITY = 90


def write_photographs(folder: Path, side: int) -> list[Path]:
    """The packaged photographs as JPEGs whose longer side is `side` pixels, cut to 3 : 2 as cameras have it."""
    folder.mkdir(parents=True)
    paths = []
    for photograph in PHOTOGRAPHS:
        picture = Image.fromarray(read_photograph(photograph))
        width = min(picture.width, picture.height * 3 / 2)
        height = width * 2 / 3
        left, top = (picture.width - width) / 2, (picture.height - height) / 2
        size = (side, round(side * 2 / 3))
        paths.append(folder / f"{photograph.name}.jpg")
        picture.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)).save(
            paths[-1], quality=JPEG_QUALITY
        )
    return paths


def export_models(folder: Path, backbones: Sequence[str], precisions: Sequence[str]) -> dict[str, Path]:
    """Each backbone at 224 px in each precision, with the weights it starts from: speed does not ask what they are."""
    folder.mkdir(parents=True)
    tiles = open_photos(split="train")
    calibration = [tiles.read(index) for index in range(0, len(tiles), 7)]
    paths = {}
    for name in backbones:
        encoder = untrained(name)
        for precision in precisions:
            path = folder / f"{name}-{precision}.onnx"
            # Forced: random weights are no measure of what int8 loses.
            export_encoder(encoder, path, precision=precision, calibration=calibration, force=True)  # type: ignore[arg-type]
            paths[f"{name} {precision}"] = path
    return paths
