"""Compiles the modules at install where torch is visible to the build; pyproject.toml says everything else.

With build isolation torch is not visible, and one fetched for the build might not be the one that will run: then
nothing is compiled here, and fastres/_build.py compiles what is needed at first use.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent


def load_by_path(name: str, path: Path) -> Any:
    # Not imported as fastres._build: the package imports torch.
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def modules_to_build(build: Any) -> tuple[list[Any], dict[str, str]]:
    """The modules that can be compiled here, and why the CUDA module is not among them."""
    import torch

    modules, errors = [], {}
    try:
        build.compiler()
        modules += [build.cpu_module(capability) for capability in build.capabilities()]
        if torch.version.cuda is not None and os.environ.get("FASTRES_CUDA") != "0":
            modules.append(build.launch_module())
        try:
            build.check_cuda()
            modules.append(build.cuda_module())
        except build.Unavailable as e:
            if os.environ.get("FORCE_CUDA") == "1":
                raise SystemExit(f"FORCE_CUDA=1, but the CUDA module cannot be built: {e}") from e
            errors["_C_cuda"] = str(e)
    except build.Unavailable as e:
        warn(f"no compiled modules: {e}")
    return modules, errors


def warn(text: str) -> None:
    print(f"fastres: warning: {text}", file=sys.stderr, flush=True)


def build_arguments() -> dict[str, Any]:
    """ext_modules and cmdclass for setup(), or nothing where there is nothing to compile with."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return {}
    build = load_by_path("fastres_build", ROOT / "fastres" / "_build.py")
    modules, errors = modules_to_build(build)
    if not modules:
        return {}
    with build.toolchain(modules[0]) as cpp_extension:
        base = cpp_extension.BuildExtension

    files = {m.name: m.file for m in modules}

    class TagForEveryPython(bdist_wheel):
        """The CPU modules serve every Python. The CUDA module is passed over by all but its own."""

        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    class BuildModules(base):  # type: ignore[misc, valid-type]
        """Builds each module in a folder of its own, and goes on where one fails."""

        def get_ext_filename(self, fullname: str) -> str:
            usual = Path(super().get_ext_filename(fullname))
            return str(usual.with_name(files.get(fullname.rpartition(".")[2], usual.name)))

        def run(self) -> None:
            super().run()
            built = [m for m in modules if m.name not in errors]
            folders = {Path(self.get_ext_fullpath(f"fastres.{m.name}")).parent for m in built}
            for folder in folders | {Path(self.build_lib, "fastres")}:
                folder.mkdir(parents=True, exist_ok=True)
                build.write_record(folder, built, errors)

        def build_extensions(self) -> None:
            every = self.extensions
            for self.extensions in ([e] for e in every):
                self.build_alone(self.extensions[0])
            self.extensions = every

        def build_alone(self, ext: Any) -> None:
            module = next(m for m in modules if ext.name == f"fastres.{m.name}")
            temporary, compile_method = self.build_temp, self.compiler.compile
            # The same sources with other flags: in one folder each module would overwrite the others' objects.
            self.build_temp = str(Path(temporary, module.name))
            try:
                with build.toolchain(module):
                    super().build_extensions()
            except Exception as e:
                if module.is_cuda and os.environ.get("FORCE_CUDA") == "1":
                    raise
                errors[module.name] = build.first_error(self.compiler_output(module) or str(e) or repr(e))
                warn(f"{module.name} was not built: {errors[module.name]}")
            finally:
                self.build_temp, self.compiler.compile = temporary, compile_method

        def compiler_output(self, module: Any) -> str:
            """What the failed compilation printed: it went to the terminal, so what failed is run once more."""
            if not Path(self.build_temp, "build.ninja").is_file():
                return ""
            with build.toolchain(module):
                run = subprocess.run(["ninja"], cwd=self.build_temp, capture_output=True, text=True, check=False)
            return run.stdout if run.returncode else ""

    def extension_of(module: Any) -> Any:
        cxx_flags, nvcc_flags = build.compile_flags(module)
        options = {
            "depends": [str(p.relative_to(ROOT)) for p in module.headers],
            "extra_compile_args": {"cxx": cxx_flags, **({"nvcc": nvcc_flags} if module.is_cuda else {})},
            "optional": True,
        }
        name, sources = f"fastres.{module.name}", [str(p.relative_to(ROOT)) for p in module.sources]
        with build.toolchain(module):
            if module.is_cuda:
                folders = build.library_folders(module)
                return cpp_extension.CUDAExtension(
                    name, sources, include_dirs=[str(build.SOURCES)], library_dirs=folders, **options
                )
            if not module.stable:
                return cpp_extension.CppExtension(name, sources, include_dirs=[str(build.SOURCES)], **options)
            # Not a CppExtension, which would link libtorch_python.
            return Extension(
                name,
                sources,
                language="c++",
                include_dirs=[str(build.SOURCES), *build.torch_folders("include")],
                library_dirs=build.torch_folders("lib"),
                libraries=list(build.CPU_LIBRARIES),
                **options,
            )

    commands = {"build_ext": BuildModules, "bdist_wheel": TagForEveryPython}
    return {"ext_modules": [extension_of(m) for m in modules], "cmdclass": commands}


setup(**build_arguments())
