from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megazero",
    version="0.1.0",
    description="3D-parallel language-model pretraining with ZeRO: the same command on a laptop and on a cluster",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megazero", "megazero.*"]),
    package_data={"megazero": ["door/*.py", "door/deepspeed/*.py", "door/*.dist-info/METADATA"]},
    install_requires=[
        "torch>=2.11",
        "numpy",
        "sentencepiece>=0.2.2",
        "tokenizers>=0.20",
        "orjson",
        "tensorboard",
        "pyyaml",
        "tqdm",
        "tomli; python_version < '3.11'",
    ],
    extras_require={
        "hf": ["transformers"],
        "data": ["pyarrow", "zstandard", "tiktoken"],
        "remote": ["fsspec"],
        "gguf": ["gguf"],
        "dev": ["pytest", "ruff", "mypy", "transformers", "safetensors", "types-PyYAML", "types-tqdm",
                "pyarrow", "zstandard", "tiktoken", "fsspec", "ctranslate2", "accelerate", "peft", "diffusers",
                "gguf"],
        "plot": ["matplotlib"],
    },
)
