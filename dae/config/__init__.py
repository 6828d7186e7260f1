"""The configuration of the chain: every knob (schema.py), and reading, checking and writing it (load.py)."""

from dae.config.load import describe, differing_keys, from_dict, load_config, save_config, with_overrides
from dae.config.schema import (
    AutoencoderConfig,
    CompareConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EvaluationConfig,
    KernelsConfig,
    KLConfig,
    LossConfig,
    MeasureConfig,
    OptimizationConfig,
    PriorConfig,
    SamplingConfig,
    StageConfig,
    VQConfig,
)

__all__ = [
    "AutoencoderConfig",
    "CompareConfig",
    "Config",
    "DataConfig",
    "DecoderConfig",
    "EvaluationConfig",
    "KLConfig",
    "KernelsConfig",
    "LossConfig",
    "MeasureConfig",
    "OptimizationConfig",
    "PriorConfig",
    "SamplingConfig",
    "StageConfig",
    "VQConfig",
    "describe",
    "differing_keys",
    "from_dict",
    "load_config",
    "save_config",
    "with_overrides",
]
