"""How much one request, and all requests together, may ask of the server."""

from dataclasses import dataclass
from functools import cached_property

from lowssl_core.images import ImageLimits


@dataclass(frozen=True, kw_only=True)
class ServingLimits:
    """Limits of `/embed`; each is checked before the work that it bounds.

    Attributes:
        max_body_bytes: of one request's body.
        max_images: of one request.
        max_in_flight: requests that are read or worked on at a time; more are refused.
        request_seconds: from a request's images to its answer.
        max_pixels: of one JPEG, which is decoded at a reduced size where it is large; other images may have half.
    """

    max_body_bytes: int = 10_000_000
    max_images: int = 64
    max_in_flight: int = 64
    request_seconds: float = 10.0
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_images", "max_in_flight", "request_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be more than 0")
        assert self.jpeg.max_pixels >= self.image.max_pixels  # ImageLimits refuses what leaves no image at all

    @cached_property
    def jpeg(self) -> ImageLimits:
        """What is accepted of a JPEG."""
        return ImageLimits(max_pixels=self.max_pixels)

    @cached_property
    def image(self) -> ImageLimits:
        """What is accepted of another format, or of pixels given as an array."""
        return ImageLimits(max_pixels=self.max_pixels // 2)
