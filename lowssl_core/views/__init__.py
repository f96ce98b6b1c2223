"""Multi-crop views: boxes, magnitudes, the matched local size, and the pipelines that make them."""

from lowssl_core.views.batch import IMAGENET_MEAN, IMAGENET_STD, Views, normalize
from lowssl_core.views.cpu import CpuViews, read_for_views, render_view
from lowssl_core.views.device import DeviceViews, ImageBatch, pack_images
from lowssl_core.views.geometry import sample_boxes
from lowssl_core.views.parameters import (
    NUM_GLOBALS,
    PhotometricConfig,
    ViewParameters,
    ViewsConfig,
    sample_parameters,
)
from lowssl_core.views.scales import Measurement, matched_local_size, measure, pixel_scale_ratio

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "NUM_GLOBALS",
    "CpuViews",
    "DeviceViews",
    "ImageBatch",
    "Measurement",
    "PhotometricConfig",
    "ViewParameters",
    "Views",
    "ViewsConfig",
    "matched_local_size",
    "measure",
    "normalize",
    "pack_images",
    "pixel_scale_ratio",
    "read_for_views",
    "render_view",
    "sample_boxes",
    "sample_parameters",
]
