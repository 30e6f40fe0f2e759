"""How workers tell each other what they learned: what is sent, and how what arrives is combined."""

from leantrain.exchange.codecs.entropy import Entropy, decode, encode
from leantrain.exchange.codecs.key_frames import WeightReceiver, WeightSender
from leantrain.exchange.codecs.signs import OneBit, majority, pack_signs, unpack_signs
from leantrain.exchange.codecs.top_k import TopK
from leantrain.exchange.deep_gradient_compression import DeepGradientCompression
from leantrain.exchange.dense import Dense, FullyShard
from leantrain.exchange.entropy_coded import EntropyCoded
from leantrain.exchange.half_precision import HalfPrecision
from leantrain.exchange.local_sgd import DiLoCo, LocalSGD
from leantrain.exchange.majority_vote import MajorityVote
from leantrain.exchange.packet import PacketError
from leantrain.exchange.power_sgd import PowerSGD
from leantrain.exchange.projected import Projected
from leantrain.exchange.protocol import Exchange, Share
from leantrain.exchange.relay import Relay
from leantrain.exchange.robust.aggregators import (
    centered_clipping,
    coordinate_median,
    geometric_median,
    krum,
    multi_krum,
    nearest_neighbor_average,
    nearest_neighbor_mixing,
    trimmed_mean,
)
from leantrain.exchange.robust.monna import MoNNA
from leantrain.exchange.stragglers.coded_jobs import CodedJobs
from leantrain.exchange.stragglers.gradient_coding import GradientCoding
from leantrain.exchange.stragglers.planner import plan_scheme
from leantrain.exchange.stragglers.sequential_coding import MSGC, SRSGC

__all__ = [
    "MSGC",
    "SRSGC",
    "CodedJobs",
    "DeepGradientCompression",
    "Dense",
    "DiLoCo",
    "Entropy",
    "EntropyCoded",
    "Exchange",
    "FullyShard",
    "GradientCoding",
    "HalfPrecision",
    "LocalSGD",
    "MajorityVote",
    "MoNNA",
    "OneBit",
    "PacketError",
    "PowerSGD",
    "Projected",
    "Relay",
    "Share",
    "TopK",
    "WeightReceiver",
    "WeightSender",
    "centered_clipping",
    "coordinate_median",
    "decode",
    "encode",
    "geometric_median",
    "krum",
    "majority",
    "multi_krum",
    "nearest_neighbor_average",
    "nearest_neighbor_mixing",
    "pack_signs",
    "plan_scheme",
    "trimmed_mean",
    "unpack_signs",
]
