"""Adds the C++ kernels to what pyproject.toml says: built where there are a compiler and torch's headers.

Without them the package installs all the same, and ``ecanet build`` builds the kernels later. ECANET_BUILD=0 in the
environment skips the build.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_SPEC = importlib.util.spec_from_file_location("ecanet_build", Path(__file__).parent / "src/ecanet/ops/build.py")
kernels = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(kernels)


def build_library(output: Path) -> bool:
    """Leave the library in ``output``, or one line that says why not and no library that this build has not made."""
    if os.environ.get("ECANET_BUILD") == "0":
        reason = "ECANET_BUILD=0"
    elif kernels.is_current(output):
        return True
    elif kernels.is_current():
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(kernels.LIBRARY, output)
        return True
    else:
        try:
            kernels.build(kernels.find_torch(), output)
            return True
        except kernels.BuildError as error:
            reason = str(error)
            if error.output:
                print(error.output, file=sys.stderr)
    print(f"ecanet: installing without the C++ kernels ({reason}); to build them later: ecanet build", file=sys.stderr)
    return False


class BuildPy(build_py):
    """Copies the Python files, then builds the library beside them; in place for an editable installation."""

    def run(self) -> None:  # noqa: D102
        super().run()
        if self.editable_mode:
            build_library(kernels.LIBRARY)
            return
        output = Path(self.build_lib) / kernels.LIBRARY.relative_to(kernels.LIBRARY.parents[2])
        kernels.remove_leftovers(output)  # a wheel would hold them
        if not build_library(output):
            output.unlink(missing_ok=True)


class BdistWheel(bdist_wheel):
    """Names the wheel after what is in it: one platform's library without Python in it, or nothing but Python."""

    def run(self) -> None:  # noqa: D102
        self.run_command("build")
        built = any(Path(self.get_finalized_command("build").build_lib).glob("ecanet/lib/*.so"))
        self.distribution.has_ext_modules = lambda: built
        self.root_is_pure = not built
        super().run()

    def get_tag(self) -> tuple[str, str, str]:  # noqa: D102
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
