"""What a machine has, and what that allows."""
