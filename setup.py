"""Package metadata; the tools' settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "lbdet/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="lbdet",
    version=VERSION,
    description=(
        "Low-bit object detection: how many bits does a detector need, train it there, ship it small."
    ),
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["lbdet", "lbdet.*"]),
    package_data={"lbdet.quant": ["*.c"], "lbdet.report": ["*.css", "*.jinja", "*.js"]},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.26",
        "pycocotools>=2.0.7",
        "albumentations>=2.0.5,<2.1",
        "pyyaml>=6.0",
        "pydantic>=2.7",
        "rich>=13.7",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "safetensors>=0.4.3",
        "defusedxml>=0.7.1",
        "pillow>=10.1",
    ],
    extras_require={
        "tensorboard": ["tensorboard>=2.14"],
        "ray": ["ray>=2.9"],
        "deploy": [
            "onnx>=1.16",
            "onnxruntime>=1.18",
            "onnxscript>=0.1",
            "openvino>=2024.4",
            "constriction>=0.4",
        ],
        "compare": ["brevitas>=0.12", "nncf>=3.0"],
        "dev": [
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "pyright>=1.1.380",
            "playwright>=1.40",
        ],
    },
    entry_points={"console_scripts": ["lbdet=lbdet.cli:main"]},
)
