"""Every compressor of the registry, held to what it declares; a new one is tested by being listed."""

from __future__ import annotations

import pytest
import torch

from llava_fwd2bot import Fwd2BotConfig, add_fwd2bot, load_fwd2bot
from llava_fwd2bot.compressors import Compressor, compressors
from llava_fwd2bot.compressors.linear import Linear, Pool
