"""Run a recipe from the command line: user errors are printed as one line, bugs keep their traceback."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, Callable

import dae_kernels
from tqdm import tqdm

import dae
from dae.config import Config, describe, load_config

MESSAGES = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError, MemoryError)
CONTINUE = "then continue with resume_from_checkpoint=latest"
WORKER_DIED = f"A process that decodes images died: if memory ran out, lower data.num_workers; {CONTINUE}"
OUT_OF_MEMORY = (
    "Memory ran out: lower train_batch_size (gradient_accumulation_steps keeps the global batch), evaluation.batch_size or "
    f"sampling.batch_size, set gradient_checkpointing=true, or choose a smaller model; {CONTINUE}"
)
ENVIRONMENT = "\nOf an error that tells what to do, only the message is shown; DAE_TRACEBACK=1 shows where it arose.\n"


def main(recipe: Callable[[Config], Any], doc: str, plan: Callable[[Config, str], list[str]] | None = None) -> None:
    """Call `recipe` with the command line's configuration; on failure exit with 2 and `<script>: error: <message>`.

    With `plan` there is an option `--plan [GPU]`, which prints the lines of `plan(config, GPU)` instead.

    User errors are those from a `raise` statement of this project, and OSErrors (full disk, missing permission). Anything
    else is a bug, ours or another library's, and keeps its traceback. Ctrl-C exits with 130.
    """
    (config, gpu), script = parse(doc + ENVIRONMENT, plans=plan is not None), Path(sys.argv[0])
    try:
        if plan is None or gpu is None:
            recipe(config)
        elif os.environ.get("RANK", "0") == "0":  # one process for all
            print("\n".join(plan(config, gpu)))
    except KeyboardInterrupt:
        if os.environ.get("DAE_TRACEBACK"):
            raise
        close_bars()
        print(f"{script.name}: interrupted; resume_from_checkpoint=latest continues a training", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)  # as a shell reports it
    except MESSAGES as error:
        close_bars()
        advice = advice_on(error)
        if os.environ.get("DAE_TRACEBACK") or not (advice or is_message(error, script)):
            raise
        processes = os.environ.get("WORLD_SIZE", "1")  # set by a launcher, possibly not to a number
        where = f" in process {os.environ.get('RANK', '?')} of {processes}" if processes != "1" else ""
        print(f"{script.name}: error{where}: {one_line(f'{str(error).strip()} {advice}')}", file=sys.stderr)
        sys.exit(2)


def one_line(message: object) -> str:
    """A message without its line breaks."""
    return " ".join(line for each in str(message).splitlines() if (line := each.strip()))


def close_bars() -> None:
    """Close progress bars, which would be redrawn below the message."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def advice_on(error: BaseException) -> str:
    """The remedy for an error of torch or Python that names none; empty for others."""
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):  # raised by torch's signal handler
        return WORKER_DIED
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)  # a GPU's, the CPU's
    return OUT_OF_MEMORY if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and of_torch) else ""


def is_message(error: BaseException, script: Path) -> bool:
    """Whether `error` is an OSError, or raised on purpose by dae, dae_kernels or the recipe `script`."""
    if isinstance(error, OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    ours = [Path(dae.__file__).parent, Path(dae_kernels.__file__).parent, script.resolve().parent]
    on_purpose = bool(frames) and (frames[-1].line or "").startswith("raise")  # rather than by a failing operation
    return on_purpose and any(folder in Path(frames[-1].filename).resolve().parents for folder in ours)


def config_from_command_line(doc: str, argv: list[str] | None = None) -> Config:
    """The configuration that `parse` finds."""
    return parse(doc, argv)[0]


def parse(doc: str, argv: list[str] | None = None, plans: bool = False) -> tuple[Config, str | None]:
    """Parse `--config file.yaml key=value ...`; `--help` prints `doc` and every key with type, default and meaning.

    With `plans` also `--plan [GPU]`; second is then the GPU's name, empty for this machine, None without the option.

    Without `--config` the digits chain is configured, so that each recipe runs without arguments.
    """
    rows = describe()
    width = max(len(r.key) for r in rows)
    keys = "\n".join(f"  {r.key:<{width}}  {r.type} = {'null' if r.default is None else r.default}\n      {r.help}" for r in rows)
    parser = argparse.ArgumentParser(
        description=doc, epilog=f"keys (type = default):\n{keys}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    digits = Path(sys.argv[0]).resolve().parent / "configs" / "digits.yaml"
    parser.add_argument("--config", default=digits if digits.is_file() else None, help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override, for example stage1.learning_rate=3e-4")
    if plans:
        parser.add_argument(
            "--plan", nargs="?", const="", metavar="GPU", help="train nothing: print what it would take here, or on this GPU"
        )
    arguments = parser.parse_intermixed_args(argv)
    gpu = getattr(arguments, "plan", None)
    if gpu is not None and "=" in gpu:  # no name: the first of the overrides
        gpu, arguments.overrides = "", [gpu, *arguments.overrides]
    try:
        return load_config(arguments.config, arguments.overrides), gpu
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}\n")
