"""The package as it installs, and the direction of its imports."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = (".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "runs")
HUGGING_FACE = ("accelerate", "datasets", "peft", "tokenizers", "transformers", "trl")
USE_IT = """
import json, torch, fastpo, fastpo.kernels.chunked, fastpo.kernels.fused
stats = fastpo.linear_logps(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([1, -100]))
files = [fastpo.__file__, fastpo.kernels.chunked.__file__, fastpo.kernels.fused.__file__]
print(json.dumps({"files": files, "logps": stats.logps.tolist()}))
"""


def python(code: str, cwd: Path, path: Path | None = None) -> Any:
    """The JSON that `code` prints last, run in a fresh process in `cwd` with `path` alone on PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    env |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def copy_source(to: Path) -> Path:
    shutil.copytree(ROOT, to, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return to


def assert_used_from(place: Path, used: dict[str, Any]) -> None:
    assert [Path(file).resolve().is_relative_to(place.resolve()) for file in used["files"]] == [True] * 3, used
    assert used["logps"] == pytest.approx([-1.3862944, 0])


def test_kernels_is_a_folder_without_a_package() -> None:
    """A top-level package `kernels` would shadow Hugging Face's, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "fastpo" / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")


def test_wheel(tmp_path: Path) -> None:
    source = copy_source(tmp_path / "source")
    modules = [path.relative_to(source).as_posix() for path in (source / "fastpo").rglob("*.py")]
    modules = [
        name for name in modules if not name.startswith("fastpo/kernels/")
    ]  # from Python 3.13 rglob enters links
    modules += [f"fastpo/kernels/{path.name}" for path in (source / "kernels").glob("*.py")]
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheels", source)
    [wheel] = (tmp_path / "wheels").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(name for name in names if name.endswith(".py")) == sorted(modules)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastpo"}

    pip("install", "--no-index", "--no-deps", "--target", tmp_path / "installed", wheel)
    shutil.rmtree(source)
    assert_used_from(tmp_path / "installed", python(USE_IT, cwd=tmp_path / "wheels", path=tmp_path / "installed"))


def test_editable_install_of_this_environment(tmp_path: Path) -> None:
    origins = [d.read_text("direct_url.json") for d in importlib.metadata.distributions(name="fastpo")]
    if {"url": ROOT.as_uri(), "dir_info": {"editable": True}} not in [json.loads(o) for o in origins if o]:
        pytest.skip("this environment has no editable install of this checkout (pip install -e .)")
    assert_used_from(ROOT, python(USE_IT, cwd=tmp_path))


def test_repository_root() -> None:
    assert_used_from(ROOT, python(USE_IT, cwd=ROOT))


def test_hugging_face_kernels_stays_visible_from_the_root(tmp_path: Path) -> None:
    """A regular package later on the path beats our folder, which is at most a namespace."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("marker = 'hf'\n")
    code = f"import sys, json; sys.path.append({str(tmp_path)!r}); import kernels, fastpo.kernels.chunked"
    assert python(code + "; print(json.dumps([sys.path[0], kernels.marker]))", cwd=ROOT) == ["", "hf"]


def test_installed_hugging_face_kernels_imports_from_the_root() -> None:
    if not list(importlib.metadata.distributions(name="kernels")):
        pytest.skip("Hugging Face's kernels is not installed")
    assert python("import json, kernels; print(json.dumps(callable(kernels.get_kernel)))", cwd=ROOT) is True


def test_import_loads_neither_triton_nor_hugging_face() -> None:
    loaded = "{name.split('.')[0] for name in sys.modules}"
    code = f"import json, sys, torch; before = {loaded}; import fastpo; print(json.dumps(sorted({loaded} - before)))"
    assert not {"triton", *HUGGING_FACE} & set(python(code, cwd=ROOT))


# A name covers itself and what lies below it; the standard library and a module's own submodules are always allowed.
# module -> (modules of ours, third-party packages) that it may import
MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    "fastpo.types": (set(), {"torch"}),
    "fastpo.files": (set(), set()),
    "fastpo.schedules": (set(), {"torch"}),
    "fastpo.links": (set(), {"torch"}),
    "fastpo.methods": (set(), set()),
    # regularizers names the config's type, for the type checker alone.
    "fastpo.config": ({"fastpo.links", "fastpo.methods", "fastpo.regularizers", "fastpo.schedules"}, set()),
    "fastpo.reference": (set(), {"torch"}),
    "fastpo.kernels": ({"fastpo.kernels"}, {"torch", "triton"}),
    "fastpo.op_checks": (set(), {"torch"}),
    "fastpo.ops": ({"fastpo.kernels", "fastpo.op_checks", "fastpo.reference", "fastpo.types"}, {"torch"}),
    "fastpo.vocab_parallel": ({"fastpo.ops", "fastpo.types"}, {"torch"}),
    "fastpo.shape_mode": ({"fastpo.ops"}, {"torch"}),
    "fastpo.scores": ({"fastpo.config", "fastpo.links", "fastpo.ops", "fastpo.types"}, {"torch"}),
    "fastpo.loss_inputs": ({"fastpo.config", "fastpo.links", "fastpo.scores", "fastpo.types"}, {"torch"}),
    "fastpo.losses": (
        {"fastpo.config", "fastpo.links", "fastpo.loss_inputs", "fastpo.schedules", "fastpo.scores", "fastpo.types"},
        {"torch"},
    ),
    "fastpo.heads": ({"fastpo.config", "fastpo.ops", "fastpo.types"}, {"huggingface_hub", "safetensors", "torch"}),
    "fastpo.regularizers": ({"fastpo.config", "fastpo.ops", "fastpo.schedules", "fastpo.types"}, {"torch"}),
    "fastpo.policy_gradient": (set(), {"torch"}),
    "fastpo.stages": (
        {"fastpo.config", "fastpo.heads", "fastpo.links", "fastpo.losses", "fastpo.ops", "fastpo.policy_gradient"}
        | {"fastpo.regularizers", "fastpo.schedules", "fastpo.scores", "fastpo.types"},
        {"torch"},
    ),
    "fastpo.rejection_sampling": (set(), set()),
    "fastpo.reranking": ({"fastpo.rejection_sampling"}, {"torch"}),
    "fastpo.calibration": ({"fastpo.links"}, {"torch"}),
    "fastpo.chat_templates": (set(), set()),
    "fastpo.freezing": (set(), {"torch"}),
    "fastpo.integrations.llamafactory_recipes.meanings": ({"fastpo.chat_templates", "fastpo.stages"}, set()),
    "fastpo.integrations.llamafactory_recipes.keys": ({"fastpo.integrations.llamafactory_recipes.meanings"}, set()),
    "fastpo.integrations.llamafactory_recipes.translation": (
        {"fastpo.integrations.llamafactory_recipes.keys", "fastpo.integrations.llamafactory_recipes.meanings"},
        {"torch", "yaml"},
    ),
    "fastpo.integrations.llamafactory_recipes.datasets": ({"fastpo.data"}, {"datasets", "numpy"}),
    "fastpo.lab.folder": (set(), set()),
    "fastpo.lab.kinds": (set(), set()),
    "fastpo.lab.planted_text": ({"fastpo.lab.kinds"}, set()),
    "fastpo.lab.planted_items": ({"fastpo.lab.kinds"}, {"torch"}),
    "fastpo.lab.statistics": (set(), {"scipy"}),
    "fastpo.lab.measures": (
        {"fastpo.calibration", "fastpo.lab.kinds", "fastpo.ops"},
        {"rouge_score", "sacrebleu", "scipy", "torch"},
    ),
}
# name -> the modules that may import it
ONLY_FROM: dict[str, tuple[str, ...]] = {
    "fastpo.kernels": ("fastpo.kernels", "fastpo.ops", "bench"),
    "fastpo.reference": ("fastpo.ops",),
    "fastpo.integrations": ("fastpo.integrations", "fastpo.from_recipe", "fastpo.recipe"),
    "fastpo.integrations.llamafactory": ("fastpo.integrations.llamafactory",),
    "fastpo.lab": ("fastpo.lab", "fastpo.cli"),
    "scipy": ("fastpo.lab",),
    "sacrebleu": ("fastpo.lab",),
    "rouge_score": ("fastpo.lab",),
    "llamafactory": ("fastpo.integrations.llamafactory",),
    "trl": ("fastpo.integrations", "bench"),
    "vllm": ("fastpo.vllm_backend",),
    "triton": (
        *("fastpo.kernels.autotune", "fastpo.kernels.backward_kernels", "fastpo.kernels.device"),
        *("fastpo.kernels.forward_kernels", "fastpo.kernels.fused", "bench.compile"),
    ),
}
# module -> what it must not import, not even through others
NEVER_REACHES: dict[str, tuple[str, ...]] = {
    "fastpo.kernels.chunked": ("fastpo.kernels.fused", "triton"),
    "fastpo.kernels.fused": ("fastpo.kernels.chunked",),
    "fastpo.scores": HUGGING_FACE,
    "fastpo.losses": HUGGING_FACE,
    "fastpo.policy_gradient": HUGGING_FACE,
    "fastpo.stages": HUGGING_FACE,
    "fastpo.memory": HUGGING_FACE,
    "fastpo.lab.report": HUGGING_FACE,
    "fastpo.lab.recommender": HUGGING_FACE,
    "fastpo": ("bench", "tests"),
}


def _modules() -> dict[str, Path]:
    paths = {path: path.relative_to(ROOT) for folder in ("fastpo", "bench") for path in (ROOT / folder).rglob("*.py")}
    paths |= {path: Path("fastpo", path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("*.py")}
    return {".".join(short.with_suffix("").parts).removesuffix(".__init__"): path for path, short in paths.items()}


def _imports(module: str, path: Path, modules: dict[str, Path]) -> set[str]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{base}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else base for name in names}
    return found


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What every module of ours imports, anywhere in its text."""
    modules = _modules()
    return {module: _imports(module, path, modules) for module, path in modules.items()}


def covers(names: Iterable[str], module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def below(module: str, imports: dict[str, set[str]]) -> set[str]:
    found = {name for name in imports if covers([module], name)}
    if not found:
        pytest.skip(f"{module} does not exist yet")
    return found


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_module_imports_only_what_it_may(module: str, imports: dict[str, set[str]]) -> None:
    ours, third_party = MAY_IMPORT[module]
    allowed = {module, *ours, *third_party, *sys.stdlib_module_names}
    for name in below(module, imports):
        assert not [imported for imported in imports[name] if not covers(allowed, imported)], name


@pytest.mark.parametrize("imported", ONLY_FROM)
def test_imported_only_from_where_it_may_be(imported: str, imports: dict[str, set[str]]) -> None:
    importers = {module for module, names in imports.items() if any(covers([imported], name) for name in names)}
    assert importers
    assert not [module for module in importers if not covers(ONLY_FROM[imported], module)]


@pytest.mark.parametrize("module", NEVER_REACHES)
def test_never_reaches(module: str, imports: dict[str, set[str]]) -> None:
    reached, pending = set(), below(module, imports)
    while pending:
        new = imports.get(pending.pop(), set()) - reached
        reached |= new
        pending |= new
    assert not [name for name in reached if covers(NEVER_REACHES[module], name)]
