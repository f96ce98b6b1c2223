"""Where images come from: folders, zips, tar shards, torchvision data sets and the packaged photographs."""

from lowssl_core.sources.joined import JoinedSource, open_sources
from lowssl_core.sources.opening import open_source
from lowssl_core.sources.source import ArraySource, Image, Source

__all__ = ["ArraySource", "Image", "JoinedSource", "Source", "open_source", "open_sources"]
