"""The arms of a comparison, and the check that they differ only in how the encoder is trained."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass

from dae.config import CompareConfig, Config, StageConfig, config_differences, knobs, with_overrides
from dae.training import plan_stages


@dataclass(frozen=True)
class Arm:
    """One way to train the autoencoder: a name, and its overrides of the comparison's configuration."""

    name: str
    overrides: tuple[str, ...]


STANDARD = {
    "joint": ("method=joint",),
    "joint_dropout": ("method=joint_dropout",),
    "joint_finetuned": ("method=joint_finetuned",),
    "weak": ("method=weak",),
    "dae-linear": ("method=dae", "auxiliary_decoder.family=linear"),
    "dae-overlap": ("method=dae", "auxiliary_decoder.family=overlap"),
    "dae-projection": ("method=dae", "auxiliary_decoder.family=projection"),
    "dae-narrow": ("method=dae", "auxiliary_decoder.family=narrow"),
    "dae-shallow": ("method=dae", "auxiliary_decoder.family=shallow"),
    "dae-dropout": ("method=dae", "auxiliary_decoder.family=dropout"),
    "dae-noise": ("method=dae", "auxiliary_decoder.family=full", "auxiliary_decoder.latent_noise=0.5"),
    "dae-mask": ("method=dae", "auxiliary_decoder.family=full", "auxiliary_decoder.latent_mask=0.5"),
}


def parse_arms(config: CompareConfig) -> list[Arm]:
    """Parse `compare.arms`: names of `STANDARD`, or `name: key=value key=value`.

    Raises:
        ValueError: no arm, an unknown name (the nearest is suggested), or a repeated one.
    """
    arms = []
    for words in config.arms:
        name, colon, overrides = (part.strip() for part in words.partition(":"))
        if not colon and name not in STANDARD:
            near = difflib.get_close_matches(name, STANDARD, 1, 0.0)[0]
            raise ValueError(
                f"compare.arms: no arm {name!r}; did you mean {near!r}? Known: {', '.join(STANDARD)}; "
                "one of your own is `name: key=value key=value`"
            )
        if colon and name in STANDARD:
            raise ValueError(f"compare.arms: {name!r} is the name of a standard arm ({' '.join(STANDARD[name])}); choose another")
        if not name or any(not (c.isalnum() or c in "-_.") for c in name):
            raise ValueError(f"compare.arms: a name is made of letters, digits, '-', '_' and '.', got {name!r}")
        arms.append(Arm(name, tuple(overrides.split()) if colon else STANDARD[name]))
    names = [arm.name for arm in arms]
    if not arms or len(set(names)) < len(names):
        raise ValueError(f"compare.arms: expected different names, at least one, got {names}")
    return arms


def arm_config(config: Config, arm: Arm, *further: str) -> Config:
    """The configuration that trains `arm`, with `further` overrides. ValueError: an unknown key."""
    return with_overrides(config, [*arm.overrides, *further])


def require_matched(config: Config, arms: list[Arm]) -> None:
    """Check that arms differ only in how the encoder is trained: in knobs with the role `arm`.

    Raises:
        ValueError: they do not; lists each arm's other differences from the comparison's configuration.
    """
    problems, roles = [], {key: row.role for key, row in knobs().items()}
    for arm in arms:
        if found := [str(d) for d in config_differences(config, arm_config(config, arm)) if roles[d.key] != "arm"]:
            problems.append(f"{arm.name} in {'; '.join(found)}")
    if problems:
        held = {key.partition(".")[0] for key, role in roles.items() if role != "arm"}
        free = dict.fromkeys(
            key if key.partition(".")[0] in held else re.sub(r"\..*", ".*", key) for key, role in roles.items() if role == "arm"
        )
        raise ValueError(
            f"the arms are not matched: {'. '.join(problems)}. An arm may change {' and '.join(free)}; change the rest for all "
            "arms alike, in the configuration"
        )
    # One-stage arms are optimised by stage1: different settings in stage2 would affect only the two-stage arms.
    alike = ("length", "second stage")
    second = StageConfig(**{f.name: getattr(config.stage2, f.name) for f in dataclasses.fields(StageConfig)})
    between = [str(d) for d in config_differences(config.stage1, second) if roles[f"stage1.{d.key}"] not in alike]
    if between and len({len(plan_stages(arm_config(config, arm))) for arm in arms}) > 1:
        raise ValueError(
            f"the arms are not matched: stage1 and stage2 differ in {'; '.join(between)}, and arms of one stage train as "
            "stage1 does from first to last. Give both stages the same"
        )
