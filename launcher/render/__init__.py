"""What other tools read: a plan as text. Pure."""
