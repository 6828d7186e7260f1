"""Two runs in one folder: the second is refused and told who is there; what a killed run left is taken over."""

import errno
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dae import lock
from dae.lock import FolderLock, require_lock, writes

HOLD = "import sys, time; from pathlib import Path; from dae.lock import FolderLock\n"
HOLD += "with FolderLock(Path(sys.argv[1]), 'prior'): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def start(tmp_path):
    """`start(program)`: a process that runs it and has said `held`."""
    running = []

    def begin(program=HOLD):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout.readline().strip() == "held"
        return process

    yield begin
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture(params=["kernel", "no kernel"])
def file_system(request, monkeypatch):
    """With the kernel's locks, and one that has none."""
    if request.param == "no kernel":

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    return request.param


def file(tmp_path):
    return tmp_path / "run" / ".prior.lock"


def test_nothing_stays(tmp_path, file_system):
    with FolderLock(tmp_path / "a" / "run", "prior") as held:
        assert held.path == tmp_path / "a" / "run" / ".prior.lock" and held.is_own()
        holder = json.loads(os.pread(held.descriptor, 10_000, 0))
        assert holder["pid"] == os.getpid() and holder["process"] == lock.process_start(os.getpid()) and holder["host"]
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_stays(tmp_path, file_system):
    with FolderLock(tmp_path / "run", "prior"):
        (tmp_path / "run" / "result").touch()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["result"]


def test_another_process_is_refused_and_told(tmp_path, start, file_system):
    process = start()
    before = file(tmp_path).read_text()
    for _ in range(2):
        with pytest.raises(FileExistsError) as caught, FolderLock(tmp_path / "run", "prior"):
            pass
        said = str(caught.value)
        assert said.startswith(f"{tmp_path / 'run'}: its prior is being written by process {process.pid} (-c ")
        assert "since 20" in said and "choose another output_dir" in said and "\n" not in said and "launcher" not in said
        assert file(tmp_path).read_text() == before
    with FolderLock(tmp_path / "run", "autoencoder"):  # another part is free
        pass


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_a_stale_lock_is_taken_over(tmp_path, start, file_system, ending, caplog):
    process = start()
    process.send_signal(ending)
    process.wait()
    assert file(tmp_path).is_file()
    with caplog.at_level("INFO"), FolderLock(tmp_path / "run", "prior"):
        assert json.loads(file(tmp_path).read_text())["pid"] == os.getpid()
    assert not file(tmp_path).exists() and [p.name for p in tmp_path.rglob("*")] == ["run"]
    assert f"process {process.pid}" in caplog.text or file_system == "no kernel"


def test_a_process_that_has_the_number_of_the_dead_one(tmp_path, file_system):
    """Numbers come again: only the same start is the same process."""
    with FolderLock(tmp_path / "run", "prior"):
        holder = json.loads(file(tmp_path).read_text())
    file(tmp_path).parent.mkdir()
    file(tmp_path).write_text(json.dumps(holder | {"process": "1"}))
    with FolderLock(tmp_path / "run", "prior"):
        pass
    assert not file(tmp_path).exists()


def test_what_cannot_be_known_is_refused_where_there_are_no_locks(tmp_path, monkeypatch):
    """A process of another machine, and a file without a name: the message says how to remove it."""
    monkeypatch.setattr(lock.fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    file(tmp_path).parent.mkdir()
    there = {"pid": 1, "machine": "another", "host": "node7", "process": "1", "since": "yesterday"}
    for content, words in ((json.dumps(there), "process 1 on node7, since yesterday"), ("", "a process that has just begun")):
        file(tmp_path).write_text(content)
        with pytest.raises(FileExistsError, match=f"{words}.*if that process is gone, delete .*prior.lock"):
            FolderLock(tmp_path / "run", "prior").__enter__()
        assert file(tmp_path).read_text() == content


@pytest.mark.parametrize("content", ["", "garbage", "[]", '{"pid": "x"}', "\0" * 9])
def test_a_damaged_file_is_taken_over(tmp_path, content):
    file(tmp_path).parent.mkdir()
    file(tmp_path).write_text(content)
    with FolderLock(tmp_path / "run", "prior"):
        assert json.loads(file(tmp_path).read_text())["pid"] == os.getpid()


def test_twice_in_one_process(tmp_path, start, file_system):
    """The second is refused, and its failure does not end the lock of the first for other processes."""
    with FolderLock(tmp_path / "run", "prior"):
        with pytest.raises(FileExistsError, match=f"written by process {os.getpid()}"):
            FolderLock(tmp_path / "run", "prior").__enter__()
        done = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path / "run")], capture_output=True, text=True)
        assert done.returncode == 1 and f"written by process {os.getpid()}" in done.stderr
    start()


def test_many_at_once(tmp_path, file_system):
    """Of processes that find a stale lock together, one has it at a time."""
    program = "import errno, sys, time; from pathlib import Path; from dae import lock\n"
    if file_system == "no kernel":
        program += "def none(*_): raise OSError(errno.ENOLCK, 'no locks')\nlock.fcntl.lockf = none\n"
    program += """
folder, got = Path(sys.argv[1]), 0
while got < 5:
    try:
        with lock.FolderLock(folder, 'prior'):
            alone = folder / 'alone'
            alone.touch(exist_ok=False)
            time.sleep(0.002)
            alone.unlink()
            got += 1
    except FileExistsError as error:
        assert 'is being written' in str(error), error
"""
    (tmp_path / "run").mkdir()
    file(tmp_path).write_text(json.dumps({"pid": 2**30, "machine": lock.machine(), "process": "1"}))
    running = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "run")]) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("variable", ["ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "HOME"])
def test_an_orphan_is_named(tmp_path, monkeypatch, variable):
    """The launcher was ended, the process it started was not told. One that outlives its shell (nohup, setsid) is no orphan."""
    for name in lock.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "no")
    gone = "" if variable == "HOME" else "whose launcher is gone: end it with `kill {}`"
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {HOLD!r}, sys.argv[1]]).wait()"
    process = subprocess.Popen([sys.executable, "-c", launcher, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "held"
    orphan = json.loads(file(tmp_path).read_text())["pid"]
    try:
        process.terminate()
        process.wait()
        with pytest.raises(FileExistsError, match=f"process {orphan} .*{gone.format(orphan)}") as caught:
            FolderLock(tmp_path / "run", "prior").__enter__()
        assert ("launcher" in str(caught.value)) == bool(gone)
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_forked_worker_does_not_release(tmp_path, start):
    """It holds copies of all there is; it may even unwind the stack of its parent."""
    held = FolderLock(tmp_path / "run", "prior").__enter__()
    if (child := os.fork()) == 0:
        held.__exit__()
        os._exit(0)
    os.waitpid(child, 0)
    assert held.is_own()
    done = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path / "run")], capture_output=True, text=True)
    assert "is being written" in done.stderr
    held.__exit__()
    start()


def test_a_link_is_locked_where_it_leads(tmp_path):
    (tmp_path / "disk" / "prior").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prior").symlink_to(tmp_path / "disk" / "prior")
    with FolderLock(tmp_path / "a", "prior"), pytest.raises(FileExistsError, match="is being written"):
        FolderLock(tmp_path / "b", "prior").__enter__()


def test_a_run_whose_folder_was_taken_stops(tmp_path):
    """`rm -r` of a folder in which an orphan still trains, and a new run there: the orphan must not write into it."""
    require_lock(tmp_path / "run", "prior")  # of a run without a lock nothing is required
    with FolderLock(tmp_path / "run", "prior"):
        require_lock(tmp_path / "run", "prior")
        file(tmp_path).unlink()
        with pytest.raises(FileExistsError, match=r"deleted while this run was writing.*so this one stops"):
            require_lock(tmp_path / "run", "prior")
        file(tmp_path).write_text("the other's")
        with pytest.raises(FileExistsError, match="deleted"):
            require_lock(tmp_path / "run", "prior")
    assert file(tmp_path).read_text() == "the other's"


def test_recipes(tmp_path, monkeypatch):
    """The first process locks, while the recipe runs; a recipe that only reads a missing folder does not make it."""

    def recipe(config, more=0):
        return more, sorted(p.name for p in tmp_path.rglob("*"))

    config = SimpleNamespace(output_dir=str(tmp_path / "run"))
    made = writes("prior", makes_folder=True)(recipe)
    assert made(config, more=3) == (3, [".prior.lock", "run"])
    assert writes("prior")(recipe)(config) == (0, [])
    for variable, size in (("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")):
        monkeypatch.setenv(variable, "1")
        assert made(config) == (0, [".prior.lock", "run"])  # a rank among no others is left over from something else
        monkeypatch.setenv(size, "2")
        assert made(config) == (0, [])
        monkeypatch.delenv(variable)
        monkeypatch.delenv(size)
    with pytest.raises(ZeroDivisionError):
        writes("prior", makes_folder=True)(lambda config: 1 / 0)(config)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        FolderLock(tmp_path / "file" / "run", "prior").__enter__()


def test_whoever_reads_the_file_does_not_end_the_lock(tmp_path):
    """POSIX ends a lock when its process closes any descriptor of the file; the name in it is still that of a live process."""
    with FolderLock(tmp_path / "run", "prior"):
        file(tmp_path).read_text()
        done = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path / "run")], capture_output=True, text=True)
        assert done.returncode == 1 and f"written by process {os.getpid()}" in done.stderr
