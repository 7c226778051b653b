"""Text into blocks of tokens: sources -> units -> store -> packing -> blocks, and the order of samples."""
