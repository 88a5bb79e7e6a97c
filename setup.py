"""Builds the custom calls: `xla_ops._cpu` wherever a C++17 compiler is.

A build that fails leaves the package working with the jnp form, and the reason in a file that
`xla_ops.status()` reads. `INTERNIMAGE_CPU=1` turns the failure into an error, 0 skips the build.
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("xla_ops/csrc")


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
    options += ["-Wno-maybe-uninitialized"]  # GCC 12 finds some in its own intrinsics
    return Extension(
        "xla_ops._cpu",
        sources=[str(path) for path in sorted(CSRC.glob("*.cc")) if "cuda" not in path.name],
        depends=[str(path) for path in CSRC.glob("*.h")],
        include_dirs=[str(CSRC)],
        extra_compile_args=options,
        language="c++",
        optional=wanted("INTERNIMAGE_CPU") != "1",
    )


class BuildExt(build_ext):
    """Builds each extension or writes down why it could not be built, beside where it would be."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]  # _cpu
        reason = Path(self.get_ext_fullpath(ext.name)).with_name(f"{name}.reason")
        reason.parent.mkdir(parents=True, exist_ok=True)
        reason.unlink(missing_ok=True)
        variable = f"INTERNIMAGE{name.upper()}"
        if wanted(variable) == "0":  # an extension left over from another build would still load
            reason.write_text(f"not built: {variable}=0\n")
            return
        try:
            self._build(ext)
        except Exception as error:
            if not ext.optional:
                raise
            message = f"not built: {type(error).__name__}: {error}".splitlines()[0][:200]
            reason.write_text(message + "\n")
            self.warn(f"{ext.name} {message}; the jnp form serves")

    def _build(self, ext: Extension) -> None:
        import jax.ffi
        import pybind11

        ext.include_dirs += [pybind11.get_include()]
        ext.extra_compile_args += ["-isystem", jax.ffi.include_dir()]  # their warnings are theirs
        super().build_extension(ext)

    def copy_extensions_to_source(self) -> None:  # of an editable install
        super().copy_extensions_to_source()  # skips what was not built: the extensions are optional
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            name = f"{ext.name.rpartition('.')[2]}.reason"
            here = Path(self.get_ext_fullpath(ext.name)).with_name(name)
            here.unlink(missing_ok=True)
            if built.with_name(name).exists():
                self.copy_file(str(built.with_name(name)), str(here))


# xla_ops._cuda joins here: INTERNIMAGE_CUDA=0|1|auto, INTERNIMAGE_CUDA_ARCHS.
setup(ext_modules=[cpu_extension()], cmdclass={"build_ext": BuildExt})
