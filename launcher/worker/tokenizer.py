"""What transformers makes of a tokenizer: asked by `launcher.data.tokenizers`, in a process of its own.

`python -m launcher.worker.tokenizer FOLDER`: as the last line of stdout, in JSON, the tokenizer.json of the
tokenizer that its class builds, and the names of its special tokens.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from transformers import AutoTokenizer


def read(folder: str) -> dict[str, Any]:
    """The tokenizer in a folder. Raises whatever transformers does, and ValueError for one that finds no
    special token in a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.split_special_tokens:
        raise ValueError("split_special_tokens is set: end-of-text would not be found in its ids")
    named = ("eos_token", "pad_token", "bos_token", "unk_token")
    special = {key: token for key in named if (token := getattr(tokenizer, key)) is not None}
    return {"content": tokenizer.backend_tokenizer.to_str(), "special": special}


if __name__ == "__main__":
    print(f"\n{json.dumps(read(sys.argv[1]))}")  # a line of its own, whatever else was printed
