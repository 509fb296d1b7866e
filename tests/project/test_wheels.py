"""build_wheels.py: what it links against, what it refuses, and a wheel where one was built."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Functions that changed their version or appeared after glibc 2.28 and GCC 8.
YOUNG = """
#include <condition_variable>
#include <dlfcn.h>
#include <exception>
#include <sstream>
#include <sys/stat.h>
#include <thread>
extern "C" __attribute__((visibility("default"))) int answer() {
  struct stat facts;
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  std::exception_ptr error;
  std::thread thread([&] {
    const std::lock_guard<std::mutex> lock(mutex);
    try {
      throw std::bad_array_new_length();
    } catch (...) {
      error = std::current_exception();
    }
    done = true;
    changed.notify_one();
  });
  {
    std::unique_lock<std::mutex> lock(mutex);
    while (!done) changed.wait(lock);
  }
  thread.join();
  std::ostringstream text;
  try {
    std::rethrow_exception(error);
  } catch (const std::exception&) {
    text << 40 + (fstat(0, &facts) == 0 || dlsym(RTLD_DEFAULT, "no such function") == nullptr);
  }
  return std::stoi(std::move(text).str()) + 2;
}
"""


@pytest.fixture(scope="module")
def wheels():
    for tool in ("gcc", "g++", "ar", "objdump", "readelf"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    sys.path.insert(0, str(ROOT))
    import build_wheels

    sys.path.remove(str(ROOT))
    return build_wheels


@pytest.fixture(scope="module")
def libraries(wheels, tmp_path_factory):
    """The same code linked against this machine's libraries, and for older systems."""
    folder = tmp_path_factory.mktemp("libraries")
    wheels.write_older_system(folder / "older_system")
    (folder / "young.cpp").write_text(YOUNG)
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-shared", "young.cpp"]
    flags = ["-Lolder_system", "-Xlinker", "--exclude-libs=ALL", "-Wl,-z,defs"]
    links = {"young.so": ["-Wl,-rpath,/opt"], "older.so": flags}
    for name, link in links.items():
        subprocess.run([*command, *link, "-o", name], cwd=folder, check=True)
    return folder / "young.so", folder / "older.so"


def test_a_library_for_older_systems_needs_nothing_young(wheels, libraries):
    young, older = libraries
    assert wheels.check_library(older) == []
    faults = "\n".join(wheels.check_library(young))
    assert "/opt" in faults  # a folder of this machine
    # On a build machine of the age of the platform nothing would be young.
    if any(version.startswith("GLIBC_2.34") for _, version, _ in wheels.library_symbols(young)):
        assert "GLIBC_2.3" in faults


def test_a_library_for_older_systems_works_here(libraries):
    code = "import ctypes, sys; print([ctypes.CDLL(path).answer() for path in sys.argv[1:]])"
    ran = subprocess.run([sys.executable, "-c", code, *libraries], capture_output=True, text=True)
    assert ran.stdout == "[43, 43]\n", ran.stderr


def test_a_library_for_older_systems_exports_its_own_functions_alone(wheels, libraries):
    exported = {
        name for section, _, name in wheels.library_symbols(libraries[1]) if section == ".text"
    }
    assert "answer" in exported
    assert not {name for name in exported if "condition_variable" in name or name == "fstat"}


@pytest.mark.parametrize(
    ("version", "answer"),
    [
        ("GLIBC_2.28", True),
        ("GLIBC_2.29", False),
        ("GLIBC_2.2.5", True),
        ("GLIBC_PRIVATE", False),
        ("GLIBC_ABI_DT_RELR", False),
        ("GLIBCXX_3.4.24", True),
        ("GLIBCXX_3.4.25", False),
        ("CXXABI_1.3.12", False),
        ("libcudart.so.13", False),
        ("Base", False),
    ],
)
def test_the_limits_of_the_platform(wheels, version, answer):
    assert wheels.is_within_limits(version) == answer


def test_faults_of_a_wheel_are_found(wheels, libraries, tmp_path):
    def faults(name: str, files: dict[str, Path]) -> str:
        path = tmp_path / f"{name}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for file, source in files.items():
                archive.write(source, file)
        return "\n".join(wheels.check_wheel(path))

    young, older = libraries
    name = f"realign_fast-1.0+cpu-{wheels.TAG}"
    good = {"realign_fast-1.0+cpu.dist-info/METADATA": ROOT / "LICENSE"}
    good |= {f"realign_fast/{library}.abi3.so": older for library in ("_C", "_io")}
    assert faults(name, good) == ""
    assert "expected ['realign_fast/_C.abi3.so', 'realign_fast/_C_cuda" in faults(
        name.replace("+cpu", ""), good
    )
    assert "does not end with" in faults(name.replace("_2_28", "_2_17"), good)
    assert "folders" in faults(name, good | {"tests/test.py": ROOT / "LICENSE"})
    assert "libraries" in faults(name, good | {"realign_fast/libstdc++.so.6": older})
    assert "is tied to a folder" in faults(name, good | {"realign_fast/_C.abi3.so": young})


def test_built_wheels_are_good(wheels):
    found = sorted((ROOT / "dist").glob("*manylinux*.whl"))
    if not found:
        pytest.skip("no wheel in dist/: `python build_wheels.py` builds both")
    assert {wheel.name: wheels.check_wheel(wheel) for wheel in found} == {
        wheel.name: [] for wheel in found
    }
