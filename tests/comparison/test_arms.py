"""Arms: by name, of one's own, and refused where they are not matched."""

import pytest

from dae.comparison.arms import STANDARD, Arm, arm_config, parse_arms, require_matched
from dae.config import CompareConfig, Config, load_config
from dae.training import plan_stages


def test_standard_arms_train_for_equal_steps_with_the_decoders_they_name():
    config = Config()
    assert set(config.compare.arms) <= set(STANDARD)
    arms = parse_arms(CompareConfig(arms=list(STANDARD)))
    require_matched(config, arms)
    steps = {sum(s.config.max_train_steps for s in plan_stages(arm_config(config, arm))) for arm in arms}
    assert len(steps) == 1
    decoders = {arm.name: [s.decoder.family for s in plan_stages(arm_config(config, arm))] for arm in arms}
    assert decoders["dae-linear"] == ["linear", "full"] and decoders["weak"] == [config.auxiliary_decoder.family]
    assert decoders["dae-projection"] == ["projection", "full"] and decoders["dae-overlap"] == ["overlap", "full"]
    noisy = [stage.decoder.latent_noise for stage in plan_stages(arm_config(config, Arm("x", STANDARD["dae-noise"])))]
    assert noisy == [0.5, 0.0]  # the real decoder reads the latent as it is
    assert decoders["joint"] == ["full"] and decoders["joint_finetuned"] == ["full", "full"]
    assert config.method == "dae" and config.auxiliary_decoder.family == "narrow"  # the comparison's own is as it was


def test_an_arm_of_ones_own():
    (arm,) = parse_arms(
        CompareConfig(arms=["tiny: method=dae auxiliary_decoder.family=narrow auxiliary_decoder.width_factor=0.1"])
    )
    config = arm_config(Config(), arm)
    assert (arm.name, config.auxiliary_decoder.width_factor) == ("tiny", 0.1)
    require_matched(Config(), [arm])


@pytest.mark.parametrize(
    "arms, words",
    [
        (["jiont"], "no arm 'jiont'; did you mean 'joint'"),
        (["joint", "joint"], "different names"),
        ([], "at least one"),
        (["a b: method=dae"], "a name is made of"),
        (["joint: method=dae"], "'joint' is the name of a standard arm"),
    ],
)
def test_bad_names(arms, words):
    with pytest.raises(ValueError, match=words):
        parse_arms(CompareConfig(arms=arms))


def test_unmatched_arms_are_refused_with_all_differences():
    arms = [
        Arm("long", ("method=joint", "stage1.max_train_steps=7", "autoencoder.vq.codebook_size=8")),
        Arm("fine", ("method=weak",)),
        Arm("other", ("prior.width=32",)),
    ]
    with pytest.raises(ValueError, match="not matched") as refused:
        require_matched(Config(), arms)
    words = str(refused.value)
    assert "long in autoencoder.vq.codebook_size: 64 -> 8; stage1.max_train_steps: 1000 -> 7" in words
    assert "other in prior.width: 128 -> 32" in words and "fine" not in words
    with pytest.raises(ValueError, match="unknown key 'methd'"):
        require_matched(Config(), [Arm("x", ("methd=dae",))])


@pytest.mark.parametrize("override", ["stage2.train_batch_size=256", "stage1.loss.l1=1", "stage2.ema_decay=0.5"])
def test_stages_that_only_some_arms_would_have_are_refused(override):
    config = load_config(None, [override])
    with pytest.raises(ValueError, match=f"not matched: stage1 and stage2 differ in {override[7:].split('=')[0]}"):
        require_matched(config, parse_arms(config.compare))
    require_matched(config, parse_arms(CompareConfig(arms=["dae-linear", "dae-narrow"])))  # both do the same
    steps = load_config(None, ["stage1.max_train_steps=7", "stage2.loss.adversarial=0.1"])
    require_matched(steps, parse_arms(steps.compare))
