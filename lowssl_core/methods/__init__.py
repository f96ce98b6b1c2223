"""The self-supervised methods, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from lowssl_core.methods.dino import DINOConfig
from lowssl_core.methods.method import Method
from lowssl_core.methods.moco import MoCoConfig
from lowssl_core.methods.swav import SwAVConfig

MethodConfig = MoCoConfig | SwAVConfig | DINOConfig

METHODS: Mapping[str, type[MethodConfig]] = MappingProxyType(
    {config.name: config for config in (MoCoConfig, SwAVConfig, DINOConfig)}
)

__all__ = ["METHODS", "DINOConfig", "Method", "MethodConfig", "MoCoConfig", "SwAVConfig"]
