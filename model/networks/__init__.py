"""The supported networks. `_class_name` in config.json selects one of them.

Networks from other projects keep the parameter names of those projects.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tminus.model.denoiser import Denoiser, NetConfig
from tminus.model.networks.dome272 import Dome272Config, Dome272UNet
from tminus.model.networks.lucidrains import LucidrainsConfig, LucidrainsUnet
from tminus.model.unet import UNet2D
from tminus.model.unet_config import UNetConfig

NETWORKS: Mapping[type[NetConfig], Callable[[Any], Denoiser]] = {
    UNetConfig: UNet2D,
    Dome272Config: Dome272UNet,
    LucidrainsConfig: LucidrainsUnet,
}


def read_net_config(config: Mapping[str, Any]) -> NetConfig:
    """Read the config.json of any supported network. Raises ValueError with the field and its value."""
    by_name = {kind.CLASS_NAME: kind for kind in NETWORKS}
    return by_name.get(str(config.get("_class_name")), UNetConfig).from_dict(config)


def build(config: NetConfig) -> Denoiser:
    """Build the network for a config, with random weights."""
    return NETWORKS[type(config)](config)
