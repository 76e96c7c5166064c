"""Wheels for x86-64 Linux carry the kernels of native.c; where they cannot be compiled, a wheel is plain Python.

All else about the package is in pyproject.toml. A checkout that is installed with `-e` compiles them at first use.
"""

from __future__ import annotations

import platform
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


def toolchain() -> ModuleType:
    """fxbt/kernels/toolchain.py by itself: the package wants torch, which is not there while a wheel is built."""
    spec = spec_from_file_location("toolchain", Path(__file__).with_name("fxbt") / "kernels" / "toolchain.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildPython(build_py):
    """Copies the package, and puts beside native.c what it compiles to, each with its digest."""

    def run(self) -> None:
        super().run()
        package = Path(self.build_lib, "fxbt", "kernels")
        for stale in (*package.glob("native-*.so"), *package.glob("native-*.sha256")):  # of a build before this one
            stale.unlink()
        if self.editable_mode:
            return
        try:
            libraries = _libraries(package)
        except Exception as reason:  # whatever it is, fxbt works without them
            self.warn(f"the wheel has no compiled kernels, they are compiled at first use: {reason}")
            return
        for name, data in libraries.items():
            (package / name).write_bytes(data)
            (package / name).with_suffix(".sha256").write_text(tools.digest_of(data))


class BuildWheel(bdist_wheel):
    """Names the platform in a wheel's tag if it carries kernels: they are for any Python, as ctypes loads them."""

    def run(self) -> None:
        self.run_command("build_py")
        if list(Path(self.get_finalized_command("build_py").build_lib, "fxbt", "kernels").glob("native-*.so")):
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # where `install` puts the package
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def _libraries(folder: Path) -> dict[str, bytes]:
    """The name and the bytes of each processor's kernels."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise tools.NoKernel(f"they are for x86-64 Linux, this is {sys.platform} on {platform.machine()}")
    compiler = tools.compiler()
    each = [tools.flags_for(capability) for capability in tools.OF_CAPABILITY]
    return {tools.name_of(*flags): tools.compiled(compiler, flags, folder) for flags in each}


tools = toolchain()
setup(cmdclass={"build_py": BuildPython, "bdist_wheel": BuildWheel})
