"""Sample text from a model: what `launcher generate` runs.

`python -m launcher.worker.generate MODEL PROMPT TOKENS TEMPERATURE TOP_K SEED`; the text goes to stdout.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging


def generate(model: str, prompt: str, *, tokens: int, temperature: float, top_k: int, seed: int) -> str:
    """The prompt and at most `tokens` more of `model` (a folder or Hub id), special tokens left out.

    Temperature 0 takes the likeliest token each time. Stops early at end-of-text.
    """
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network: Any = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False)
    network.to(torch.device(device)).eval()
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    start = torch.tensor([ids], device=device)
    positions = getattr(network.config, "max_position_embeddings", None)
    room = tokens if positions is None else positions - len(ids)
    if room < 1:
        raise ValueError(f"the prompt has {len(ids)} tokens, and the model takes {positions} in all")
    drawing = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k}
        if temperature
        else {"do_sample": False}
    )
    with torch.no_grad():
        out = network.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=min(tokens, room),
            pad_token_id=tokenizer.pad_token_id,
            **drawing,
        )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def main(arguments: list[str]) -> int:
    model, prompt, tokens, temperature, top_k, seed = arguments
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        text = generate(
            model,
            prompt,
            tokens=int(tokens),
            temperature=float(temperature),
            top_k=int(top_k),
            seed=int(seed),
        )
    except (OSError, ValueError) as error:
        print(f"error: {model} cannot be used to generate: {error}", file=sys.stderr)
        print("  hint: give a run's folder after training, a model's folder or a Hub id", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
