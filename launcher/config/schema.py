"""What a user may write: every key of `run.yaml` and `cluster.yaml`, with its type and meaning.

The models are strict (an unknown key, or a string where a number belongs, is a fault) and frozen. What a
single value may be is in `config.values`; rules that need more than one key are in `config.rules`, so that
one pass can report them beside faults in single keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from launcher.config.slurm import check_memory, check_time_limit
from launcher.config.values import (
    MOST,
    Count,
    Every,
    Figure,
    Folder,
    Measure,
    Tokens,
    at_most,
    document_name,
    integral,
    number_as_text,
    one_line,
    run_name,
    step_range,
    steps_in,
)


class Section(BaseModel):
    """A strict, frozen block of keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TrainTokenizer(Section):
    """A byte-level BPE tokenizer trained on the run's own text."""

    vocab_size: Count = Field(
        ge=257, description="Entries in the vocabulary, the 256 bytes and the end-of-text token included."
    )


class TokenizerFromCorpus(Section):
    """`{train: {vocab_size: N}}`: the tokenizer is made from the text rather than named."""

    train: TrainTokenizer = Field(description="How the tokenizer is trained on the corpus.")


class Source(Section):
    """One source of a mixture."""

    name: str = Field(
        min_length=1, description="What this source is called in the ledger and in `data show`."
    )
    files: list[str] = Field(min_length=1, description="This source's text, as in `data.train`.")
    weight: float = Field(gt=0, description="Share of the samples, relative to the other sources' weights.")


class ModelSection(Section):
    """Which model."""

    name: str = Field(
        min_length=1,
        description="A preset (gpt2, gpt2-medium, gpt2-large, gpt2-xl), a Hub id or a local folder.",
    )
    init: Literal["scratch", "pretrained"] = Field(
        "scratch",
        description="`scratch`: random weights in the named shape. `pretrained`: the named weights.",
    )
    tokenizer: str | TokenizerFromCorpus | None = Field(
        None,
        description="null: the model's own. A Hub id or a local folder. `{train: {vocab_size: 8192}}`: "
        "a byte-level BPE trained on `data.train`.",
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of the model's own config (such as n_layer) to change; for `init: scratch`.",
    )


class SkipSection(Section):
    """Text that is not trained on any more, as after a spike in the loss."""

    steps: list[Annotated[str, BeforeValidator(number_as_text), AfterValidator(step_range)]] = Field(
        default_factory=list,
        description="Steps whose samples are banned: numbers, or ranges such as 130-135. The run is to go on "
        "from a checkpoint before them; their places are taken by the samples that follow.",
    )
    documents: list[Annotated[str, AfterValidator(document_name)]] = Field(
        default_factory=list,
        description="Documents, named as `data show` prints them (train-00003:1542). Every block that holds "
        "any of one is banned.",
    )

    @property
    def step_numbers(self) -> set[int]:
        """Every step that `steps` names."""
        return {step for entry in self.steps for step in steps_in(entry)}


class DataSection(Section):
    """Which text, and how it becomes blocks of tokens."""

    train: list[str] | list[Source] = Field(
        min_length=1,
        description="The training text: paths, URLs (s3://, gs://, https://, hf://, zip://MEMBER::URL), "
        "globs of either (`**` for any depth), folders that `datasets` saved, and data sets of the Hub "
        "(hf://datasets/OWNER/NAME); or a list of {name, files, weight} for a mixture.",
    )
    validation: float | list[str] = Field(
        0.01,
        description="The fraction of documents held out, chosen by a hash of their content (0: none); "
        "or validation text, as in `data.train`.",
    )
    format: Literal["auto", "text", "jsonl", "parquet", "arrow"] = Field(
        "auto",
        description="How files are read. `auto`: by name (.jsonl, .json, .ndjson, .parquet, .arrow, and "
        "text for all others).",
    )
    sample_by: Literal["line", "paragraph", "document"] = Field(
        "line", description="What a document is in a text file: a line, a paragraph, or the whole file."
    )
    text_field: str = Field(
        "text", min_length=1, description="The field of jsonl, or the column of a table, that holds the text."
    )
    block_size: Count = Field(
        1024, ge=2, description="Tokens in a block: the length of one training sequence."
    )
    packing: Literal["concat", "best_fit", "pad"] = Field(
        "concat",
        description="`concat`: documents joined by the end-of-text token and cut into blocks. "
        "`pad`: one document a row, padded to the longest row of the batch; a document longer than a "
        "block goes on in the next row. `best_fit`: such rows put together into blocks that are nearly full.",
    )
    isolate_documents: bool = Field(
        False,
        description="No position attends across a document boundary inside a block, and no document's first "
        "token is predicted from another document. Proved on the live model before the first step.",
    )
    mode: Literal["prepared", "stream"] = Field(
        "prepared",
        description="`prepared`: tokenised once into a store. `stream`: straight from the text, "
        "with nothing written; for text that is read once or that no disk here holds.",
    )
    skip: SkipSection = Field(
        default_factory=SkipSection, description="Text that is not trained on any more."
    )
    cache_dir: Folder | None = Field(
        None, description="Where token stores are kept. null: `.stores` in `output_dir`."
    )


class EarlyStopping(Section):
    """When to stop before the planned length."""

    patience: Count = Field(description="Evaluations in a row without improvement after which to stop.")
    min_delta: float = Field(0.0, ge=0, description="How much eval_loss must fall to count as improvement.")


class FastSection(Section):
    """What makes the stock model fast without changing what is trained or saved; each can be switched off."""

    tanh_gelu: bool = Field(True, description="GPT-2's `gelu_new` as one kernel.")
    causal_attention: bool = Field(
        True,
        description="Attention without a mask, which is causal by itself: with `packing: concat` and without "
        "isolate_documents.",
    )
    chunked_loss: bool = Field(
        True,
        description="Output layer and cross-entropy together, some tokens at a time, so that no logits are "
        "kept. Not under zero3 and fsdp, and not in fp16.",
    )
    padded_vocabulary: bool = Field(
        True,
        description="On a GPU, embedding and output layer have rows up to a multiple of 64, which take no "
        "part in the loss and are not in the saved model. A run goes on as it began.",
    )
    fused_adamw: bool = Field(True, description="AdamW as one kernel.")
    tf32: bool = Field(
        True,
        description="On a GPU, TF32 for the matrix products that stay fp32 under bf16 and fp16. "
        "`train.precision: fp32` is never TF32.",
    )


class TrainSection(Section):
    """How to train."""

    batch_size: Count = Field(description="Sequences per optimizer step, over the whole world.")
    tokens: Tokens | None = Field(
        None,
        description="Length of training in tokens, rounded up to a whole step; with `packing: concat` "
        "only. One of tokens, steps, epochs.",
    )
    steps: Count | None = Field(None, description="Length of training in optimizer steps.")
    epochs: Figure | None = Field(
        None, description="Length of training in passes over the training blocks, rounded up to a whole step."
    )
    learning_rate: float = Field(6e-4, gt=0, description="The peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine",
        description="How the learning rate falls after warmup: to zero along a cosine or a line, or not.",
    )
    warmup: Annotated[float, Field(ge=0)] = Field(
        0.02, description="Linear warmup: below 1, a fraction of the steps; from 1 on, a number of steps."
    )
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay; biases and norms are left out.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's two betas.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are clipped to this global norm; 0: not clipped."
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="`auto`: bf16 where the GPU has it, else fp16; fp32 on a CPU."
    )
    gradient_checkpointing: Literal["auto"] | bool | Count = Field(
        "auto",
        description="Recompute activations in the backward pass: of every layer, of none, or of so many, the "
        "first ones. `auto`: only where memory asks for it; of as few as it takes if that gains enough.",
    )
    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp"] = Field(
        "auto", description="What the ranks share of the model's state."
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="What is kept in CPU memory rather than on the GPU."
    )
    micro_batch: Literal["auto"] | Count = Field(
        "auto",
        description="Sequences per forward pass on one rank. `auto`: of those that divide the batch and fit, "
        "the one predicted to be fastest; 65,536 tokens at most, 8,192 on a CPU.",
    )
    compile: Literal["auto"] | bool = Field(
        "auto",
        description="Run the model through torch.compile. `auto`: on a GPU with strategy ddp and "
        "`packing: concat`, unless `isolate_documents`.",
    )
    fast: FastSection = Field(
        default_factory=FastSection,
        description="What makes the stock model fast without changing what is trained or saved.",
    )
    eval_every: Every = Field(
        500, description="Evaluate every so many steps, or every duration such as 30min."
    )
    log_every: Count = Field(10, description="Write a line of metrics every so many steps.")
    early_stopping: EarlyStopping | None = Field(
        None,
        description="Stop when eval_loss no longer falls, and keep the best model. null: train to the end.",
    )
    metrics: list[str] = Field(
        default_factory=list,
        description="Evaluation metrics of your own, as `module:function`. Each is given transformers' "
        "EvalPrediction (predicted ids and labels, int64[n, block_size-1], -100 where there is none) "
        "and returns a dict of numbers.",
    )
    callbacks: list[str] = Field(
        default_factory=list,
        description="transformers TrainerCallback classes of your own, as `module:Class`.",
    )
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other TrainingArguments field; those that launcher sets itself are refused by name.",
    )


class CheckpointSection(Section):
    """When to save, and how much to keep."""

    every: Every = Field("15min", description="Save every so many steps, or every duration such as 15min.")
    keep: Count = Field(
        2,
        description="How many committed checkpoints stay on disk, the newest ones; with "
        "`train.early_stopping` the best one besides.",
    )


class RunConfig(Section):
    """`run.yaml`: what to train. It names no machine, so the same file runs anywhere."""

    name: Annotated[str, AfterValidator(run_name)] = Field(
        description="The run's name, and its folder's name in `output_dir`."
    )
    model: ModelSection = Field(description="Which model.")
    data: DataSection = Field(description="Which text, and how it becomes blocks of tokens.")
    train: TrainSection = Field(description="How to train.")
    checkpoint: CheckpointSection = Field(
        default_factory=CheckpointSection, description="When to save, and how much to keep."
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default=["tensorboard"],
        description="Where metrics go besides metrics.jsonl.",
    )
    push_to_hub: Annotated[str, AfterValidator(one_line)] | None = Field(
        None,
        description="The Hub repository (`user/name`) the final model is uploaded to: tried when training is "
        "over; the same command tries it again. null: none.",
    )
    seed: Annotated[int, BeforeValidator(integral)] = Field(
        1337, ge=0, lt=2**32, description="Seeds the weights, the dropout and the order of the data."
    )
    output_dir: Folder = Field("runs", description="The folder that run directories are made in.")


class Container(Section):
    """What the ranks run inside on each node."""

    runtime: Literal["pyxis", "apptainer"] = Field(
        description="`pyxis`: srun's own --container-image. `apptainer`: `apptainer exec` on each node."
    )
    image: str = Field(min_length=1, description="The image, as the runtime names it.")
    mounts: list[str] = Field(
        default_factory=list,
        description="Folders to show inside, as `OUTSIDE` or `OUTSIDE:INSIDE`. The run directory and the "
        "token store are shown in any case.",
    )


class SlurmSection(Section):
    """What SLURM is asked for."""

    partition: str | None = Field(None, description="The partition to submit to.")
    account: str | None = Field(None, description="The account that is charged.")
    qos: str | None = Field(None, description="The quality of service.")
    time_limit: Annotated[str, AfterValidator(check_time_limit)] | None = Field(
        None,
        description="The job's time limit, as SLURM writes it: `HH:MM:SS`, `D-HH:MM:SS`, minutes or "
        "`UNLIMITED`. A longer run goes on by itself in the same job, requeued. null: the partition's.",
    )
    constraint: str | None = Field(None, description="Features that the nodes must have.")
    reservation: str | None = Field(None, description="The reservation to run in.")
    exclude: list[str] = Field(default_factory=list, description="Nodes never to run on.")
    exclusive: bool | Literal["user", "mcs"] = Field(
        False,
        description="Share the nodes with no other job; `user`, `mcs`: only with the same user's or group's.",
    )
    gpu_type: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="The type of GPU to ask for, if several are there, as `sinfo --format='%P %G'` has it. "
        "null: any.",
    )
    cpus_per_node: Count | None = Field(
        None,
        description="CPUs on each node. null: all of them where `exclusive`; else 8 for each GPU, and 1 for "
        "each rank on the CPU.",
    )
    memory: Annotated[str, AfterValidator(check_memory)] | None = Field(
        None, description="Memory on each node, such as 200G; `0`: all of it. null: the partition's default."
    )
    setup: list[str] = Field(
        default_factory=list, description="Shell lines run before anything else in the job."
    )
    container: Container | None = Field(
        None,
        description="What the ranks run inside, as {runtime, image, mounts}. null: the nodes themselves.",
    )
    extra: list[str] = Field(
        default_factory=list, description="More #SBATCH options, as written, such as `--mail-type=END`."
    )
    template: str | None = Field(
        None, description="Your own job template in place of launcher's slurm/job.sbatch.j2."
    )


class GPUFigures(Section):
    """A GPU that the catalogue lacks, by its maker's figures."""

    name: str = Field(min_length=1, description="What to call it: a name that the catalogue does not have.")
    memory_gb: Measure = Field(description="Its memory in GB of 10^9 bytes.")
    bf16_tflops: Measure | None = Field(
        None, description="Its peak in bf16 and fp16, dense, in 10^12 FLOP/s. null: speed is not predicted."
    )
    bandwidth_gbs: Measure | None = Field(
        None, description="Its memory's bandwidth in GB/s. null: speed is not predicted."
    )
    link_gbs: Measure | None = Field(
        None,
        description="What it sends to others of its node, in GB/s each way. null: speed is not predicted.",
    )


class ClusterConfig(Section):
    """`cluster.yaml`: where. The same file serves every run."""

    name: str = Field("this-machine", min_length=1, description="What the cluster is called.")
    launch: Literal["local", "slurm"] = Field("local", description="How ranks are started.")
    nodes: Count = Field(1, description="How many nodes.")
    gpus_per_node: Literal["auto"] | Count = Field(
        "auto",
        description="GPUs, and so ranks, on each node; `auto`: those found here. With `gpu: cpu`, "
        "ranks on the CPU.",
    )
    gpu: str | GPUFigures = Field(
        "auto",
        description="The GPU's name in the catalogue; `cpu`; `auto`: what is found here; or, for one that "
        "the catalogue lacks, {name, memory_gb} and, for its speed, {bf16_tflops, bandwidth_gbs, link_gbs}.",
    )
    network_gbps: Measure | None = Field(
        None, description="Network bandwidth between nodes, per GPU, in Gbit/s."
    )
    price_per_gpu_hour: Annotated[float, Field(ge=0), AfterValidator(at_most(MOST))] | None = Field(
        None, description="Price of one GPU for one hour, in any currency."
    )
    slurm: SlurmSection = Field(default_factory=SlurmSection, description="What SLURM is asked for.")
    env: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables set for every rank. No secrets: it is written to disk.",
    )
