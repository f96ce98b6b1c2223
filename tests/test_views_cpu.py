import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import skimage
import sklearn
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil

from lowssl_core.images import BadImage, Pixels
from lowssl_core.views import CpuViews, PhotometricConfig, ViewParameters, ViewsConfig, read_for_views, render_view
from lowssl_core.views.parameters import Adjustment

PACKAGES = {
    skimage: ("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/motorcycle_left.png"),
    sklearn: ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
SIZE = 96


def photographs() -> list[Pixels]:
    paths = [Path(str(package.__file__)).parent / name for package, names in PACKAGES.items() for name in names]
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


def crops() -> list[Pixels]:
    return [np.ascontiguousarray(photograph[100 : 100 + SIZE, 150 : 150 + SIZE]) for photograph in photographs()]


def load_yardstick() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "yardstick_views.py"
    spec = importlib.util.spec_from_file_location("yardstick_views", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rendered(image: Pixels, view: ViewParameters) -> Pixels:
    out = np.empty((view.size, view.size, 3), np.uint8)
    render_view(image, view, out)
    return out


def errors(ours: Callable[[Pixels], Pixels], theirs: Callable[[Image.Image], Image.Image]) -> NDArray[np.float64]:
    """Mean absolute difference, in levels of 0 to 255, on a piece of each photograph."""
    pairs = [(ours(crop), np.asarray(theirs(Image.fromarray(crop)))) for crop in crops()]
    return np.array([np.abs(a.astype(int) - b).mean() for a, b in pairs])


def whole(**changes: object) -> Callable[[Pixels], Pixels]:
    """A view of the whole piece at its own size, so that nothing but `changes` is done to it."""
    view = ViewParameters(box=(0, 0, SIZE, SIZE), size=SIZE, **changes)  # type: ignore[arg-type]
    return lambda crop: rendered(crop, view)


def test_a_view_without_changes_is_the_image() -> None:
    for crop in crops():
        np.testing.assert_array_equal(whole()(crop), crop)


@pytest.mark.parametrize(
    ("box", "size"), [((10, 20, 160, 180), 128), ((10, 20, 70, 90), 128), ((0, 0, 300, 451), 64), ((3, 5, 40, 40), 18)]
)
def test_resized_crops_are_pillows(box: tuple[int, int, int, int], size: int) -> None:
    for photograph in photographs():
        expected = pil.resized_crop(Image.fromarray(photograph), *box, [size, size], InterpolationMode.BICUBIC)
        difference = np.abs(rendered(photograph, ViewParameters(box=box, size=size)).astype(int) - np.asarray(expected))
        assert difference.mean() < 0.02
        assert difference.max() <= 2


def test_flips_are_pillows() -> None:
    assert errors(whole(flip=True), ImageOps.mirror).max() == 0


@pytest.mark.parametrize("factor", [0.2, 0.6, 0.9, 1.2, 1.4, 1.8])
@pytest.mark.parametrize(
    ("adjustment", "theirs"),
    [("brightness", pil.adjust_brightness), ("contrast", pil.adjust_contrast), ("saturation", pil.adjust_saturation)],
)
def test_color_adjustments_are_pillows_but_for_rounding(
    adjustment: Adjustment, theirs: Callable[[Image.Image, float], Image.Image], factor: float
) -> None:
    # Pillow cuts fractions off where this rounds: half a level on average.
    assert errors(whole(jitter=((adjustment, factor),)), lambda image: theirs(image, factor)).max() < 0.75


@pytest.mark.parametrize("turn", [-0.2, -0.1, -0.043, 0.02, 0.061, 0.1, 0.2])
def test_hue_is_pillows_within_a_step_of_its_byte(turn: float) -> None:
    # Pillow's turn is cut to a whole 255th, this one's rounded to a 256th.
    assert errors(whole(jitter=(("hue", turn),)), lambda image: pil.adjust_hue(image, turn)).max() < 2.5


def test_gray_and_solarized_are_pillows() -> None:
    assert errors(whole(gray=True), lambda image: pil.rgb_to_grayscale(image, 3)).max() < 0.01
    assert errors(whole(solarize=True), ImageOps.solarize).max() == 0


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0, 1.5, 2.0])
def test_blur_is_the_gaussian_and_close_to_pillows_boxes(radius: float) -> None:
    # Pillow stands three box blurs in for the Gaussian, which shows most at small radii.
    theirs = errors(whole(blur_radius=radius), lambda image: image.filter(ImageFilter.GaussianBlur(radius)))
    assert theirs.max() < 1.5
    offsets = np.arange(-10, 11)
    kernel = np.exp(-0.5 * (offsets / radius) ** 2) / np.exp(-0.5 * (offsets / radius) ** 2).sum()
    for crop in crops():
        padded = np.pad(crop.astype(float), ((10, 10), (10, 10), (0, 0)), mode="edge")
        rows = sum(
            weight * padded[10 + shift : 10 + shift + SIZE] for shift, weight in zip(offsets, kernel, strict=True)
        )
        exact = sum(
            weight * np.asarray(rows)[:, 10 + shift : 10 + shift + SIZE]
            for shift, weight in zip(offsets, kernel, strict=True)
        )
        assert np.abs(whole(blur_radius=radius)(crop) - np.asarray(exact)).mean() < 0.5


def test_whole_views_are_the_yardsticks() -> None:
    yardstick = load_yardstick()
    order: tuple[tuple[Adjustment, float], ...] = (
        ("contrast", 1.3),
        ("hue", 0.05),
        ("brightness", 1.2),
        ("saturation", 0.85),
    )
    chain = [pil.adjust_contrast, pil.adjust_hue, pil.adjust_brightness, pil.adjust_saturation]

    def theirs(image: Image.Image) -> Image.Image:
        for adjust, (_, factor) in zip(chain, order, strict=True):
            image = adjust(image, factor)
        for operation in (yardstick.GaussianBlur(1.0, (1.2, 1.2)), yardstick.Solarize(1.0)):
            image = operation(image)
        return image

    assert (
        errors(whole(jitter=order, blur_radius=1.2, solarize=True), theirs).max() < 3.5
    )  # most of it hue (1.1 to 2.8 measured)


def test_views_look_alike_on_average() -> None:
    """Thousands of pixels from both pipelines: the same brightness, spread and sharpness."""
    yardstick = load_yardstick()
    data = io.BytesIO()
    Image.fromarray(photographs()[2]).save(data, "JPEG", quality=95)
    config, rng, draws = ViewsConfig(global_size=64), np.random.default_rng(0), 60
    fast = CpuViews(config, 36)
    slow = yardstick.YardstickViews(config, 36)
    ours: list[list[float]] = []
    theirs: list[list[float]] = []
    for _ in range(draws):
        ours += [_statistics(view) for kind in fast(data.getvalue(), rng) for view in kind]
        for view in slow(data.getvalue()):
            pixels = view.permute(1, 2, 0).numpy() * (0.229, 0.224, 0.225) + (0.485, 0.456, 0.406)
            theirs.append(_statistics(255 * pixels))
    spread = np.sqrt((np.var(ours, axis=0) + np.var(theirs, axis=0)) / len(ours))
    assert (np.abs(np.mean(ours, axis=0) - np.mean(theirs, axis=0)) < 4 * spread).all()


def _statistics(view: NDArray[np.generic]) -> list[float]:
    pixels = view.astype(float)
    return [pixels.mean(), pixels.std(), np.abs(np.diff(pixels, axis=1)).mean()]


def test_shapes_types_and_sizes_are_those_of_the_recipe() -> None:
    fast = CpuViews(ViewsConfig(global_size=32, num_locals=3), 18)
    for image in (photographs()[0], photographs()[0][:9, :70]):
        globals_, locals_ = fast(image, np.random.default_rng(0))
        assert (globals_.shape, locals_.shape) == ((2, 32, 32, 3), (3, 18, 18, 3))
        assert globals_.dtype == locals_.dtype == np.uint8
    _, locals_ = CpuViews(ViewsConfig(global_size=32, num_locals=0), 18)(image, np.random.default_rng(0))
    assert locals_.shape == (0, 18, 18, 3)


def test_the_same_generator_gives_the_same_views() -> None:
    fast, image = CpuViews(ViewsConfig(global_size=48), 28), photographs()[1]
    before = image.copy()
    first, second = (fast(image, np.random.default_rng(3)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(fast(image, np.random.default_rng(4))[0], first[0])
    np.testing.assert_array_equal(image, before)


def test_bytes_and_pixels_give_the_same_views() -> None:
    fast, image = CpuViews(ViewsConfig(global_size=48), 28), photographs()[1]
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    for one, other in zip(
        fast(data.getvalue(), np.random.default_rng(0)), fast(image, np.random.default_rng(0)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_large_jpegs_are_decoded_smaller_and_lose_nothing_that_shows() -> None:
    data = io.BytesIO()
    Image.fromarray(cv2.resize(photographs()[5], (2560, 1708), interpolation=cv2.INTER_CUBIC)).save(data, "JPEG")
    plain = PhotometricConfig(jitter_probability=0, gray_probability=0, blur_probability=(0, 0, 0))
    config = ViewsConfig(global_size=64, photometric=plain)
    image, _ = read_for_views(data.getvalue(), config, 36, np.random.default_rng(0))
    assert image.shape == (214, 320, 3)  # an eighth
    small = CpuViews(config, 36)(data.getvalue(), np.random.default_rng(0))
    full = CpuViews(config, 36)(np.asarray(Image.open(data)), np.random.default_rng(0))
    for one, other in zip(small, full, strict=True):
        assert np.abs(one.astype(int) - other).mean() < 4


def test_an_image_without_pixels_to_spare_is_decoded_whole() -> None:
    data = io.BytesIO()
    Image.fromarray(photographs()[0]).save(data, "JPEG")
    image, parameters = read_for_views(data.getvalue(), ViewsConfig(), 128, np.random.default_rng(0))
    assert image.shape == (512, 512, 3)
    assert [view.size for view in parameters] == [224] * 2 + [128] * 6


def test_bad_images_are_said_to_be_bad() -> None:
    with pytest.raises(BadImage):
        CpuViews(ViewsConfig(), 128)(b"no image", np.random.default_rng(0))
