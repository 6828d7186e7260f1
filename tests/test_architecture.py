"""The house keeps its arrows: who imports whom, what imports with torch alone, and what is never written."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONTAINERS = ("kernels", "recipes", "profiling", "tests")
LIBRARY = sorted((ROOT / "dae").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
SCRIPTS = sorted(p for folder in ("recipes", "profiling") for p in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TORCH_ALONE = ("models", "quantizers", "losses", "sampling", "complexity", "diagnostics", "config", "priors")
TORCH_ALONE += ("distributed.py", "hub.py", "files.py")
HEAVY = {
    *("datasets", "accelerate", "omegaconf", "torchdata", "torchmetrics", "sklearn", "skimage", "scipy", "matplotlib"),
    *("huggingface_hub", "safetensors", "pyarrow", "PIL", "tqdm", "numpy", "triton"),
}


def imports(path: Path, everywhere: bool = True, root: Path = ROOT) -> list[tuple[str, bool]]:
    """Dotted names that a file imports, and whether at module level; `if TYPE_CHECKING` imports nothing.

    `from a.b import c` counts as a.b.c, which names a module or something in one.
    """
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, at_module_level: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_module_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative to the file
                package = path.parent.relative_to(root).parts
                module = ".".join([*package[: len(package) - node.level + 1], *([module] if module else [])])
            found.extend((f"{module}.{alias.name}", at_module_level) for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, at_module_level)
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for child in ast.iter_child_nodes(node):
                visit(child, at_module_level and not inside)

    visit(ast.parse(path.read_text(), str(path)), True)
    return [(name, level) for name, level in found if everywhere or level]


def top(name: str) -> str:
    return name.split(".")[0]


def offences(paths: list[Path], forbidden, everywhere: bool = True) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}" for path in paths for name, _ in imports(path, everywhere) if forbidden(name)
    ]


def below(*rooms: str) -> list[Path]:
    return [p for p in LIBRARY if p.relative_to(ROOT / "dae").parts[0] in rooms]


def names(*modules: str):
    """Whether a dotted name is one of these modules or lies in one."""
    return lambda name: any(name == m or name.startswith(m + ".") for m in modules)


def test_the_reader_of_imports(tmp_path):
    path = tmp_path / "a" / "b.py"
    path.parent.mkdir()
    path.write_text(
        "import x.y as z\nfrom . import c\nfrom .d import e\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import t\nelse:\n    import u\ntry:\n    import v\nexcept ImportError:\n    pass\n"
        "class C:\n    import w\n    def f(self):\n        from g.h import i\n"
    )
    at_top = ["x.y", "a.c", "a.d.e", "typing.TYPE_CHECKING", "u", "v", "w"]
    assert [name for name, level in imports(path, root=tmp_path) if level] == at_top
    assert [name for name, level in imports(path, root=tmp_path) if not level] == ["g.h.i"]


def test_kernels_import_torch_alone():
    """Arrow 1. fused*.py is the launching branch: triton at its top, and itself imported only inside functions."""
    for path in KERNELS:
        fused = path.name.startswith("fused")
        for name, at_module_level in imports(path):
            allowed = {"torch", "dae_kernels", *sys.stdlib_module_names}
            if fused or not at_module_level:
                allowed |= {"triton"}
            if not at_module_level:
                allowed |= {"flash_attn", "flash_attn_interface", "xformers"}
            assert top(name) in allowed, f"{path} imports {name}"
            assert fused or not (at_module_level and ".fused" in name), f"{path} imports {name} before it launches"


def test_operations_hold_the_same_files():
    """api.py checks, reference.py defines, autograd.py has the gradients, fused.py the kernels."""
    folders = {path.parent for path in KERNELS if path.parent.name not in ("dae_kernels", "kernels")}
    composed = {"mmd", "energy_distance"}  # sums over pairs, defined in pairwise, which is no operation of its own
    for folder in folders:
        files = {path.name for path in folder.glob("*.py")}
        assert ("api.py" in files) == (folder.name != "pairwise"), folder
        assert ("reference.py" in files) == (folder.name not in composed), folder
        assert folder.name not in composed or "dae_kernels.pairwise" in (folder / "api.py").read_text()
    for path in KERNELS:
        body = ast.parse(path.read_text()).body
        decorators = {ast.unparse(each) for node in body if isinstance(node, ast.FunctionDef) for each in node.decorator_list}
        bases = {ast.unparse(base) for node in body if isinstance(node, ast.ClassDef) for base in node.bases}
        if path.name != "autograd.py":
            assert "torch.autograd.Function" not in bases and "taken_whole" not in decorators, f"{path}: its place is autograd.py"
        if not path.name.startswith("fused"):  # or fused_<part>.py, where one file would be too long
            assert not any("triton.jit" in each for each in decorators), f"{path}: kernels stand in fused.py"
        calls = [ast.unparse(node.value.func) if isinstance(getattr(node, "value", None), ast.Call) else "" for node in body]
        registered = [call for call in calls if call == "register_op"]
        if registered:
            assert calls[-len(registered) :] == registered, f"{path}: operators are registered at the end, below what they run"
            assert path.name not in ("api.py", "autograd.py"), f"{path}: operators are registered where their body stands"


def test_the_library_never_imports_scripts():
    """Arrows 2 and 3."""
    assert not offences(LIBRARY + KERNELS, names(*CONTAINERS))
    assert not offences(KERNELS, names("dae"))
    assert not offences(SCRIPTS + TESTS, names("tests"))
    backends = names("triton", "flash_attn", "flash_attn_interface", "xformers")
    assert not offences(LIBRARY, backends), "back-ends belong to dae_kernels"


def test_no_circles():
    """Neither of files nor of rooms (`dae.data`, `dae.training`), imports inside of functions included."""
    modules = {}
    for path in LIBRARY + KERNELS:
        dotted = path.relative_to(ROOT / "kernels" if path in KERNELS else ROOT).with_suffix("").parts
        modules[".".join(dotted).removesuffix(".__init__")] = path

    def module(name: str) -> str:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    for depth in (None, 2):
        graph: dict[str, set[str]] = {}
        for own, path in modules.items():
            here = ".".join(own.split(".")[:depth])
            there = {".".join(module(name).split(".")[:depth]) for name, _ in imports(path)} - {here, ""}
            graph.setdefault(here, set()).update(there)
        graphlib.TopologicalSorter(graph).prepare()


def test_rooms_of_the_library():
    """Arrow 4."""
    assert not offences(below("config"), lambda name: top(name) in ("dae", "dae_kernels") and not name.startswith("dae.config."))
    assert not offences(below("models", "quantizers", "losses", "sampling", "metrics", "data"), names("dae.training"))
    assert not offences(below("models", "quantizers", "losses"), names("dae.data", "dae.sampling", "dae.metrics"))
    assert not offences(below("training"), names("argparse"))
    assert not offences([p for p in LIBRARY if p.name != "cli.py"], names("argparse"))


def test_pages_are_made_in_reporting():
    """Statistics know no page: reporting is imported by recipes alone."""
    assert not offences([p for p in LIBRARY if "reporting" not in p.parts], names("dae.reporting"))
    assert not offences([p for p in SCRIPTS if "profiling" in p.parts], names("dae.reporting"))
    tag = re.compile(r"</?(html|body|p|div|span|table|tr|td|th|ul|li|b|i|strong|em|h[1-6]|figure|img|a|section)(\s[^<>]*)?>")
    for path in [p for p in LIBRARY + SCRIPTS if "reporting" not in p.parts]:
        for node in ast.walk(ast.parse(path.read_text())):
            words = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            assert not tag.search(words), f"{path}:{node.lineno} makes HTML"


def test_nothing_heavy_at_module_level():
    assert len(below(*TORCH_ALONE)) > 12
    assert not offences(below(*TORCH_ALONE), lambda name: top(name) in HEAVY, everywhere=False)
    assert not offences(below("training"), lambda name: top(name) in HEAVY - {"tqdm"}, everywhere=False)


ALONE = """
import importlib.metadata, re, sys
def canonical(name):
    return re.sub("[-_.]+", "-", name).lower()

needed, queue = set(), ["torch"]
while queue:
    project = canonical(queue.pop())
    if project not in needed:
        needed.add(project)
        try:
            requirements = importlib.metadata.requires(project) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        queue += [re.match(r"[\\w.-]+", r)[0] for r in requirements if "extra ==" not in r]
provides = importlib.metadata.packages_distributions()
allowed = {m for m, projects in provides.items() if {canonical(p) for p in projects} & needed}
allowed -= {"triton", "numpy"}  # torch works without
allowed |= {"dae", "dae_kernels"} | set(sys.stdlib_module_names) | set(sys.builtin_module_names)

class Without:
    #A finder that finds nothing else: other packages are as if not installed
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return self.finder.find_spec(name, path, target) if name.split(".")[0] in allowed else None

sys.meta_path[:] = map(Without, sys.meta_path)
for blocked in ("numpy", "safetensors", "omegaconf", "accelerate", "datasets", "huggingface_hub"):
    try:
        __import__(blocked)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{blocked} is not blocked")
import torch
import dae.config, dae.distributed, dae.files, dae.hub, dae.losses, dae.models, dae.quantizers, dae.sampling, dae_kernels
from dae.config import AutoencoderConfig, PriorConfig
autoencoder = dae.models.Autoencoder(AutoencoderConfig(base_channels=8), 1, 8)
indices = autoencoder.eval().encode(torch.zeros(1, 1, 8, 8)).indices
prior = dae.models.ARPrior(PriorConfig(width=8, depth=1, num_heads=1), vocab_size=64, sequence_length=16, num_classes=2).eval()
assert autoencoder.decode_indices(dae.sampling.sample_tokens(prior, torch.tensor([0]))).sample.shape == (1, 1, 8, 8)
print("alone")
"""


def test_models_run_with_torch_alone():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE], capture_output=True, text=True)
    assert done.stdout.strip() == "alone", done.stderr


def test_containers_are_no_packages():
    for folder in CONTAINERS:
        found = sorted((ROOT / folder).rglob("__init__.py"))
        if folder == "kernels":
            found = [p for p in found if "dae_kernels" not in p.parts]
        assert not found, f"{folder} is a folder of scripts, not a package"
    packages = {p.parent for p in LIBRARY + KERNELS if p.name != "__init__.py" and p.parent != ROOT / "kernels"}
    assert all((p / "__init__.py").is_file() for p in packages), "every room of a package has its __init__.py"


def test_no_name_shadows_a_package():
    """A script's folder comes first on sys.path, and so does the root of the repository."""
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    installed |= {"profiling", "kernels", "transformers", "diffusers"}  # may be installed elsewhere; profiling is in Python 3.15
    for folder in (ROOT, ROOT / "recipes", ROOT / "profiling", ROOT / "tests", ROOT / "kernels"):
        packages = {p.parent.name for p in folder.glob("*/__init__.py")}
        modules = {p.stem for p in folder.glob("*.py")}
        assert not (packages | modules) & (installed - {"dae", "dae_kernels"}), f"in {folder}"


# Used without an import of ours: by the name of a tracker, or by other packages on our behalf.
INDIRECT = {
    "tensorboard": ("dae/config/schema.py", '"tensorboard"'),  # accelerate's tracker
}

# The storage of datasets; flash-attn 3, which no registry has; trackers that a user may have; and peers that benchmarks measure
# where somebody has them.
UNDECLARED = {"pyarrow", "wandb", "trackio", "flash_attn_interface", "flash_kmeans", "pykeops"}


def test_every_dependency_is_used_and_every_import_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {name_of(d) for d in project["dependencies"]}
    optional = {name_of(d) for extra in project["optional-dependencies"].values() for d in extra}
    modules = {
        **{"scikit-learn": "sklearn", "pillow": "PIL", "scikit-image": "skimage", "flash-attn": "flash_attn", "pot": "ot"},
        **{"vector-quantize-pytorch": "vector_quantize_pytorch", "pyyaml": "yaml"},
    }
    imported = {top(name) for path in LIBRARY + KERNELS + SCRIPTS for name, _ in imports(path)}
    unused = {d for d in declared if modules.get(d, d) not in imported}
    assert unused <= set(INDIRECT), f"declared, never imported: {unused - set(INDIRECT)}"
    for dependency in unused:
        file, trace = INDIRECT[dependency]
        assert trace in (ROOT / file).read_text(), f"{dependency} is not used in {file} any more"
    known = {modules.get(d, d) for d in declared | optional} | {"dae", "dae_kernels"} | set(sys.stdlib_module_names)
    known |= {path.stem for path in SCRIPTS}  # a script's folder is on its path
    assert not imported - known - UNDECLARED, "imported, not declared"


def name_of(requirement: str) -> str:
    for end in "<>=[;! ":
        requirement = requirement.split(end)[0]
    return requirement.lower()


def test_no_pickle():
    forbidden = {"torch.load", "torch.save", "pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    assert not offences(LIBRARY + KERNELS + SCRIPTS, lambda name: top(name) in forbidden or name in forbidden)
    for path in LIBRARY + KERNELS + SCRIPTS:
        legacy = path.name == "import_legacy.py"  # reads what other projects saved, and no object but tensors
        for node in ast.walk(ast.parse(path.read_text())):
            if legacy and isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{path}:{node.lineno} would run a pickle"
            elif isinstance(node, ast.Attribute) and not (legacy and ast.unparse(node) == "torch.load"):
                assert ast.unparse(node) not in forbidden, f"{path}:{node.lineno} uses {ast.unparse(node)}"
            if isinstance(node, ast.keyword):
                assert not (node.arg == "trust_remote_code" and ast.unparse(node.value) != "False"), path
                assert not (node.arg == "allow_pickle" and ast.unparse(node.value) != "False"), path
            if isinstance(node, ast.Name):
                assert node.id not in ("eval", "exec"), f"{path}:{node.lineno} uses {node.id}"


def test_user_errors_are_no_asserts():
    """`python -O` drops them, and they say nothing to a user."""
    for path in LIBRARY + KERNELS + SCRIPTS:
        lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not lines, f"{path}: assert in line {lines[0]}"


def test_files_stay_short():
    lines = {path: len(path.read_text().splitlines()) for path in LIBRARY + KERNELS + SCRIPTS + TESTS}
    assert not {str(path): count for path, count in lines.items() if count > (480 if path in TESTS else 400)}
