"""Families that publish code of their own beside their weights: Baichuan, Qwen 1, TeleChat 2, TeleFLM. Each is a
relative of Llama under other names; none of their code is run."""

from typing import Any

import torch.nn.functional as F

from cableway.workers.blocks.attention import ALiBi, Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import RMSNorm, Scale
from cableway.workers.models.config import DecoderConfig, Factor
from cableway.workers.models.llama import pre_norm
from cableway.workers.models.names import HF, Names, Target, concatenated, names
from cableway.workers.models.registry import arch, relative
