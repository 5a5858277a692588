"""How the shipped data was made: the invented world, the small model, its adapter, and stand-ins for large models."""
