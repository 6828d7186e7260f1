"""A tracker that cannot start is one line before the first step, whatever it raises."""

import pytest

from dae.training.run import start_tracker


class UsageError(Exception):
    """Of no class that a recipe knows, as wandb's are."""


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (
            "wandb",
            UsageError("No API key configured.\nUse `wandb login` to log in."),
            "No API key.*wandb login.*WANDB_MODE=offline",
        ),
        ("trackio", ConnectionError("no\nroute"), "report_to=trackio cannot start.*no route.*report_to=none"),
        ("tensorboard", OSError(28, "No space left on device"), "No space left.*report_to=none"),
    ],
)
def test_one_line(name, error, words):
    class Accelerator:
        def init_trackers(self, *_, **__):
            raise error

    with pytest.raises(RuntimeError, match=words) as caught:
        start_tracker(Accelerator(), name, {})
    assert "\n" not in str(caught.value)
