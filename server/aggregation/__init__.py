"""From devices' updates to the next global model: screening, aggregation and differential privacy, without torch."""

from collections.abc import Mapping
from types import MappingProxyType

from server.aggregation.means import FedAvgConfig, FedBuffConfig, LDAWAConfig
from server.aggregation.privacy import PrivateMeanConfig
from server.aggregation.robust import MedianConfig, MultiKrumConfig, TrimmedMeanConfig

AggregatorConfig = (
    FedAvgConfig | TrimmedMeanConfig | MedianConfig | MultiKrumConfig | LDAWAConfig | FedBuffConfig | PrivateMeanConfig
)

AGGREGATORS: Mapping[str, type[AggregatorConfig]] = MappingProxyType(
    {
        config.name: config
        for config in (
            FedAvgConfig,
            TrimmedMeanConfig,
            MedianConfig,
            MultiKrumConfig,
            LDAWAConfig,
            FedBuffConfig,
            PrivateMeanConfig,
        )
    }
)
