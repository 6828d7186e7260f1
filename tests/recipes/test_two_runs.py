"""A second run in a folder that a first one is writing: every recipe refuses, names it, and touches nothing."""

import subprocess
import sys

import pytest

PARTS = {
    "train_dae": "autoencoder", "encode": "encodings", "train_prior": "prior", "sample": "samples", "evaluate": "evaluation",
    "report": "report", "compare": "comparison", "measure_latent": "measure", "report_latent": "latent",
    "refit": "autoencoder",
}  # fmt: skip
HOLD = "import sys, time; from pathlib import Path; from dae.lock import FolderLock\n"
HOLD += "with FolderLock(Path(sys.argv[1]), sys.argv[2]): print('held', flush=True); time.sleep(600)"


@pytest.mark.parametrize("name", PARTS)
def test_the_second_is_refused(copied_chain, run, contents, name):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(copied_chain), PARTS[name]], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        before = contents(copied_chain)
        with pytest.raises(FileExistsError, match=rf"its {PARTS[name]} is being written by process {process.pid} \("):
            run(name, copied_chain, "resume_from_checkpoint=latest")
        assert contents(copied_chain) == before
    finally:
        process.kill()
        process.wait()


def test_every_recipe_locks_what_it_writes(recipe):
    """Each is wrapped; a new recipe belongs into the list above.

    evidence.py runs compare.py, and import_legacy.py writes no run but the folders that its arguments name.
    """
    from pathlib import Path

    written = {path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.py")} - {"evidence", "import_legacy"}
    assert written == set(PARTS)


def test_what_a_killed_run_left_is_cleaned(copied_chain, run):
    """Its lock, and its temporary files, of which nobody else may be writing one."""
    (copied_chain / ".autoencoder.lock").write_text('{"pid": 1073741824, "host": "here", "since": "then"}')
    (copied_chain / "autoencoder" / ".checkpoint-99.tmp").mkdir()
    for folder in (".", "stage1", ".checkpoint-99.tmp"):
        (copied_chain / "autoencoder" / folder / ".model.safetensors.1073741824.tmp").write_text("half")
    run("train_dae", copied_chain, "resume_from_checkpoint=latest")
    assert [path.name for path in copied_chain.rglob(".*")] == []


def test_a_run_stops_where_its_folder_was_taken(copied_chain, run, monkeypatch):
    """An orphan that trains on when its folder was deleted and begun anew writes no checkpoint into the new run."""
    from dae.training import Run

    record = Run.record

    def taken(self, *arguments, **options):
        (copied_chain / ".autoencoder.lock").unlink()
        record(self, *arguments, **options)

    monkeypatch.setattr(Run, "record", taken)
    (copied_chain / "autoencoder" / "checkpoint-16").rename(copied_chain / "aside")
    with pytest.raises(FileExistsError, match="so this one stops"):
        run("train_dae", copied_chain, "resume_from_checkpoint=latest")
    assert not (copied_chain / "autoencoder" / "checkpoint-16").exists()
