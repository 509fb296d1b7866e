"""The build: what setup.py, CMakeLists.txt and the build backend agree on, and what they built."""

import fcntl
import json
import re
import runpy
import shutil
import site
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import setuptools

import realign_fast

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(realign_fast.__file__).parent / "_C.abi3.so"
BUILD_INFO = LIBRARY.with_name("_build_info.json")
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="no compiled library is installed")


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import build_backend

    return build_backend


@pytest.fixture
def run_setup(monkeypatch, backend):
    """Run setup.py without building; its globals, and under "arguments" those of setup()."""
    monkeypatch.chdir(ROOT)

    def run(compiler: str, cuda: str = "0") -> dict:
        arguments = {}
        monkeypatch.setattr(setuptools, "setup", arguments.update)
        monkeypatch.setattr(backend, "find_compiler", lambda: (compiler, "" if compiler else "why"))
        monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
        monkeypatch.setenv("REALIGN_FAST_CUDA", cuda)
        return {**runpy.run_path("setup.py"), "arguments": arguments}

    return run


def read(command: list[str]) -> list[str]:
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_type_information_is_packaged(monkeypatch):
    """Type checkers read the annotations of a package with this file only."""
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution()
    distribution.parse_config_files()
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    files = {folder: names for folder, _, _, names in build.data_files}
    assert "py.typed" in files["realign_fast"]


def test_a_build_names_the_commit_of_its_own_clone(run_setup, tmp_path, monkeypatch):
    commit = run_setup("c++")["commit"]
    assert bool(re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit())) == (ROOT / ".git").exists()
    (tmp_path / "vendored").mkdir()  # a source distribution in the clone of another project
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.chdir(tmp_path / "vendored")
    assert commit() == ""


# What setup.py and CMakeLists.txt say.


@pytest.mark.parametrize("name", ["SOURCES", "IO_SOURCES", "CUDA_SOURCES"])
def test_cmake_has_the_sources_of_setup(run_setup, name):
    command = rf"file\(GLOB(_RECURSE)? {name} CONFIGURE_DEPENDS (\S+)/(\S+)\)"
    ((recursive, folder, pattern),) = re.findall(command, cmake_text())
    paths = (ROOT / folder).rglob(pattern) if recursive else (ROOT / folder).glob(pattern)
    sources = run_setup("c++")[name]
    assert sources
    assert sources == sorted(str(path.relative_to(ROOT)) for path in paths)


def test_cmake_has_the_flags_of_setup(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import build_steps

    text = cmake_text()

    def arguments(function: str, target: str = "realign_fast") -> list[str]:
        return re.search(rf"{function}\({target} PRIVATE\s([^)]*)\)", text)[1].split()

    definitions = [f"-D{name}" for name in arguments("target_compile_definitions")]
    folders = [f"-I{name}" for name in arguments("target_include_directories")]
    options = arguments("target_compile_options")
    assert options == build_steps.COMPILE.split()
    assert [*definitions, *folders] == build_steps.STABLE.split()
    link_flags = [*arguments("target_link_options"), *arguments("target_link_libraries")]
    assert ["-shared", *link_flags] == build_steps.LINK.split()
    assert arguments("target_compile_options", "realign_fast_io") == [*options, "-pthread"]


def test_cmake_has_the_flags_of_the_cuda_build(backend):
    import build_cuda

    def arguments(function: str) -> list[str]:
        return re.search(rf"{function}\(realign_fast_cuda PRIVATE\s([^)]*)\)", cmake_text())[
            1
        ].split()

    assert [*arguments("target_compile_options"), "-DUSE_CUDA"] == build_cuda.COMPILE.split()
    assert arguments("target_compile_definitions")[0] == "USE_CUDA"
    (architectures,) = re.findall(r"set\(CMAKE_CUDA_ARCHITECTURES (.*)\)", cmake_text())
    assert architectures.replace("-real", "") == build_cuda.ARCHS


def cmake_text() -> str:
    return (ROOT / "CMakeLists.txt").read_text()


def test_a_wheel_claims_a_platform_only_for_a_library(run_setup, monkeypatch, backend):
    def extensions(compiler: str) -> list[str]:
        return [one.name for one in run_setup(compiler)["arguments"]["ext_modules"]]

    assert extensions("c++") == ["realign_fast._C", "realign_fast._io"]
    assert extensions("") == []
    monkeypatch.setattr(backend, "why_no_python_headers", lambda: "no Python.h")
    assert extensions("c++") == ["realign_fast._C"]


def test_a_second_build_of_a_folder_waits_for_the_first(backend, monkeypatch, tmp_path):
    """pip builds an editable package and a wheel at once in .ci/run, and compiles once."""
    import build_steps

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend, "find_ninja", lambda: "")
    Path("build").mkdir()
    steps = {"made": ([], "touch made")}
    second = threading.Thread(target=build_steps.run_steps, args=(steps,))
    with open("build/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second.start()
        second.join(0.1)
        assert second.is_alive() and not Path("made").exists()
    second.join(30)
    assert Path("made").exists()


def test_the_extra_test_brings_no_second_ninja():
    """The log of another version of ninja is refused, and everything is compiled anew."""
    extras = re.search(r"^test = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)[1]
    assert "pytest-xdist" in extras and "ninja" not in extras


# What was built.


def test_a_missing_library_has_its_reason():
    if LIBRARY.exists():
        return
    info = json.loads(BUILD_INFO.read_text())
    assert not info["compiled"]
    assert info["reason"] in realign_fast.backend_of("sum_rows", "cpu").why


@needs_library
def test_library_needs_only_the_stable_abi():
    undefined = [line.split() for line in read(["nm", "-D", "--undefined-only", str(LIBRARY)])]
    strong = [name for kind, name in undefined if kind == "U"]
    if any(name.startswith("__asan_") for name in strong):
        pytest.skip("AddressSanitizer puts its own symbols in the place of the C++ run time's")
    # Symbols of the C and C++ run time carry a version (@GLIBC_2.14).
    others = [name for name in strong if "@" not in name]
    shims = [name for name in others if re.match("(aoti_torch|torch)_", name)]
    assert shims
    assert others == shims


@needs_library
def test_library_is_of_no_python_version():
    symbols = [line.split()[-1] for line in read(["nm", "-D", str(LIBRARY)])]
    assert not [name for name in symbols if re.match("_?Py", name)]


@pytest.fixture
def module():
    """The file of the native reader, which is on Python's stable ABI."""
    path = LIBRARY.with_name("_io.abi3.so")
    if not path.exists():
        pytest.skip("no native reader is built, or it is for a Python without the GIL")
    return path


def test_the_reader_uses_python_alone_and_its_stable_abi(module):
    undefined = [line.split() for line in read(["nm", "-D", "--undefined-only", str(module)])]
    names = {name for kind, name in undefined if kind == "U" and "@" not in name}
    if any(name.startswith("__asan_") for name in names):
        pytest.skip("AddressSanitizer puts its own symbols in the place of the C++ run time's")
    # Names of Python's own beside `Py...` that every version has, because headers use them.
    private = {"_PyArg_ParseTupleAndKeywords_SizeT", "_Py_Dealloc", "_Py_NoneStruct"}
    assert {name for name in names if not name.startswith("Py")} == private


@pytest.mark.parametrize("minor", range(10, 16))
def test_the_reader_works_in_every_python(module, tmp_path, minor):
    """Other Pythons need no torch for it."""
    python = shutil.which(f"python3.{minor}")
    if not python or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no python3.{minor}")
    (tmp_path / "rows").write_bytes(bytes(range(256)) * 100)
    code = f"""
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
io = module_from_spec(spec_from_loader("_io", ExtensionFileLoader("_io", {str(module)!r})))
with open({str(tmp_path / "rows")!r}, "rb") as file:
    blocks = io.ShardReader(file.fileno(), 0, 25600, 1000)
    assert b"".join(map(bytes, blocks)) == bytes(range(256)) * 100
    try:
        io.read_chunks(file.fileno(), 0)
    except io.NotPlain as error:
        assert isinstance(error, ValueError)
"""
    ran = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@needs_library
def test_library_is_tied_to_no_folder():
    """An rpath to the torch of the build would load a second torch beside the user's."""
    entries = read(["readelf", "-d", str(LIBRARY)])
    assert any("libtorch_cpu.so" in entry for entry in entries)
    assert not [entry for entry in entries if "RPATH" in entry or "RUNPATH" in entry]


# What the backend finds.


def make_torch(folder: Path, version: str) -> str:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch/version.py").write_text(f"__version__ = '{version}'\ndebug = False\n")
    return str(folder)


@pytest.fixture
def places(monkeypatch, tmp_path, backend):
    """Empty every place where the backend looks for torch; set the user's site-packages by name."""

    def set_places(target=(), user_site="nowhere"):
        monkeypatch.setattr(sys, "path", [*target])
        monkeypatch.setattr(site, "getsitepackages", lambda prefixes: [])
        monkeypatch.setattr(site, "getusersitepackages", lambda: user_site)

    set_places()
    return set_places


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0+git12ab"])
def test_a_torch_that_is_there_is_used(backend, places, tmp_path, version):
    places([str(tmp_path / "empty"), make_torch(tmp_path, version)])
    assert backend.find_torch() == tmp_path / "torch"
    assert backend.torch_version(tmp_path / "torch") == version


def test_an_old_torch_is_refused_and_never_replaced(backend, places, tmp_path):
    places([make_torch(tmp_path, "2.9.1")])
    with pytest.raises(RuntimeError, match=r"torch >= 2\.10, .* holds 2\.9\.1"):
        backend.get_requires_for_build_wheel()


def test_an_old_torch_elsewhere_does_not_matter(backend, places, tmp_path):
    places(user_site=make_torch(tmp_path, "2.9.1"))
    assert backend.find_torch() is None


@pytest.mark.parametrize(
    ("compiler", "torch", "ninja", "wanted"),
    [
        ("c++", True, True, []),
        ("c++", True, False, ["ninja"]),
        ("c++", False, True, ["torch>=2.10"]),
        ("c++", False, False, ["torch>=2.10", "ninja"]),
        ("", False, False, []),
    ],
)
def test_the_build_asks_for_what_is_missing(
    backend, places, monkeypatch, tmp_path, compiler, torch, ninja, wanted
):
    places([make_torch(tmp_path, "2.13.0")] if torch else [])
    monkeypatch.setattr(backend, "find_compiler", lambda: (compiler, ""))
    monkeypatch.setattr(backend, "find_ninja", lambda: "ninja" if ninja else "")
    assert backend.get_requires_for_build_wheel() == wanted
    assert backend.get_requires_for_build_editable() == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="the library is built on Linux only")
def test_the_compiler_is_cxx_or_the_first_on_path(backend, monkeypatch):
    monkeypatch.setenv("CXX", "ccache g++")
    assert backend.find_compiler() == ("ccache g++", "")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: name if "g" in name else None)
    assert backend.find_compiler() == ("g++", "")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert backend.find_compiler() == ("", backend.NO_COMPILER)


def test_uv_tells_where_it_installs(backend, monkeypatch, tmp_path):
    monkeypatch.setenv("UV", "uv")
    for name in ("named/lib", "named/bin", "active/lib", "work/.venv/lib"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "named/bin/python").touch()
    (tmp_path / "cwd").symlink_to(tmp_path / "work")

    def found(command: str, variables: str) -> list[Path]:
        (tmp_path / "cmdline").write_text(command.replace(" ", "\0"))
        (tmp_path / "environ").write_text(variables.replace(" ", "\0"))
        return [Path(prefix).resolve() for prefix in backend._uv_prefix(tmp_path)]

    active = f"HOME=/ VIRTUAL_ENV={tmp_path}/active "
    assert found(f"uv pip install --python {tmp_path}/named/bin/python .", active) == [
        tmp_path / "named"
    ]
    assert found("uv pip install --python=../named .", active) == [tmp_path / "named"]
    assert found("uv pip install --python 3.12 .", active) == [tmp_path / "active"]
    assert found("uv pip install .", "HOME=/") == [tmp_path / "work/.venv"]
    monkeypatch.delenv("UV")
    assert found("pip install .", active) == []
