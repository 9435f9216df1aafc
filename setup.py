from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
EVAL = ["pycocoevalcap>=1.2", "matplotlib>=3.8", "scipy>=1.10"]
version: dict[str, str] = {}
exec((here / "llava_fwd2bot" / "version.py").read_text(), version)

setup(
    name="llava_fwd2bot",
    version=version["__version__"],
    description="Fwd2Bot for LLaVA: images as a few summary tokens, for answers and for retrieval",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["llava_fwd2bot", "llava_fwd2bot.*"]),
    package_data={
        "llava_fwd2bot": ["py.typed"],
        "llava_fwd2bot.smol": ["weights/**/*"],
        "llava_fwd2bot.evaluation": ["published.json"],
        "llava_fwd2bot.serving": ["page/*"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4",
        "transformers>=5.4,<6",
        "peft>=0.18",
        "accelerate>=1.1",
        "einops>=0.6",
        "sentencepiece>=0.1.99",
        "safetensors>=0.4",
        "pillow>=10",
    ],
    extras_require={
        "quantized": ["bitsandbytes>=0.46"],
        "original": ["protobuf", "requests", "shortuuid"],  # what LLaVA's own code wants, besides llava-torch
        "deepspeed": ["deepspeed>=0.16"],  # ZeRO
        "datasets": ["datasets>=3"],  # parquet files and folders of Hugging Face's datasets as training data
        "smol": ["gguf>=0.10"],
        "eval": EVAL,
        "cache": ["lancedb>=0.40", "filelock>=3.12"],
        "faiss": ["lancedb>=0.40", "filelock>=3.12", "faiss-cpu>=1.8"],
        "ray": ["lancedb>=0.40", "filelock>=3.12", "ray[data]>=2.40"],
        # the server; caches are a part of it
        "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20", "lancedb>=0.40", "filelock>=3.12"],
        "sentence-transformers": ["sentence-transformers>=6"],
        "mteb": ["mteb>=2"],
        "lmms": ["lmms-eval>=0.6", "filelock>=3.12,<4"],  # lmms-eval 0.7.3 uses filelock._api, which 4 has no more
        "quickstart": ["gguf>=0.10", "matplotlib>=3.8", "scikit-image>=0.22", "scikit-learn>=1.4"],
        # what the README's examples use: smol-llava, the cache, 4 and 8 bit, the evaluators
        "all": ["gguf>=0.10", "lancedb>=0.40", "filelock>=3.12", "bitsandbytes>=0.46", *EVAL],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.29"],
        "easy-vqa": ["easy-vqa==1.0", "matplotlib>=3.8"],
        "test": [
            "pytest>=8",
            "hypothesis>=6.100",
            "bitsandbytes>=0.46",
            "trl>=1.0",
            "easy-vqa==1.0",
            "ruff",
            "pyright",
            "pycocoevalcap>=1.2",
            "lancedb>=0.40",
            "filelock>=3.12,<4",  # for lmms-eval, as above
            "ray[data]>=2.40",
            "faiss-cpu>=1.8",
            "gguf>=0.10",
            'backports.zstd>=1; python_version < "3.14"',  # tar files
            "matplotlib>=3.8",
            "protobuf",
            "requests",
            "shortuuid",
            # what lmms-eval needs for a task of texts; the package itself, with its fifty others, comes by itself
            *"datasets evaluate httpx jsonlines loguru numexpr python-dotenv pytablewriter sacrebleu".split(),
            *"scikit-learn sympy tenacity".split(),
            "scikit-image>=0.22",  # photographs
            "sentence-transformers>=6",
            # the server, and the client that its tests use
            *["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20", "openai>=1.50"],
        ],
    },
    entry_points={
        "console_scripts": ["fwd2bot=llava_fwd2bot.cli.main:main"],
        "lmms_eval.models": ["llava_fwd2bot=llava_fwd2bot.evaluation.lmms:MANIFESTS"],
        "vllm.general_plugins": ["llava_fwd2bot=llava_fwd2bot.serving.vllm_plugin:register"],
    },
)
