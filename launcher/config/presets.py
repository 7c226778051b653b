"""The GPT-2 family's shapes, and the starter files that `launcher init` writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from launcher.config.document import Value
from launcher.config.keys import did_you_mean, nearest
from launcher.config.schema import TrainSection
from launcher.errors import RequestError


@dataclass(frozen=True)
class Preset:
    """One published size: its shape, and how a run of it usually starts.

    Shapes are those of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
    table 2, and of the published configs at `hub_id`; every size has 1024 positions and 50257 tokens,
    and heads of 64. Learning rates and batch sizes (there in tokens; here in sequences of 1024) are
    those of the nearest size in Brown et al. 2020, "Language Models are Few-Shot Learners", table 2.1.
    `tokens` is 20 for each parameter: Hoffmann et al. 2022, "Training Compute-Optimal Large Language
    Models".
    """

    name: str
    n_layer: int
    n_embd: int
    n_head: int
    batch_size: int
    learning_rate: str
    tokens: str
    size: str

    @property
    def hub_id(self) -> str:
        """Where the published weights and tokenizer are on the Hugging Face Hub."""
        return f"openai-community/{self.name}"

    def config(self) -> dict[str, object]:
        """The fields of its transformers config, `model_type` included."""
        shape = {"n_layer": self.n_layer, "n_embd": self.n_embd, "n_head": self.n_head}
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **GPT2_FIELDS, **shape}


PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("gpt2", 12, 768, 12, 512, "6e-4", "2.5e9", "124 million"),
        Preset("gpt2-medium", 24, 1024, 16, 512, "3e-4", "7.1e9", "355 million"),
        Preset("gpt2-large", 36, 1280, 20, 512, "2.5e-4", "15.5e9", "774 million"),
        Preset("gpt2-xl", 48, 1600, 25, 1024, "2e-4", "31e9", "1.6 billion"),
    )
}

GPT2_FIELDS: Mapping[str, object] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
    "summary_first_dropout": 0.1,
    "scale_attn_weights": True,
    "use_cache": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": None,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""GPT2Config's own fields and their defaults; a test compares them with the installed transformers."""

GPT2_OTHER_NAMES: Mapping[str, str] = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""What transformers lets a config call them too."""


def preset_named(name: str) -> Preset:
    """The preset called `name`. Raises RequestError with the nearest names."""
    if name not in PRESETS:
        close = nearest(name, PRESETS)
        hint = did_you_mean(close) if close else f"there are {', '.join(PRESETS)}"
        raise RequestError(f"no preset is called {name}", hint=hint)
    return PRESETS[name]


_NONE: Mapping[str, Setting] = MappingProxyType({})
_PLAIN_NAME = re.compile(r"(?!(?:true|false|null)\Z)[a-z][a-z0-9_.-]*", re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    """A value for a starter file, and what the comment beside it says."""

    value: Value
    comment: str


def starter_run(preset: str, name: str, settings: Mapping[str, Setting] = _NONE) -> str:
    """A commented run file that trains `preset` from scratch, with `settings` (by dotted key of train) in it.

    Raises RequestError for an unknown preset.
    """
    shape = preset_named(preset)
    batch_tokens = f"{shape.batch_size * 1024:,}"
    train = {
        "batch_size": (f"{shape.batch_size}", f"sequences per optimizer step: {batch_tokens} tokens"),
        "tokens": (shape.tokens, "20 for each parameter (Hoffmann et al. 2022); or steps, or epochs"),
        "learning_rate": (shape.learning_rate, "the peak, after warmup"),
        "schedule": ("cosine", ""),
        "warmup": ("0.02", "a fraction of the steps"),
        "eval_every": ("500", "steps, or a duration such as 30min"),
    }
    if "train.steps" in settings:
        del train["tokens"]
    train |= {key.removeprefix("train."): (_written(s.value), s.comment) for key, s in settings.items()}
    size = f"# {shape.size} parameters from scratch."
    lines = [
        (f"{size} Learning rate and batch size: {_SOURCE}{_OR_CONVERTED if settings else ''}.", ""),
        (f"name: {_written(name)}", ""),
        ("model:", ""),
        (f"  name: {shape.name}", ""),
        ("  init: scratch", "pretrained: start from the published weights"),
        ("data:", ""),
        ('  train: ["corpus/*.jsonl.zst"]', "your text: paths and globs"),
        ("  validation: 0.01", "hold out one document in a hundred, or name files"),
        ("  block_size: 1024", "tokens in one sequence"),
        ("train:", ""),
        *((f"  {key}: {train[key][0]}", train[key][1]) for key in TrainSection.model_fields if key in train),
        ("checkpoint:", ""),
        ("  every: 15min", ""),
        ("  keep: 2", ""),
    ]
    return _aligned(lines)


def starter_cluster(settings: Mapping[str, Setting] = _NONE) -> str:
    """A commented cluster file for the machine it is used on, with `settings` (by dotted key) in it."""
    cluster = {
        "name": ("my-machine", ""),
        "launch": ("local", ""),
        "nodes": ("1", ""),
        "gpus_per_node": ("auto", "those found here, or a number"),
        "gpu": ("auto", "what is found here; a name such as a100-sxm-80gb; or cpu"),
        "env": ("{}", "variables set for every rank; no secrets"),
    }
    cluster |= {key.removeprefix("cluster."): (_written(s.value), s.comment) for key, s in settings.items()}
    return _CLUSTER + _aligned(
        [*((f"{key}: {value}", comment) for key, (value, comment) in cluster.items()), *_ON_SLURM], 25
    )


def _aligned(lines: Sequence[tuple[str, str]], width: int = 34) -> str:
    return "".join(f"{key:<{width}}# {comment}\n" if comment else f"{key}\n" for key, comment in lines)


def _written(value: Value) -> str:
    plain = isinstance(value, str) and _PLAIN_NAME.fullmatch(value)
    return str(value) if plain else json.dumps(value, ensure_ascii=False)


_SOURCE = "Brown et al. 2020, table 2.1"
_OR_CONVERTED = ", where no comment names a file"

_ON_SLURM = (
    ("# On a SLURM cluster (docs/guides/slurm.md):", ""),
    ("# launch: slurm", "in place of local; gpus_per_node and gpu then say what a node has"),
    ("# slurm:", ""),
    ("#   partition: gpu", ""),
    ('#   time_limit: "24:00:00"', ""),
    ("#   exclusive: true", "whole nodes"),
    ("#   setup: [module load cuda]", ""),
)
_CLUSTER = "# Where runs run. Without --cluster, launcher takes this machine as it finds it.\n"
