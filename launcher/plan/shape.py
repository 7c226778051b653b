"""A model's shape, read from its transformers config, and what follows from it in closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.config.architectures import DEFAULTS


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory and speed depend on.

    `hidden`, `intermediate` and `head_size` are widths; `positions` the longest sequence the model can
    take. `tied`: the output layer is the input embedding. `gated`: the MLP has a gate beside its up
    projection. `dropout` is on the residual stream, `attention_dropout` on the attention weights.
    """

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int
    positions: int | None
    tied: bool
    gated: bool
    dropout: bool
    attention_dropout: bool

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Width of all key heads together; the values' is the same."""
        return self.kv_heads * self.head_size


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """The shape of the causal language model that a transformers `config` (with `model_type`) describes.

    None for an architecture whose closed form is not known here.
    """
    model_type = str(config.get("model_type"))
    if model_type not in DEFAULTS:
        return None
    fields = {**DEFAULTS[model_type], **config}
    return _gpt2(fields) if model_type == "gpt2" else _llama(model_type, fields)


def with_vocabulary(config: Mapping[str, Any], vocabulary: int | None, *, scratch: bool) -> Mapping[str, Any]:
    """The config of a model with a row for each of the tokenizer's ids; None: as many as it has.

    From `scratch` it has exactly those; a pretrained model grows and never shrinks.
    """
    if vocabulary is None or (not scratch and config.get("vocab_size", 0) >= vocabulary):
        return config
    return {**config, "vocab_size": vocabulary}


def _gpt2(fields: Mapping[str, Any]) -> Shape | None:
    if fields["add_cross_attention"]:
        return None
    hidden, heads = fields["n_embd"], fields["n_head"]
    return Shape(
        model_type="gpt2",
        layers=fields["n_layer"],
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_size=hidden // heads,
        intermediate=4 * hidden if fields["n_inner"] is None else fields["n_inner"],
        vocab=fields["vocab_size"],
        positions=fields["n_positions"],
        tied=fields["tie_word_embeddings"],
        gated=False,
        dropout=fields["resid_pdrop"] > 0,
        attention_dropout=fields["attn_pdrop"] > 0,
    )


def _llama(model_type: str, fields: Mapping[str, Any]) -> Shape | None:
    if fields["attention_bias"] or fields["mlp_bias"]:
        return None
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    return Shape(
        model_type=model_type,
        layers=fields["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=heads if fields["num_key_value_heads"] is None else fields["num_key_value_heads"],
        head_size=hidden // heads if fields["head_dim"] is None else fields["head_dim"],
        intermediate=fields["intermediate_size"],
        vocab=fields["vocab_size"],
        positions=fields["max_position_embeddings"],
        tied=fields["tie_word_embeddings"],
        gated=True,
        dropout=False,
        attention_dropout=fields["attention_dropout"] > 0,
    )


@dataclass(frozen=True, slots=True)
class Tensors:
    """`count` trainable tensors of `rows` x `columns`: tables and matrices; a vector has one column."""

    rows: int
    columns: int
    count: int

    @property
    def elements(self) -> int:
        """Of one of them."""
        return self.rows * self.columns

    @property
    def matrix(self) -> bool:
        return self.columns > 1


def tables(shape: Shape) -> list[Tensors]:
    """What is looked up by token or position, and the output layer; a tied one once."""
    found = [Tensors(shape.vocab, shape.hidden, 1 if shape.tied else 2)]
    if shape.model_type == "gpt2":
        found.append(Tensors(shape.positions or 0, shape.hidden, 1))
    return found


def layer_tensors(shape: Shape) -> list[Tensors]:
    """One layer's tensors: the matrices in the model's order, then the vectors in theirs.

    GPT-2 keeps a weight as inputs x outputs and has two LayerNorms and a bias for each matrix. The others
    keep it as outputs x inputs and have two RMSNorms, to which Qwen2 adds biases on query, key and value, and
    Qwen3 an RMSNorm on query and key heads.
    """
    hidden, queries, keys, inner = shape.hidden, shape.queries, shape.keys, shape.intermediate
    if shape.model_type == "gpt2":
        fused = queries + 2 * keys
        return [
            Tensors(hidden, fused, 1),
            Tensors(queries, hidden, 1),
            Tensors(hidden, inner, 1),
            Tensors(inner, hidden, 1),
            Tensors(hidden, 1, 2),
            Tensors(fused, 1, 1),
            Tensors(hidden, 1, 3),
            Tensors(inner, 1, 1),
            Tensors(hidden, 1, 1),
        ]
    biases = [Tensors(queries, 1, 1), Tensors(keys, 1, 2)] if shape.model_type == "qwen2" else []
    head_norms = [Tensors(shape.head_size, 1, 2)] if shape.model_type == "qwen3" else []
    return [
        Tensors(queries, hidden, 1),
        Tensors(keys, hidden, 2),
        Tensors(hidden, queries, 1),
        Tensors(inner, hidden, 2),
        Tensors(hidden, inner, 1),
        *biases,
        *head_norms,
        Tensors(hidden, 1, 2),
    ]


def tensors(shape: Shape) -> Iterator[Tensors]:
    """Every trainable tensor of the model, those of one place in all layers together."""
    yield from tables(shape)
    yield from (replace(one, count=one.count * shape.layers) for one in layer_tensors(shape))
    yield Tensors(shape.hidden, 1, 2 if shape.model_type == "gpt2" else 1)


def parameters(shape: Shape) -> int:
    """Trainable parameters, exactly; a tied embedding counts once."""
    return sum(one.elements * one.count for one in tensors(shape))


def weights_per_layer(shape: Shape) -> int:
    """Elements of one layer's weight matrices."""
    return sum(one.elements * one.count for one in layer_tensors(shape) if one.matrix)


def flops_per_token(shape: Shape, block_size: int) -> float:
    """FLOP of forward and backward for one token in a block of `block_size`: 6 N + 12 L H Q T.

    Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways", appendix B: L layers, H heads
    of size Q, T tokens, and attention counted in full although half of it is masked. N leaves out the
    tables that are only looked up (positions, and an input embedding that is not also the output layer),
    as nanoGPT does. Recomputation does not count.
    """
    lookups = 0 if shape.tied else shape.vocab * shape.hidden
    if shape.model_type == "gpt2":
        lookups += (shape.positions or 0) * shape.hidden
    multiplied = parameters(shape) - lookups
    return 6.0 * multiplied + 12.0 * shape.layers * shape.queries * block_size
