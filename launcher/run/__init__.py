"""What happens: the run directory and its record, and the machine the ranks run on."""
