"""How workers tell each other what they learned: what is sent, and how what arrives is combined."""

from leantrain.exchange.dense import Dense, FullyShard
from leantrain.exchange.projected import Projected
from leantrain.exchange.protocol import Exchange, Share

__all__ = ["Dense", "Exchange", "FullyShard", "Projected", "Share"]
