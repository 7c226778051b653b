"""One rank: the only rooms that import torch."""
