"""What is slow the first time, done in the process that all ranks are forked from. Starts no thread."""
# ruff: noqa: F401

from __future__ import annotations

import hydra._internal.core_plugins.basic_sweeper
from deepspeed.runtime.superoffload import superoffload_stage3
from deepspeed.runtime.zero.muon import muon_optimizer  # DeepSpeed asks of every optimizer whether it is this one
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.qwen2 import modeling_qwen2

from dtrain.config.compose import compose
from dtrain.config.validate import validate

validate(compose([]).values)
get_checkpoint_conversion_mapping("qwen2")
