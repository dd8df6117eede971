import re
from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "train": [
        "transformers>=5,<6",
        "accelerate>=1.10",
        "peft>=0.18",
        "datasets>=4.0",
        "xxhash",
        "pandas>=2.2",
        "matplotlib>=3.8",
        "rich>=13",
        "markdown-it-py>=3",
        "typer>=0.15",
        "pyyaml>=6",
        "psutil",
        "filelock",
        "tqdm",
        "tensorboard",
    ],
    "vllm": ["vllm"],
    "server": ["openai>=2"],
    "recipes": ["gymnasium>=1.0", "bm25s>=0.2"],
    "bench": ["transformers>=5,<6", "safetensors", "gguf==0.19.0", "matplotlib>=3.8", "rich>=13", "typer>=0.15", "filelock"],
    "flash": ["flash-attn>=2.7"],
    "test": ["pytest>=8", "pytest-xdist>=3", "hypothesis>=6", "openai>=2", "fastapi", "uvicorn"],
}
EXTRAS["dev"] = [*EXTRAS["train"], *EXTRAS["bench"], *EXTRAS["test"], "ruff==0.17.5", "rax==0.4.0"]

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "larpo_kernels/__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="larpo_kernels",
    version=VERSION,
    description="Fused listwise ranking losses for aligning language models on candidate lists (LarPO), in Triton and PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["larpo_kernels*", "larpo*"]),
    package_data={"larpo_kernels": ["py.typed"], "larpo": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.9", "numpy"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["larpo = larpo.cli:main"]},
)
