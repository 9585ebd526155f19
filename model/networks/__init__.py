"""The networks that can be served, by the `_class_name` of their config.json.

Those of other projects lie here, under the parameter names of their files.
"""

from collections.abc import Mapping
from typing import Any

from tminus.model.denoiser import Denoiser, NetConfig
from tminus.model.networks.dome272 import Dome272Config, Dome272UNet
from tminus.model.networks.lucidrains import LucidrainsConfig, LucidrainsUnet
from tminus.model.unet import UNet2D
from tminus.model.unet_config import CLASS_NAME, UNetConfig

OTHERS: Mapping[str, type[Dome272Config | LucidrainsConfig]] = {
    Dome272Config.CLASS_NAME: Dome272Config,
    LucidrainsConfig.CLASS_NAME: LucidrainsConfig,
}


def read_net_config(config: Mapping[str, Any]) -> NetConfig:
    """Read a config.json. Raises ValueError, which names the field and its value."""
    other = OTHERS.get(str(config.get("_class_name", CLASS_NAME)))
    return UNetConfig.from_dict(config) if other is None else other.from_dict(config)


def build(config: NetConfig) -> Denoiser:
    """Make the network of a config, with random weights."""
    if isinstance(config, UNetConfig):
        return UNet2D(config)
    if isinstance(config, Dome272Config):
        return Dome272UNet(config)
    assert isinstance(config, LucidrainsConfig)
    return LucidrainsUnet(config)
