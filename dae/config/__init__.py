"""The configuration of the chain: every knob (schema.py), and reading, checking and writing it (load.py)."""

from dae.config.load import (
    RENAMED,
    Difference,
    config_differences,
    describe,
    from_dict,
    knobs,
    load_config,
    nearest_sibling,
    save_config,
    with_overrides,
)
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
