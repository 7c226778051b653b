"""A rank whose engine is made to differ from the plan, one thing after another, just before it is verified.

`accelerate launch --config_file RUN_DIR/accelerate.yaml tests/worker/tampering.py RUN_DIR`: rank 0 writes
`tampered.json` into the run directory: for each thing, what verification said; and its time untouched.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy

from launcher.errors import TrainingError
from launcher.plan.orders import Orders
from launcher.run.directory import RunDirectory
from launcher.worker import main as worker
from launcher.worker import verify as verifying
from launcher.worker.trainer import LauncherTrainer

Tamper = Callable[[LauncherTrainer], Iterator[None]]


def attribute(path: str, value: Any) -> Tamper:
    """Another value for a dotted attribute of the trainer, for as long as it takes."""

    def tamper(trainer: LauncherTrainer) -> Iterator[None]:
        *way, name = path.split(".")
        holder: Any = trainer
        for part in way:
            holder = getattr(holder, part)
        before = getattr(holder, name)
        setattr(holder, name, value(before) if callable(value) else value)
        yield
        setattr(holder, name, before)

    return tamper


def a_weight_in_half(trainer: LauncherTrainer) -> Iterator[None]:
    weight = next(trainer.bare_model.parameters())
    before = weight.data
    weight.data = before.to(torch.float16)
    yield
    weight.data = before


def the_optimizers_in_half(trainer: LauncherTrainer) -> Iterator[None]:
    engine: Any = trainer.model_wrapped
    zero = getattr(engine, "optimizer", None)
    if zero is not None:
        shards = zero.single_partition_of_fp32_groups
        before = shards[0]
        shards[0] = before.detach().half()
        yield
        shards[0] = before
    else:
        assert trainer.optimizer is not None
        group = trainer.optimizer.param_groups[0]
        before = group["params"]
        group["params"] = [*before[1:], before[0].detach().half()]
        yield
        group["params"] = before


def layers_that_recompute(trainer: LauncherTrainer) -> Iterator[None]:
    trainer.bare_model.activation_checkpointing_enable()
    yield
    trainer.bare_model.activation_checkpointing_disable()


def other_attention(trainer: LauncherTrainer) -> Iterator[None]:
    before = trainer.bare_model.config._attn_implementation
    trainer.bare_model.set_attn_implementation("eager")
    yield
    trainer.bare_model.config._attn_implementation = before


def next_steps_samples(trainer: LauncherTrainer) -> Iterator[None]:
    loader = trainer.callback_handler.train_dataloader
    assert loader is not None
    late = list(loader.batch_sampler)[trainer.args.gradient_accumulation_steps :]
    yield from attribute("callback_handler.train_dataloader", SimpleNamespace(batch_sampler=late))(trainer)


def a_moving_loss_scale(trainer: LauncherTrainer) -> Iterator[None]:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))  # a scaler has no scale before its first use
    yield from attribute("accelerator.scaler", scaler)(trainer)


def rounded_gradients(trainer: LauncherTrainer) -> Iterator[None]:
    engine: Any = trainer.model_wrapped
    group = engine._get_fsdp_state()._fsdp_param_group
    before = group.mp_policy
    group.mp_policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
    yield
    group.mp_policy = before


def one_layer_that_recomputes(trainer: LauncherTrainer) -> Iterator[None]:
    layers: list[Any] = [
        one for one in trainer.bare_model.modules() if hasattr(one, "gradient_checkpointing")
    ]
    layer = layers[-1]
    layer.gradient_checkpointing = True
    yield
    layer.gradient_checkpointing = False


def one_layer_that_is_compiled(trainer: LauncherTrainer) -> Iterator[None]:
    layer = [module for module in trainer.model_wrapped.modules() if isinstance(module, FSDPModule)][-1]
    layer.compile()
    yield
    layer._compiled_call_impl = None


def parameters_on_the_host(trainer: LauncherTrainer) -> Iterator[None]:
    engine: Any = trainer.model_wrapped
    last = [module for module in engine.modules() if isinstance(module, FSDPModule)][-1]
    group: Any = last._get_fsdp_state()._fsdp_param_group
    before = group.offload_policy
    group.offload_policy = CPUOffloadPolicy(pin_memory=False)
    yield
    group.offload_policy = before


def all_decay(trainer: LauncherTrainer) -> Iterator[None]:
    optimizer: Any = getattr(trainer.model_wrapped, "optimizer", trainer.optimizer)
    last = optimizer.param_groups[-1]
    before = last["weight_decay"]
    last["weight_decay"] = 0.1
    yield
    last["weight_decay"] = before


def the_stock_loss(trainer: LauncherTrainer) -> Iterator[None]:
    """The model's own forward pass, as its class has it."""
    model = trainer.bare_model
    before = model.__dict__.pop("forward", None)
    yield
    if before is not None:
        model.forward = before


ANYWHERE: dict[str, Tamper] = {
    "weight decay": all_decay,
    "weights": a_weight_in_half,
    "optimizer's weights": the_optimizers_in_half,
    "gradient checkpointing": layers_that_recompute,
    "attention": other_attention,
    "fast paths": the_stock_loss,
    "steps": attribute("state.max_steps", 7),
    "samples of the first step": next_steps_samples,
    "device": attribute("accelerator.state.device", torch.device("meta")),
    "loss scale": a_moving_loss_scale,
}
DDP: dict[str, Tamper] = {
    "engine": attribute("model_wrapped", lambda wrapped: wrapped.module),
    "precision": attribute("accelerator.state._mixed_precision", "bf16"),
    "micro-batch": attribute("_train_batch_size", 3),
    "accumulation": attribute("args.gradient_accumulation_steps", 1),
    "gradient clipping": attribute("args.max_grad_norm", 0.0),
    "compile": attribute("model_wrapped", torch.compile),
}
ZERO: dict[str, Tamper] = {
    "engine": attribute("model_wrapped", lambda engine: engine.module),
    "micro-batch": attribute("model_wrapped._config.train_micro_batch_size_per_gpu", 3),
    "accumulation": attribute("model_wrapped._config.gradient_accumulation_steps", 5),
    "batch": attribute("model_wrapped._config.train_batch_size", 9),
    "gradient clipping": attribute("model_wrapped.optimizer.clip_grad", 0.0),
    "ZeRO stage": attribute("model_wrapped._config.zero_optimization_stage", 1),
    "offloaded": attribute("model_wrapped._config.zero_config.offload_optimizer", {"device": "cpu"}),
    "gradients": attribute("model_wrapped._config.grad_accum_dtype", "bf16"),
    "loss scale": attribute("model_wrapped.optimizer.dynamic_loss_scale", True),
}
FSDP: dict[str, Tamper] = {
    "engine": attribute("model_wrapped", lambda _: torch.nn.Identity()),
    "gradient checkpointing": one_layer_that_recomputes,
    "compile": one_layer_that_is_compiled,
    "mixed precision": rounded_gradients,
    "offloaded": parameters_on_the_host,
}


def another_version(directory: RunDirectory, orders: Orders) -> dict[str, str | None]:
    return verifying.identity(directory, orders) | {"version of torch": "1.0"}


def another_configuration(directory: RunDirectory, orders: Orders) -> dict[str, str | None]:
    copy = RunDirectory(directory.root.with_name("copy"))
    shutil.copytree(directory.root, copy.root, dirs_exist_ok=True)
    copy.config.write_text(copy.config.read_text() + "# by hand\n")
    return verifying.identity(copy, orders)


def another_store(directory: RunDirectory, orders: Orders) -> dict[str, str | None]:
    assert orders.store is not None
    copy = directory.root.with_name("store")
    shutil.copytree(orders.store, copy, dirs_exist_ok=True)
    (copy / "manifest.json").write_text((copy / "manifest.json").read_text() + "\n")
    return verifying.identity(directory, Orders(**{**vars_of(orders), "store": str(copy)}))


def vars_of(orders: Orders) -> dict[str, Any]:
    return {name: getattr(orders, name) for name in orders.__slots__}


RANKS = {
    "version of torch": another_version,
    "sha256 of config.yaml": another_configuration,
    "sha256 of manifest.json": another_store,
}


@contextmanager
def tampered(tamper: Tamper, trainer: LauncherTrainer) -> Iterator[None]:
    steps = tamper(trainer)
    next(steps)
    yield
    next(steps, None)


def main(run: str) -> int:
    real = verifying.verify

    def verify(trainer: LauncherTrainer, directory: RunDirectory, orders: Orders, *about: Any) -> str:
        begun = time.perf_counter()
        real(trainer, directory, orders, *about)
        said: dict[str, Any] = {"seconds": time.perf_counter() - begun}
        own = {"ddp": DDP, "fsdp": FSDP}.get(orders.plan.strategy, ZERO)
        for name, tamper in {**ANYWHERE, **own}.items():
            said[name] = None
            with tampered(tamper, trainer):
                try:
                    real(trainer, directory, orders, *about)
                except TrainingError as error:
                    said[name] = error.message
        rank = trainer.accelerator.process_index
        for name, other in RANKS.items():
            identity = other if rank == 1 else verifying.identity
            try:
                verifying.compare_ranks(identity(directory, orders))
            except TrainingError as error:
                said[name] = error.message
        if rank == 0:
            (directory.root / "tampered.json").write_text(json.dumps(said))
        torch.distributed.barrier()
        os._exit(0)  # nothing can be trained with what was tampered with

    worker.verify = verify  # type: ignore[attr-defined,assignment]
    return worker.main([run])


if __name__ == "__main__":
    sys.exit(main(str(Path(sys.argv[1]))))
