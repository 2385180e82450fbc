"""Packaging. Torch is chosen by torchvision; never pin a build here."""

from pathlib import Path

from setuptools import find_packages, setup

TEST = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100"]

setup(
    name="autosparse",
    version="0.1.0",
    description="Learn from lottery tickets which weights matter; train only what survives",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["autosparse", "autosparse.*"]),
    package_data={"autosparse": ["py.typed", "autos/pretrained/*.safetensors"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "timm>=1.0.20",
        "webdataset>=1.0.2",
        "braceexpand>=0.1",
        "filelock>=4.1",
        "deepspeed>=0.19",
        "ninja>=1.11",
        "ray[default,tune]>=2.50",
        "mlflow>=3.10",
        "jsonargparse[signatures]>=4.49",
        "safetensors>=0.5",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10",
        "simplejpeg>=1.8",
        "pyarrow>=15",
        "pyyaml>=6",
        "universal-pathlib>=0.3",
        "rich>=13",
        "setuptools",
    ],
    extras_require={
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        "optuna": ["optuna>=3"],
        "docs": [
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6",
            "mkdocstrings[python]>=0.29",
            "latex2mathml>=3.78",
        ],
        "test": [
            *TEST,
            "onnx",
            "onnxscript",
            "onnxruntime",
            "optuna>=3",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
        ],
        "dev": [
            *TEST,
            "ruff~=0.17.6",
            "pyright[nodejs]==1.1.414",
            "import-linter~=2.17",
            "codespell>=2.4",
        ],
    },
    entry_points={"console_scripts": ["autosparse = autosparse.cli.main:main"]},
)
