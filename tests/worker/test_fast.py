from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from launcher.worker.fast import use_tanh_gelu_kernel


def small_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def test_the_kernel_gives_the_stock_model_s_loss_and_every_gradient() -> None:
    stock, fast = small_gpt2(), small_gpt2()
    assert use_tanh_gelu_kernel(fast) == 2
    ids = torch.randint(0, 97, (4, 32), generator=torch.Generator().manual_seed(1))
    losses = []
    for model in (stock, fast):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-6
    for (name, ours), (_, theirs) in zip(fast.named_parameters(), stock.named_parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_config_that_is_saved_still_names_the_function() -> None:
    model = small_gpt2()
    use_tanh_gelu_kernel(model)
    assert model.config.activation_function == "gelu_new"


def test_a_model_with_another_activation_is_left_alone() -> None:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    assert use_tanh_gelu_kernel(LlamaForCausalLM(config)) == 0


def faults(statement: str) -> int:
    """Pages the kernel hands out while a process fills and frees a tensor of 64 MiB (16,384 pages) ten times,
    after `statement` and twenty such tensors."""
    program = f"""
import resource, torch
from launcher.worker.fast import keep_freed_memory
torch.set_num_threads(1)
{statement}
for _ in range(20):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives freed memory back at once")
def test_freed_memory_is_used_again() -> None:
    assert faults("pass") > 10 * 2**14 * 0.9
    assert faults("keep_freed_memory()") < 100
