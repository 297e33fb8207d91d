"""Ways of fine-tuning that MDGD is compared with, for any model: both experiments use them."""

from reproductions.methods.lora import lora, lora_config
from reproductions.methods.model_tailor import tailor_
from reproductions.methods.penalties import ElasticWeights, PullTowards, diagonal_fisher
from reproductions.methods.replay import Replay

__all__ = ["ElasticWeights", "PullTowards", "Replay", "diagonal_fisher", "lora", "lora_config", "tailor_"]
