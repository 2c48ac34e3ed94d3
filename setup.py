"""Packaging. Metadata lives in settings.ini (nbdev's file); this file only translates it for setuptools."""

import configparser
import shlex
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.errors import FileError

HERE = Path(__file__).parent
settings = configparser.ConfigParser(delimiters=["="])
settings.read(HERE / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]


class BuildWithModel(build_py):
    "The embedded language model lies in data/, where people look for it, and travels inside the package."

    model = Path("data") / "docstrings-lm"
    figures = Path("data") / "paper.json"  # what the paper reports, for tables that compare

    def run(self):
        if self.editable_mode:  # an editable install reads the checkout's data/
            super().run()
            return
        if not (HERE / self.model / "model.safetensors").is_file():
            raise FileError(f"{self.model}/model.safetensors is missing: the package would have no model to run on")
        package = Path(self.build_lib).resolve() / cfg["lib_path"]
        if package != HERE.resolve() / cfg["lib_path"]:
            shutil.rmtree(package, ignore_errors=True)  # modules renamed since the last build would travel along
        super().run()
        shutil.copytree(HERE / self.model, package / "_data" / self.model.name, dirs_exist_ok=True)
        shutil.copy(HERE / self.figures, package / "_data" / self.figures.name)

    def get_source_files(self):
        "What a source distribution needs to build the same wheel."
        model = (str(self.model / path.name) for path in sorted((HERE / self.model).glob("*")) if path.is_file())
        return [*super().get_source_files(), "settings.ini", str(self.figures), *model]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
    ],
    packages=find_packages(include=[cfg["lib_path"]]),
    package_data={cfg["lib_path"]: ["py.typed", "_assets/*"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={
        "dev": shlex.split(cfg["dev_requirements"]),
        "autointerp": ["openai>=1.60"],
        "wandb": ["wandb>=0.19"],
        "tensorboard": ["tensorboard>=2.18"],
        "umap": ["umap-learn>=0.5.7"],
        "hub": ["huggingface_hub>=1.0"],
        "gguf": ["gguf>=0.17", "accelerate>=1.0"],  # subjects from GGUF files; transformers wants both
    },
    entry_points={
        "console_scripts": shlex.split(cfg["console_scripts"]),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": BuildWithModel},
    zip_safe=False,
)
