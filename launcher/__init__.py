"""Train GPT-2-family and other Hugging Face causal language models out of one YAML file."""

__version__ = "0.1.0"
