"""Builds the custom calls: `xla_ops._cpu` where a C++17 compiler is, `xla_ops._cuda` where nvcc
and gcc are, or another compiler that `NVCC_CCBIN` names.

The compiler is `CXX`, the one Python was built with, or `c++`, `g++` or `clang++`; where there is
none, Zig's, if its package `ziglang` is installed.

A build that fails leaves the package working with the jnp form, and the reason in a file that
`xla_ops.status()` reads. `INTERNIMAGE_CPU=1` turns the failure into an error, 0 skips the build;
`INTERNIMAGE_CUDA` likewise. nvcc is that of `CUDA_HOME`; else that of the packages
`nvidia-cuda-nvcc`, which comes with JAX for CUDA 13, and `nvidia-cuda-cccl`; else the one on the
path or in /usr/local/cuda. Neither a GPU nor its driver is needed.
`INTERNIMAGE_CUDA_ARCHS="80 90+PTX"` builds for these architectures only, and for later GPUs than
the one named so.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

CSRC = Path("xla_ops/csrc")
# A binary runs on later minor versions too, 8.0 on 8.6 and 8.9, but not on an integrated GPU (8.7,
# 11.0), nor one for these elsewhere. PTX runs on all that is later: 8.0's is for those, the last's
# for what comes.
ARCHITECTURES = ("70", "75", "80", "90", "100", "120")


def wanted(name: str) -> str:
    """Whether to build an extension: "0" no, "1" yes or fail, "auto" if it can be."""
    value = os.environ.get(name, "auto")
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"{name}: expected 0, 1 or auto, got {value!r}")
    return value


def cpu_extension() -> Extension:
    # ISO C++ turns the contraction of a * b + c off, so it is asked for: it is the faster and the
    # more exact form. Nothing here that would change what NaN, infinity or an order of sums means.
    options = ["-std=c++17", "-O3", "-fvisibility=hidden", "-g0"]
    options += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    # GCC 12 finds some in its own intrinsics; Clang does not know the name.
    options += ["-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
    return Extension(
        "xla_ops._cpu",
        sources=[str(path) for path in sorted(CSRC.glob("*.cc")) if "cuda" not in path.name],
        depends=[str(path) for path in CSRC.glob("*.h") if "cuda" not in path.name],
        include_dirs=[str(CSRC)],
        extra_compile_args=options,
        language="c++",
        optional=wanted("INTERNIMAGE_CPU") != "1",
    )


def cuda_extension() -> Extension:
    return Extension(
        "xla_ops._cuda",
        sources=[str(path) for path in sorted(CSRC.glob("*cuda*.c[cu]"))],
        depends=[str(path) for path in CSRC.glob("*.h")],
        include_dirs=[str(CSRC)],
        extra_compile_args=["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-g0"],
        language="c++",
        optional=wanted("INTERNIMAGE_CUDA") != "1",
    )


def find_installed(path: str) -> Path | None:
    """A file of another package; by its path, since pip's isolated builds cannot import them."""
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return next((file for folder in folders for file in sorted(Path(folder).glob(path))), None)


def find_compiler() -> list[str]:
    """The C++ compiler to use in the place of one that is not there, and its options."""
    names = ("c++", "g++", "clang++")
    for name in names:
        if shutil.which(name):
            return [name]
    zig = find_installed("ziglang/zig")
    if zig is None:
        words = f"no C++ compiler ({', '.join(names)}); `pip install ziglang` brings one"
        raise RuntimeError(words)
    return [str(zig), "c++", "-mcpu=baseline"]  # Zig alone would use all that this processor has


def find_nvcc() -> str:
    if home := os.environ.get("CUDA_HOME"):
        if nvcc := shutil.which("nvcc", path=f"{home}/bin"):
            return nvcc
        raise RuntimeError(f"no nvcc in CUDA_HOME={home}")
    packaged = find_installed("nvidia/cu*/bin/nvcc")
    if packaged and (packaged.parents[1] / "include/cccl/nv/target").exists():
        return str(packaged)
    if nvcc := shutil.which("nvcc", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"):
        return nvcc
    where = "PATH or /usr/local/cuda, and no CUDA_HOME"
    missing = "nvidia-cuda-cccl" if packaged else "nvidia-cuda-nvcc nvidia-cuda-cccl"
    raise RuntimeError(f"no nvcc with its headers in {where}; `pip install {missing}` brings them")


def architectures(nvcc: str) -> dict[str, bool]:
    """Those asked for, or those of ARCHITECTURES that this nvcc knows: whether PTX is there too."""
    run = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = re.findall(r"compute_(\d+)", run.stdout)
    asked = re.findall(r"[^\s,;]+", os.environ.get("INTERNIMAGE_CUDA_ARCHS", ""))
    if not asked:
        chosen = [arch for arch in ARCHITECTURES if arch in known]
        return {arch: arch in ("80", chosen[-1]) for arch in chosen}
    # 90 becomes 90a by itself.
    named = {name.removesuffix("+PTX").removesuffix("a"): name.endswith("+PTX") for name in asked}
    unknown = [arch for arch in named if arch not in known]
    if unknown:
        raise SystemExit(
            f"INTERNIMAGE_CUDA_ARCHS: expected some of {' '.join(known)}, got {' '.join(unknown)}"
        )
    return {arch: named[arch] for arch in sorted(named, key=int)}


def release(nvcc: str) -> int:
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"release (\d+)", run.stdout)
    return int(found[1]) if found else 0


def run(command: list[str]) -> None:
    """Runs a compiler; what it says of an error becomes the error."""
    print(" ".join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        lines = re.findall(".*(?:error|fatal).*", done.stdout) or [command[-1]]
        raise RuntimeError(f"nvcc: {lines[0].strip()}")


class BuildExt(build_ext):
    """Builds each extension or writes down why it could not be built, beside where it would be."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]  # _cpu
        target = Path(self.get_ext_fullpath(ext.name))
        reason = target.with_name(f"{name}.reason")
        reason.parent.mkdir(parents=True, exist_ok=True)
        reason.unlink(missing_ok=True)
        variable = f"INTERNIMAGE{name.upper()}"
        if wanted(variable) == "0":
            message = f"not built: {variable}=0"
        else:
            try:
                self._build(ext)
                return
            except Exception as error:
                if not ext.optional:
                    raise
                message = f"not built: {type(error).__name__}: {error}".splitlines()[0][:200]
                self.warn(f"{ext.name} {message}; the jnp form serves")
        reason.write_text(message + "\n")
        target.unlink(missing_ok=True)  # that of another build would still load

    def _build(self, ext: Extension) -> None:
        import jax.ffi
        import pybind11

        ext.include_dirs += [pybind11.get_include()]
        ext.extra_compile_args += ["-isystem", jax.ffi.include_dir()]  # their warnings are theirs
        if ext.name == "xla_ops._cuda":
            self._build_cuda(ext)
        else:
            from pybind11.setup_helpers import ParallelCompile

            self._choose_compiler()
            with ParallelCompile(default=len(os.sched_getaffinity(0))):
                super().build_extension(ext)

    def _choose_compiler(self) -> None:
        configured = self.compiler.compiler_so_cxx[0]  # by CXX, or as Python was built
        if shutil.which(configured) is None:
            if os.environ.get("CXX"):
                raise RuntimeError(f"no compiler {configured}, which CXX names")
            compiler = find_compiler()
            self.compiler.set_executables(
                compiler_cxx=compiler,
                compiler_so_cxx=[*compiler, "-fPIC", "-DNDEBUG"],
                linker_exe_cxx=compiler,
                linker_so_cxx=[*compiler, "-shared"],
            )

    def _build_cuda(self, ext: Extension) -> None:
        target = self.get_ext_fullpath(ext.name)
        nvcc = find_nvcc()
        if not (os.environ.get("NVCC_CCBIN") or shutil.which("gcc")):
            raise RuntimeError("nvcc wants gcc, or another compiler that NVCC_CCBIN names")
        archs = architectures(nvcc)
        # With the instructions that 9.0 alone has, which nvcc knows from 12.0 on.
        own = [arch + "a" if arch == "90" and release(nvcc) >= 12 else arch for arch in archs]
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in own]
        later = [arch for arch, with_ptx in archs.items() if with_ptx]
        code += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in later]
        code += ["-Xfatbin=-compress-all"]  # a quarter of the size
        names = " ".join(f"sm_{arch}" for arch in own)
        includes = [f"-I{path}" for path in (*ext.include_dirs, *self.include_dirs)]
        options = [*ext.extra_compile_args, *includes, f'-DINTERNIMAGE_CUDA_ARCHS="{names}"']
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        settings, last = " ".join([nvcc, *options, *code]), folder / "cuda_settings"
        is_same = last.exists() and last.read_text() == settings
        if is_same and not self.force and not newer_group([*ext.sources, *ext.depends], target):
            return
        last.unlink(missing_ok=True)
        objects = {source: str(folder / f"{Path(source).name}.o") for source in ext.sources}
        # All processors at work: files beside one another, and architectures where there are more.
        processors = len(os.sched_getaffinity(0))
        workers = min(processors, len(objects))
        code.append(f"--threads={processors // workers}")

        def compile_one(source: str) -> None:
            device = code if source.endswith(".cu") else []
            run([nvcc, *options, *device, "-c", source, "-o", objects[source]])

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(compile_one, sorted(objects, key=os.path.getsize, reverse=True)))
        run([nvcc, "-shared", "-cudart=static", *objects.values(), "-o", target])
        last.write_text(settings)

    def copy_extensions_to_source(self) -> None:  # of an editable install
        super().copy_extensions_to_source()  # skips what was not built: the extensions are optional
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            name = f"{ext.name.rpartition('.')[2]}.reason"
            here = Path(self.get_ext_fullpath(ext.name)).with_name(name)
            here.unlink(missing_ok=True)
            if built.with_name(name).exists():
                self.copy_file(str(built.with_name(name)), str(here))
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)


setup(ext_modules=[cpu_extension(), cuda_extension()], cmdclass={"build_ext": BuildExt})
