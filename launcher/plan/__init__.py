"""What will happen: pure arithmetic over the configuration, the model's shape and the hardware."""
