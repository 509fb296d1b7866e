"""Build and check the wheels of a release: ``python build_wheels.py [cpu] [cuda] [--out dist]``.

Each wheel serves every Python >= 3.10 with a GIL, torch >= 2.10 and Linux on x86-64 with glibc
2.28 or later, and needs no compiler. "cuda" holds the CUDA library of every architecture beside the
CPU library; "cpu" holds the CPU library alone, and its version ends with "+cpu".

No container is needed. The libraries are compiled by this machine's compilers and linked against
stand-ins for its libc, libm and libstdc++, which name nothing that is younger than `LIMITS`. The
few functions that older systems lack are linked into the libraries: those of C++ from
libstdc++.a, and those of C from `OLDER_LIBC`. ``--check WHEEL`` only checks a wheel.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

PLATFORM = "manylinux_2_28_x86_64"
TAG = f"cp310-abi3-{PLATFORM}"
# The newest versions of symbols that this platform has (PEP 600, and the policies of auditwheel).
LIMITS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
SYSTEM_LIBRARIES = {
    "libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2",
    "libpthread.so.0", "libdl.so.2", "librt.so.1",
}  # fmt: skip
TORCH_LIBRARIES = {"libtorch.so", "libtorch_cpu.so"}
# glibc 2.28 has no function fstat, and cannot say that a process has one thread.
OLDER_LIBC = """
#include <sys/stat.h>
extern int __fxstat(int, int, struct stat*);
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
__attribute__((visibility("hidden"))) int fstat(int file, struct stat* out) {
  return __fxstat(1, file, out);
}
"""
# Bytes of a wheel; the CUDA library makes up most of the larger one.
MAX_BYTES = {"cpu": 6 << 20, "cuda": 30 << 20}


def version_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a version, such as (2, 34) for "2.34"."""
    return tuple(map(int, text.split(".")))


def is_within_limits(version: str) -> bool:
    """Return whether a version such as "GLIBC_2.28" exists on the oldest supported system."""
    family, _, numbers = version.partition("_")
    limit = LIMITS.get(family, ())
    return numbers.replace(".", "").isdigit() and version_numbers(numbers) <= limit


def library_symbols(library: Path) -> list[tuple[str, str, str]]:
    """Return (section, version, name) of each dynamic symbol of a library; "Base" is no version."""
    table = output_of("objdump", "-T", str(library))
    version_and_name = r"(?:\(?([\w.]+)\)? +)?(?:0x\w+ )?(?:\.\w+ )?(\S+)"
    pattern = rf"^[0-9a-f]+ .{{7}} (\S+)\s+[0-9a-f]+ +{version_and_name}$"
    return re.findall(pattern, table, re.M)


def output_of(*command: str) -> str:
    """Run a command and return what it prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def write_stand_in(library: Path, target: Path) -> None:
    """Write a library of the same name with the symbols of an older system, and without code."""
    newest: dict[str, tuple[tuple[int, ...], str, str]] = {}
    for section, version, name in library_symbols(library):
        if section in ("*UND*", "*ABS*") or not is_within_limits(version):
            continue
        numbers = version_numbers(version.partition("_")[2])
        if name not in newest or numbers > newest[name][0]:
            newest[name] = numbers, version, section
    lines = []
    for number, (name, (_, version, section)) in enumerate(sorted(newest.items())):
        kind = {".text": "function", ".tbss": "tls_object"}.get(section, "object")
        place = {"function": ".text", "tls_object": '.section .tbss,"awT",@nobits'}
        lines += [
            place.get(kind, ".data"),
            f".globl s{number}",
            f".type s{number},@{kind}",
            f".symver s{number},{name}@@{version},remove",
            f"s{number}: .zero 8",
        ]
    versions = {version for _, version, _ in newest.values()}
    script = target.with_suffix(".versions")
    script.write_text("".join(f"{version} {{}};\n" for version in sorted(versions)))
    link = ["-shared", "-nostdlib", f"-Wl,-soname,{library.name},--version-script={script}"]
    source = "\n".join(lines) + "\n"
    command = ["gcc", *link, "-x", "assembler", "-", "-o", str(target)]
    subprocess.run(command, input=source, text=True, check=True)


def write_older_system(folder: Path) -> None:
    """Write what the linker finds in place of this machine's libc, libm and libstdc++."""

    def find(name: str) -> Path:
        return Path(output_of("gcc", f"-print-file-name={name}").strip())

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("libc.so.6", "libm.so.6", "libstdc++.so.6"):
        write_stand_in(find(name), folder / name)
    command = ["gcc", "-O2", "-fPIC", "-c", "-x", "c", "-", "-o", str(folder / "older_libc.o")]
    subprocess.run(command, input=OLDER_LIBC, text=True, check=True)
    subprocess.run(["ar", "rcs", folder / "libolder_libc.a", folder / "older_libc.o"], check=True)
    # Threads, the dynamic linker's functions and shared memory had libraries of their own.
    separate = " ".join(str(find(name)) for name in ("libpthread.so.0", "libdl.so.2", "librt.so.1"))
    scripts = {
        "libc.so": f"libc.so.6 libolder_libc.a {find('libc_nonshared.a')} {separate} "
        f"AS_NEEDED ( {find('ld-linux-x86-64.so.2')} )",
        "libm.so": "libm.so.6",
        "libstdc++.so": f"libstdc++.so.6 {find('libstdc++.a')}",
    }
    for name, members in scripts.items():
        (folder / name).write_text(f"GROUP ( {members} )\n")


def build_wheel(kind: str, target: Path) -> Path:
    """Build one wheel into a folder and return its path."""
    scratch = Path("build/wheel").resolve()
    write_older_system(scratch / "older_system")
    settings = scratch / "settings.cfg"
    settings.write_text(
        f"[bdist_wheel]\npy_limited_api = cp310\nplat_name = {PLATFORM}\n"
        f"[egg_info]\negg_base = {scratch}\ntag_build = {'+cpu' if kind == 'cpu' else ''}\n"
    )
    environment = {
        **os.environ,
        "DIST_EXTRA_CONFIG": str(settings),
        "REALIGN_FAST_CUDA": str(int(kind == "cuda")),
        "REALIGN_FAST_LINK_FLAGS": f"-L{scratch}/older_system -Xlinker --exclude-libs=ALL",
    }
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, "."]
        subprocess.run(command, env=environment, check=True)
        (built,) = Path(folder).glob("*.whl")
        target.mkdir(parents=True, exist_ok=True)
        return Path(built.rename(target / built.name))


def check_wheel(wheel: Path, kind: str = "") -> list[str]:
    """Return a sentence for each fault of a wheel: its name, its files, and their symbols."""
    kind = kind or ("cpu" if "+cpu-" in wheel.name else "cuda")
    faults = []
    if not wheel.name.endswith(f"-{TAG}.whl"):
        faults.append(f"the name does not end with {TAG}.whl")
    if wheel.stat().st_size > MAX_BYTES[kind]:
        faults.append(f"{wheel.stat().st_size} bytes, expected at most {MAX_BYTES[kind]}")
    expected = {f"realign_fast/{name}.abi3.so" for name in ("_C", "_io")}
    if kind == "cuda":
        expected.add("realign_fast/_C_cuda.abi3.so")
    with TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = {name for name in names if re.search(r"\.so\b", name)}
        if libraries != expected:
            faults.append(f"libraries {sorted(libraries)}, expected {sorted(expected)}")
        folders = {name.partition("/")[0] for name in names}
        own = {"realign_fast", "-".join(wheel.name.split("-")[:2]) + ".dist-info"}
        if folders != own:
            faults.append(f"folders {sorted(folders)}, expected {sorted(own)}")
        for name in sorted(libraries):
            library = Path(archive.extract(name, folder))
            faults += [f"{name}: {fault}" for fault in check_library(library)]
    return faults


def check_library(library: Path) -> list[str]:
    """Return a phrase for each symbol or library that an older system or another torch may lack."""
    faults = []
    for section, version, name in library_symbols(library):
        if section != "*UND*":
            continue
        # Symbols without version: torch's stable C interface, Python's, and weak hooks of tools.
        if version in ("", "Base"):
            known = bool(re.match(r"(aoti_)?torch_|_?Py|_ITM_|__gmon_start__", name))
        else:
            known = is_within_limits(version)
        if not known:
            faults.append(f"needs {name} of version {version or 'Base'}")
    entries = output_of("readelf", "-d", str(library))
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", entries))
    allowed = SYSTEM_LIBRARIES | (set() if library.name.startswith("_io") else TORCH_LIBRARIES)
    faults += [f"needs the library {name}" for name in sorted(needed - allowed)]
    faults += [f"is tied to a folder: {line}" for line in re.findall(r"RUNPATH.*|RPATH.*", entries)]
    return faults


def main() -> None:
    """Build what was asked for, check it, and end with status 1 if anything is at fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="cpu|cuda", help="default: both")
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--check", type=Path, metavar="WHEEL", help="check it, and build nothing")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(MAX_BYTES):
        parser.error(f"unknown kinds of wheels: {', '.join(sorted(unknown))}")
    if options.check:
        wheels = [options.check]
    else:
        wheels = [build_wheel(kind, options.out) for kind in options.kinds or ("cuda", "cpu")]
    faults = 0
    for wheel in wheels:
        found = check_wheel(wheel)
        faults += len(found)
        with zipfile.ZipFile(wheel) as archive:
            info = json.loads(archive.read("realign_fast/_build_info.json"))
        size = f"{wheel.stat().st_size / 2**20:.1f} MiB"
        cuda = f"CUDA {info['cuda']} for {info['cuda_archs']}" if info["cuda"] else "no CUDA"
        print(f"{wheel}: {size}, {cuda}, {len(found)} faults", *found, sep="\n  ")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
