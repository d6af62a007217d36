"""Builds the native runtime, fastserve._C, with CMake and Ninja. Everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures and builds the CMake target `modules` and puts them where setuptools expects it."""

    def run(self) -> None:
        # Work in the source tree builds in ./build, where only what changed is compiled again. `pip install .` builds
        # in an environment that is gone afterwards, so it gets a folder of its own. (Asked here, because setuptools
        # clears `inplace` while it builds.)
        in_tree = self.inplace or self.editable_mode
        self.cmake_dir = ROOT / "build" if in_tree else Path(self.build_temp).resolve() / "cmake"
        super().run()

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        # setuptools knows of the extension only; the plugins for MPI and CUDA, those there are, belong beside it.
        for name in ("_mpi", "_cuda"):
            for plugin in (Path(self.build_lib) / "fastserve").glob(f"{name}*.so"):
                shutil.copy2(plugin, ROOT / "fastserve" / plugin.name)

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        self.cmake_dir.mkdir(parents=True, exist_ok=True)
        module.parent.mkdir(parents=True, exist_ok=True)

        cmake_program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": module.parent,
            "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        # ON, OFF or AUTO; as CMake names them: 90; ON or OFF.
        for name in ("FASTSERVE_CUDA", "FASTSERVE_CUDA_ARCHITECTURES", "FASTSERVE_CUDA_WERROR"):
            if given := os.environ.get(name):
                options[name] = given
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        jobs = [f"-j{self.parallel}"] if self.parallel else []
        try:
            subprocess.run([cmake_program, "-S", ROOT, "-B", self.cmake_dir, "-G", "Ninja", *definitions], check=True)
            subprocess.run([cmake_program, "--build", self.cmake_dir, "--target", "modules", *jobs], check=True)
        except subprocess.CalledProcessError:
            raise SystemExit("csrc/ did not build; the reason is above") from None


setup(ext_modules=[Extension("fastserve._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
